"""Exporting a trained detector as a command, with its check, and on request the AP of both."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from detr_family.config import load_config
from detr_family.config.options import OptionsParser
from detr_family.config.projects import add_import
from detr_family.data.datasets.coco import check_test_sets, register_datasets
from detr_family.data.datasets.tree import Tree
from detr_family.data.images import read_image
from detr_family.engine import Trainer
from detr_family.errors import UserError, check_output, mistakes
from detr_family.export.exporting import PRECISIONS, SUFFIX, export_model
from detr_family.inference.exported import ExportedDetector
from detr_family.inference.predictor import Predictor

_CALIBRATION = 100  # images that the ranges of activations are taken from


def parser() -> argparse.ArgumentParser:
    """The command line of tools/export_model.py."""
    result = OptionsParser(
        description="Writes a detector as a file that runs without it, and compares what both find.",
        epilog="Exit status: 0, or 1 where nothing was written. What the files take and give: docs/deploy.md.",
    )
    result.add_argument(
        "--config-file", required=True, metavar="FILE", help="one of configs/, or the config.yaml of a training"
    )
    result.add_argument("--weights", metavar="FILE", help="the checkpoint; by default MODEL.WEIGHTS of the config")
    result.add_argument("--format", required=True, choices=list(SUFFIX))
    result.add_argument("--output", type=Path, metavar="FILE", help="by default output/model with the format's suffix")
    result.add_argument(
        "--size", type=int, nargs=2, default=[800, 1333], metavar=("HEIGHT", "WIDTH"),
        help="size of the images that it is tried with; with --fixed the only one that it takes",
    )  # fmt: skip
    result.add_argument("--batch", type=int, default=1, help="the same for the number of images; by default 1")
    result.add_argument("--fixed", action="store_true", help="only this size and batch: what follows is constant")
    result.add_argument("--precision", choices=PRECISIONS, default="float32", help="of the file (openvino)")
    result.add_argument(
        "--data", type=Path, metavar="DIR", help="for int8: a folder of images like those that it will see"
    )
    result.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="for aoti: what it is compiled for")
    result.add_argument(
        "--plain", action="store_true", help="torch_export, aoti: no operator of ours, so that torch alone loads it"
    )
    result.add_argument(
        "--tensorrt-plugin", action="store_true", help="onnx: deformable attention as TensorRT's plugin, not compared"
    )
    result.add_argument(
        "--images", nargs="*", default=[], metavar="FILE", help="to compare on, resized; by default some are drawn"
    )
    result.add_argument(
        "--evaluate", action="store_true", help="then the AP of the detector and of the file on DATASETS.TEST"
    )
    add_import(result)
    result.add_argument("--opts", nargs=argparse.REMAINDER, default=[], help="KEY VALUE pairs of the configuration")
    return result


def command(arguments: Sequence[str] | None = None) -> int:
    """Parse the command line and do what it says; returns the exit status."""
    return run(parser().parse_args(arguments))


def run(args: argparse.Namespace) -> int:
    """Does what the command line says; returns the exit status."""
    try:
        with mistakes():
            predictor, cfg, output = _export(args)
    except UserError as error:
        print(f"export_model: {error}", file=sys.stderr)
        return 1
    if args.evaluate:
        exported = ExportedDetector(output, input_format=cfg.INPUT.FORMAT, stretch=True)
        print(beside({"detector": Trainer.test(cfg, predictor.model), args.format: Trainer.test(cfg, exported)}))
    return 0


def _export(args: argparse.Namespace) -> tuple[Predictor, Any, Path]:
    output = args.output or Path("output") / f"model{SUFFIX[args.format]}"
    check_output(output, "--output", folder=False)
    cfg = load_config(args.config_file, args.opts)
    register_datasets(cfg)
    if args.precision == "int8" and args.data is None:
        raise UserError("--precision int8 needs images like those that it will see, to calibrate on: --data DIR")
    if args.tensorrt_plugin and args.evaluate:
        raise UserError("--evaluate needs a file that runs here: only TensorRT runs that of --tensorrt-plugin")
    if args.evaluate:  # before the export, which takes minutes
        if not cfg.DATASETS.TEST:
            raise UserError("--evaluate needs a dataset: name one in DATASETS.TEST")
        check_test_sets(cfg)
    calibration = calibration_images(args.data) if args.precision == "int8" else []
    images = [torch.from_numpy(read_image(name, "RGB").copy()).permute(2, 0, 1) for name in args.images]
    predictor = Predictor.from_config(cfg, args.weights, optimize=False)
    difference = export_model(
        predictor,
        args.format,
        output,
        size=tuple(args.size),
        batch=args.batch,
        dynamic=not args.fixed,
        precision=args.precision,
        device=args.device,
        native=False if args.plain else None,
        images=images,
        tensorrt_plugin=args.tensorrt_plugin,
        calibration=calibration,
    )
    if difference is None:
        print(f"{output}: not compared with the detector, as only TensorRT runs its plugin")
    else:
        print(
            f"{output}: {difference.compared} detections compared with the detector's, largest differences "
            f"{difference.score:.2g} of score and {difference.box:.2g} pixels"
        )
    return predictor, cfg, output


def calibration_images(folder: Path, count: int = _CALIBRATION) -> list[torch.Tensor]:
    """At most `count` images of a folder and those below it, spread over all of them: (3, H, W) uint8, RGB.

    Raises:
        UserError: there is none.
    """
    paths = Tree(folder).images if folder.is_dir() else []
    if not paths:
        raise UserError(f"--data {folder} has no images to calibrate on")
    chosen = [paths[i * len(paths) // count] for i in range(count)] if len(paths) > count else paths
    return [torch.from_numpy(read_image(str(path), "RGB").copy()).permute(2, 0, 1) for path in chosen]


def beside(results: dict[str, dict[str, Any]]) -> str:
    """A table of the box metrics of several evaluations, a line each; of several datasets, those of each."""
    lines = []
    width = max(len(name) for name in results)
    for key in ("AP", "AP50", "AP75"):
        for name, result in results.items():
            values = " ".join(f"{value:8.3f}" for value in _values(result, key))
            lines.append(f"{key:5s} {name:{width}s} {values}")
    return "\n".join(lines)


def _values(result: dict[str, Any], key: str) -> Sequence[float]:
    if "bbox" in result:
        return [result["bbox"][key]]
    return [inner["bbox"][key] for inner in result.values()]
