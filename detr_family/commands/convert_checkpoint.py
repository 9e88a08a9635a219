"""A checkpoint of any format that loads here, written in another one."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from detectron2.modeling import build_model

from detr_family.checkpoint import DETRCheckpointer, read_class_names
from detr_family.checkpoint.files import replacing, save_safetensors
from detr_family.checkpoint.to_transformers import write_for_transformers
from detr_family.config import load_config
from detr_family.config.options import OptionsParser
from detr_family.config.projects import add_import
from detr_family.data.datasets.coco import register_datasets
from detr_family.errors import check_output

FORMATS = ("pth", "safetensors", "transformers")
_OTHERS = (".pt", ".bin", ".ckpt", ".pkl", ".onnx", ".pt2", ".xml")  # no folders by these names are meant


def parser() -> argparse.ArgumentParser:
    """The command line."""
    result = OptionsParser(
        description="Writes a checkpoint of any format that loads here (a release's, detrex's, transformers', one's "
        "own) as a file of this project or for transformers."
    )
    result.add_argument(
        "--config-file", required=True, metavar="FILE", help="the checkpoint's config file, or a name: detr_r50"
    )
    result.add_argument(
        "--weights", metavar="FILE", help="a file, an address or a name; by default MODEL.WEIGHTS of the config"
    )
    result.add_argument("--output", required=True, type=Path, help="the file, of transformers the folder, to write")
    result.add_argument(
        "--format", choices=FORMATS, help="by default what --output ends with: .pth, .safetensors, else transformers"
    )
    add_import(result)
    result.add_argument("--opts", nargs=argparse.REMAINDER, default=[], help="KEY VALUE pairs of the configuration")
    return result


def convert(args: argparse.Namespace) -> str:
    """Do what the command line says; returns what was written.

    Raises:
        ValueError: the checkpoint does not fit, or the format does not have such a detector.
        OSError: something cannot be read or written.
    """
    kind = args.format or (args.output.suffix[1:] if args.output.suffix[1:] in FORMATS else "transformers")
    if args.format is None and args.output.suffix in _OTHERS:
        raise ValueError(
            f"--output {args.output}: {args.output.suffix} is none of this command's formats. It writes "
            f"{', '.join(FORMATS)}, which --format may say; ONNX and others come from tools/export_model.py"
        )
    check_output(args.output, "--output", folder=kind == "transformers")
    cfg = load_config(args.config_file, [*args.opts, "MODEL.DEVICE", "cpu"])
    register_datasets(cfg)
    weights = args.weights or cfg.MODEL.WEIGHTS
    names = read_class_names(weights)
    if cfg.MODEL.DETR.NUM_CLASSES == -1 and names:
        cfg.MODEL.DETR.NUM_CLASSES = len(names)
    model = build_model(cfg)
    cfg.MODEL.DETR.NUM_CLASSES = model.num_classes
    DETRCheckpointer(model, whole=True, averaged=cfg.TEST.EMA).load(weights)
    if kind == "transformers":
        write_for_transformers(str(args.output), cfg, model, names)
        return f"{args.output}: config.json, preprocessor_config.json, model.safetensors"
    args.output.parent.mkdir(parents=True, exist_ok=True)
    named = {"class_names": names} if names else {}
    if kind == "safetensors":
        save_safetensors(str(args.output), model.state_dict(), named)
    else:
        with replacing(str(args.output)) as file:
            torch.save({"model": model.state_dict(), **named}, file)
    return str(args.output)


def command(arguments: Sequence[str] | None = None) -> int:
    """Parse the command line and do what it says; returns the exit status: 2 where nothing was written."""
    args = parser().parse_args(arguments)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    try:
        print(f"Written: {convert(args)}")
    except (OSError, ValueError) as error:
        print(f"convert_checkpoint: {error}", file=sys.stderr)
        return 2
    return 0
