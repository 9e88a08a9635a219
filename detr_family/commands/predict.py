"""Predictions of many images as a command: over processes and machines, to be gone on with after an interruption."""

from __future__ import annotations

import argparse
import hashlib
import importlib
import importlib.util
import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.utils import comm

from detr_family.commands.demo import NO_CV2, add_detector, category_ids, say_what_failed
from detr_family.config import load_config
from detr_family.config.options import OptionsParser
from detr_family.config.projects import add_import
from detr_family.data.datasets.coco import register_datasets
from detr_family.engine.processes import launch, meeting, under_torchrun
from detr_family.errors import UserError, check_output, mistakes, require
from detr_family.inference import journal
from detr_family.inference.exported import is_exported
from detr_family.inference.many import predict_many
from detr_family.inference.predictor import Predictor
from detr_family.inference.work import Work, find_work


def parser() -> argparse.ArgumentParser:
    """The command line of tools/predict.py; what demo.py has too is called as there."""
    result = OptionsParser(
        description="Finds objects in any number of images and writes what it finds in COCO's formats. A run that was "
        "interrupted goes on where it stopped when it is started again.",
        epilog="Exit status: 0, 1 where something could not be read (the rest was done), 2 where nothing was done.",
    )
    add_detector(result)
    result.add_argument(
        "--input", nargs="+", metavar="PATH",
        help="images, videos, folders and all below them, globs, lists (.txt), COCO files (.json)",
    )  # fmt: skip
    result.add_argument("--image-root", metavar="DIR", help="where the images of COCO files lie; by default looked for")
    result.add_argument("--output", type=Path, default=Path("output/predict"), help="folder for what is written")
    result.add_argument(
        "--confidence-threshold", type=float, default=0.5, help="least score of what is written; 0 for an evaluation"
    )
    result.add_argument("--batch-size", type=int, default=1, help="images of one size that share a pass, at most")
    result.add_argument("--num-workers", type=int, default=2, help="data workers of each process")
    result.add_argument("--num-processes", type=int, default=1, help="on this machine, a GPU each; or use torchrun")
    result.add_argument(
        "--shard", metavar="I/N",
        help="do the I-th of N shares (0/N to N-1/N) and do not merge: for jobs that start and end by themselves",
    )  # fmt: skip
    result.add_argument("--merge", action="store_true", help="only merge what is in --output")
    result.add_argument("--parquet", action="store_true", help="merge to results.parquet, too")
    result.add_argument("--restart", action="store_true", help="delete what an earlier run left in --output")
    add_import(result)
    result.add_argument("--opts", nargs=argparse.REMAINDER, default=[], help="KEY VALUE pairs of the configuration")
    return result


def command(arguments: Sequence[str] | None = None) -> int:
    """Parse the command line and do what it says; returns the exit status."""
    args = parser().parse_args(arguments)
    try:
        with mistakes():
            _check(args)
        if not args.merge:
            # The launcher's names. A module cannot be sent to the processes that it starts, its name can.
            args.num_gpus, args.num_machines, args.machine_rank, args.dist_url = args.num_processes, 1, 0, "auto"
            args.modules = [module.__name__ for module in getattr(args, "import") or ()]
            setattr(args, "import", None)
            launch(main, args, going_on="The same command goes on")
            if args.shard or (under_torchrun() and int(os.environ["RANK"]) > 0):
                return 0
        with mistakes():
            merged = journal.merge(args.output, args.parquet)
            if merged.failed and not args.merge:
                merged.failed = _of_inputs(merged.failed, find_work(args.input, args.image_root))
    except UserError as error:
        print(f"predict: {error}", file=sys.stderr)
        return 2
    written = "results.json, images.json" + (", results.parquet" if args.parquet else "")
    print(f"{merged.images} images, {merged.detections} boxes that score enough; {written}: {args.output}", flush=True)
    if merged.images and not merged.detections:
        print(f"The best score of all is {merged.best:.3f}: lower --confidence-threshold to see more.")
    say_what_failed(merged.failed)
    return 1 if merged.failed and not under_torchrun() else 0  # torchrun would report a crash


def _of_inputs(failed: Sequence[tuple[str, str]], work: Work) -> list[tuple[str, str]]:
    """What could not be read of this run's inputs: a damaged file that was removed since is no failure of it."""
    names = {item.name for item in work.images} | set(work.videos)
    return [(name, reason) for name, reason in failed if name in names or name.rpartition("#")[0] in names]


def _check(args: argparse.Namespace) -> None:
    if not 0 <= args.confidence_threshold <= 1:
        raise ValueError(f"--confidence-threshold is {args.confidence_threshold}; scores lie between 0 and 1")
    if args.num_processes < 1 or args.num_workers < 0 or args.batch_size < 1:
        raise ValueError(
            f"--num-processes {args.num_processes}, --num-workers {args.num_workers}, --batch-size {args.batch_size}: "
            "1, 0 and 1 at least"
        )
    if torch.cuda.is_available() and args.num_processes > torch.cuda.device_count():
        raise ValueError(
            f"--num-processes is {args.num_processes}, and there are {torch.cuda.device_count()} GPUs: each has one"
        )
    check_output(args.output, "--output", folder=True)
    share_of(args.shard)
    if args.num_processes > 1 and under_torchrun():
        raise ValueError("torchrun starts the processes (--nproc-per-node): leave out --num-processes")
    if args.shard and (args.num_processes > 1 or under_torchrun()):
        raise ValueError("--shard is for processes that you start one by one: without --num-processes and torchrun")
    if args.shard and args.restart:
        raise ValueError("--restart would delete what other shards found: delete the folder yourself before you start")
    if args.merge:
        return
    if not args.input:
        raise ValueError("--input is needed: images, folders, globs, lists, COCO files or videos")
    if not args.config_file and not is_exported(args.weights):
        raise ValueError("--config-file is needed: one of configs/, or the config.yaml of a training")
    if args.parquet:
        require("pyarrow", "parquet")


def share_of(shard: str | None) -> tuple[int, int] | None:
    """Number and count of "3/8".

    Raises:
        ValueError: it is not of this form, or there is no such share.
    """
    if not shard:
        return None
    first, _, second = shard.partition("/")
    if not (first.isdecimal() and second.isdecimal() and int(first) < int(second)):
        raise ValueError(f"--shard is {shard!r}; it may be 0/8, 1/8 ... 7/8")
    return int(first), int(second)


def main(args: argparse.Namespace) -> None:
    """What every process of a run does: its share of the images.

    Raises:
        UserError: what was asked for cannot be.
    """
    for name in args.modules:
        importlib.import_module(name)
    part, parts = share_of(args.shard) or (comm.get_rank(), comm.get_world_size())
    meet = meeting()
    with mistakes():
        work = find_work(args.input, args.image_root)
        if work.videos and importlib.util.find_spec("cv2") is None:
            raise ValueError(f"{work.videos[0]}: {NO_CV2}")
        if work.others and part == 0:
            print(f"{work.others} files are no images or videos by their suffix and are left out", file=sys.stderr)
        cfg = load_config(args.config_file, args.opts)
        register_datasets(cfg)
        predictor = _predictor(cfg, args)
        names = predictor.class_names or [f"class {i}" for i in range(_count(predictor))]
        ids = _ids(cfg, names, work)
        if comm.get_local_rank() == 0:
            journal.begin(args.output, _settings(cfg, args, predictor), names, ids, args.restart)
        meet()
    begin = time.monotonic()
    predict_many(
        predictor,
        work,
        args.output,
        category_ids=ids,
        threshold=args.confidence_threshold,
        part=part,
        parts=parts,
        workers=args.num_workers,
        progress=part == 0 or bool(args.shard),
        start=meet,
    )
    meet()
    if part == 0 and parts > 1 and not args.shard:
        print(f"all {parts} processes are done after {time.monotonic() - begin:.0f} s", file=sys.stderr)


def _predictor(cfg: CfgNode, args: argparse.Namespace) -> Predictor:
    local = comm.get_local_size()
    if local > 1 and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // local))
    given: dict[str, Any] = {"batch_size": args.batch_size, "tile": args.tile, "overlap": args.overlap}
    weights = cfg.MODEL.WEIGHTS if args.weights is None else args.weights
    if is_exported(weights):
        return Predictor.from_exported(weights, threads=torch.get_num_threads() if local > 1 else None, **given)
    return Predictor.from_config(cfg, weights, **given)


def _count(predictor: Predictor) -> int:
    model: Any = predictor.model
    return int(model.num_classes)


def _ids(cfg: CfgNode, names: Sequence[str], work: Work) -> list[int]:
    """Category ids by class number: those of the COCO files that are predicted, where they have all the classes."""
    if all(name in work.categories for name in names):
        return [work.categories[name] for name in names]
    return category_ids(cfg, names)


def _settings(cfg: CfgNode, args: argparse.Namespace, predictor: Predictor) -> dict[str, Any]:
    """All that results depend on, but for their order: neither device, processes, workers nor the batch size."""
    cfg = cfg.clone()
    cfg.defrost()
    weights = args.weights or cfg.MODEL.WEIGHTS
    cfg.MODEL.WEIGHTS = cfg.MODEL.DEVICE = ""
    keys = {} if is_exported(weights) else {"MODEL": json.loads(json.dumps(cfg.MODEL)), **_of_testing(cfg)}
    return {
        "weights": fingerprint(weights),
        "class_names": predictor.class_names,
        "configuration": hashlib.sha256(json.dumps(keys, sort_keys=True).encode()).hexdigest()[:16],
        "confidence_threshold": args.confidence_threshold,
        "tile": args.tile,
        "overlap": args.overlap if args.tile else None,
    }


def _of_testing(cfg: CfgNode) -> dict[str, Any]:
    """What of INPUT and TEST changes a prediction; the rest is about training and evaluations."""
    groups = {
        "INPUT": ["FORMAT", "MIN_SIZE_TEST", "MAX_SIZE_TEST", "RESIZE_ROUNDING"],
        "TEST": ["AUG", "DETECTIONS_PER_IMAGE", "EMA"],
    }
    return {name: {key: json.loads(json.dumps(cfg[name][key])) for key in keys} for name, keys in groups.items()}


def fingerprint(weights: str) -> str:
    """A name for what a file of weights holds, or the name itself where it is none of this machine's files."""
    path = Path(weights)
    files = [file for file in (path, path.with_suffix(".bin")) if file.is_file()] if path.is_file() else []
    digest = hashlib.sha256()
    for file in files[: 2 if path.suffix == ".xml" else 1]:
        with open(file, "rb") as content:
            while block := content.read(1 << 20):
                digest.update(block)
    return f"{path.name} {digest.hexdigest()[:16]}" if files else weights
