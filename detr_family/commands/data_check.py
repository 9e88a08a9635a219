"""The data check as a command: findings of a configuration's datasets, and what training will see of them."""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode
from PIL import Image, ImageDraw
from tabulate import tabulate

from detr_family.config import load_config
from detr_family.config.options import OptionsParser
from detr_family.config.projects import add_import
from detr_family.data.check import (
    DatasetPart,
    Finding,
    annotation_findings,
    image_findings,
    read_part,
    statistics,
)
from detr_family.data.dataset_mapper import DETRDatasetMapper
from detr_family.data.datasets.coco import check_class_names, register_datasets
from detr_family.data.datasets.folder import apply_folder
from detr_family.data.images import to_rgb
from detr_family.errors import check_output
from detr_family.visualization.draw import contact_sheet, draw_boxes

EXIT_STATUS = {"note": 0, "warning": 1, "error": 2}
_MOST_CLASSES = 100  # rows of the printed table


def check_data(cfg: CfgNode, *, images: bool = True, workers: int = 4, progress: bool = True) -> dict[str, Any]:
    """Checks the datasets of DATASETS.TRAIN and DATASETS.TEST.

    Args:
        cfg: the whole configuration; its datasets are registered here.
        images: open and decode every image.
        workers: images read at a time.
        progress: show a bar where stderr is a terminal.

    Returns:
        "datasets": statistics by name; "findings": the worst first, each with level, kind, dataset, count, text
        and examples; "status": 0 where there is no finding above a note, 1 for warnings, 2 for errors.

    Raises:
        ValueError: no dataset is named, or an entry of DATASETS.COCO_FORMAT is malformed.
    """
    register_datasets(cfg)
    names = [(name, True) for name in cfg.DATASETS.TRAIN]
    names += [(name, False) for name in (*cfg.DATASETS.TEST, *cfg.DATASETS.FINAL_TEST)]
    if not names:
        raise ValueError("No dataset to check: use --data, or --train and --val, or name some in DATASETS.TRAIN.")
    parts, findings = [], []
    for name, training in names:
        try:
            parts.append(read_part(name, training))
        except ValueError as error:
            findings.append(Finding("error", "unusable_file", name, 1, str(error)))
    if len(parts) == len(names):
        try:
            check_class_names(cfg)
        except ValueError as error:
            findings.append(Finding("error", "class_names", " / ".join(part.name for part in parts), 1, str(error)))
    findings += annotation_findings(parts, cfg.MODEL.DETR.NUM_QUERIES)
    if images:
        findings += image_findings(parts, workers, progress)
    findings.sort(key=lambda finding: -EXIT_STATUS[finding.level])
    return {
        "datasets": {part.name: statistics(part) for part in parts},
        "findings": findings,
        "status": max([EXIT_STATUS[finding.level] for finding in findings], default=0),
    }


def draw_training_images(cfg: CfgNode, count: int = 24, seed: int = 0) -> Image.Image:
    """Images of the training sets with their boxes, after the augmentation that training uses.

    Args:
        cfg: the whole configuration, its datasets registered.
        count: how many, drawn at random. Where there are that many classes, as good as each is shown.
        seed: of the choice and of the augmentation.

    Returns:
        A contact sheet; an image that cannot be used has a grey place with the reason.
    """
    parts = [read_part(name, True) for name in cfg.DATASETS.TRAIN]
    rng = np.random.default_rng(seed)
    chosen = _choose(parts, count, rng)
    mapper = DETRDatasetMapper(cfg, True)
    state = np.random.get_state()  # Detectron2's augmentations draw from this one
    np.random.seed(seed)
    try:
        cells = [_cell(mapper, cfg.INPUT.FORMAT, part, record) for part, record in chosen]
    finally:
        np.random.set_state(state)
    return contact_sheet(cells)


def _choose(
    parts: Sequence[DatasetPart], count: int, rng: np.random.Generator
) -> list[tuple[DatasetPart, dict[str, Any]]]:
    """Images at random, those that show a class not shown yet first."""
    everything = [(part, record) for part in parts for record in part.records]
    order = [everything[i] for i in rng.permutation(len(everything))]
    shown: set[int] = set()
    first: list[tuple[DatasetPart, dict[str, Any]]] = []
    rest: list[tuple[DatasetPart, dict[str, Any]]] = []
    for part, record in order:
        classes = {a["category_id"] for a in record.get("annotations", ())}
        (first if classes - shown else rest).append((part, record))
        shown |= classes
    return (first + rest)[:count]


def _cell(
    mapper: DETRDatasetMapper, image_format: str, part: DatasetPart, record: dict[str, Any]
) -> tuple[Image.Image, str]:
    title = os.path.basename(str(record["file_name"]))
    try:
        mapped = mapper(record)
    except ValueError as error:
        blank = Image.new("RGB", (360, 270), "#BBBBBB")
        text = "\n".join(str(error)[i : i + 48] for i in range(0, 480, 48))
        ImageDraw.Draw(blank).multiline_text((8, 8), text, fill="black")
        return blank, f"{title}: cannot be used"
    pixels = to_rgb(mapped["image"].permute(1, 2, 0).numpy(), image_format)
    height, width = pixels.shape[:2]
    scale = min(360 / max(height, width), 8.0)
    size = max(round(width * scale), 1), max(round(height * scale), 1)
    image = Image.fromarray(np.ascontiguousarray(pixels)).resize(size, Image.Resampling.BICUBIC)
    truth = mapped.get("instances")
    boxes = (truth.gt_boxes.tensor * scale).tolist() if truth is not None else []
    classes = truth.gt_classes.tolist() if truth is not None else []
    names = [part.class_names[number] if number < len(part.class_names) else str(number) for number in classes]
    return draw_boxes(image, boxes, classes, names), f"{title} ({width}x{height}, {len(boxes)} boxes)"


def text_of(report: dict[str, Any]) -> str:
    """The report of `check_data` as a page of text."""
    lines = []
    for name, known in report["datasets"].items():
        lines.append(f"{name} ({'trained' if known['role'] == 'train' else 'evaluated'} on)")
        lines.append(
            f"  {known['pictures']} images, {known['pictures_without_objects']} of them without objects; "
            f"{known['boxes']} boxes, {known['crowd_regions']} crowd regions"
        )
        if "picture_sides" in known:
            sides = known["picture_sides"]
            lines.append(
                "  images, least / median / greatest: "
                + ", ".join(f"{key} {' / '.join(f'{x:g}' for x in sides[key])} px" for key in ("width", "height"))
            )
        if "box_sides" in known:
            sides, areas = known["box_sides"], known["boxes_by_area"]
            lines.append(
                "  boxes: "
                + ", ".join(f"{key} {' / '.join(f'{x:g}' for x in sides[key])} px" for key in ("width", "height"))
                + f"; {known['boxes_per_picture']['mean']:g} an image, at most {known['boxes_per_picture']['most']}"
            )
            lines.append("  by area (under 32², to 96², above): " + ", ".join(str(areas[key]) for key in areas))
        rows = [[c["name"], c["id"], number, c["boxes"], c["pictures"]] for number, c in enumerate(known["classes"])]
        table = tabulate(rows[:_MOST_CLASSES], ["class", "id in the file", "class number", "boxes", "images"])
        lines += ["    " + line for line in table.splitlines()]
        if len(rows) > _MOST_CLASSES:
            lines.append(f"    and {len(rows) - _MOST_CLASSES} more")
        lines.append("")
    counts = {level: sum(f.level == level for f in report["findings"]) for level in reversed(EXIT_STATUS)}
    lines.append(", ".join(f"{n} {level}{'' if n == 1 else 's'}" for level, n in counts.items()))
    lines += [f"  {finding.level}: {finding}" for finding in report["findings"]]
    return "\n".join(lines)


def parser() -> argparse.ArgumentParser:
    """The command line of tools/check_dataset.py."""
    result = OptionsParser(
        description="Checks datasets and draws them as training will see them.",
        epilog="Exit status: 0 nothing found (notes aside), 1 warnings, 2 errors or a wrong command line.",
    )
    result.add_argument("--data", metavar="DIR", help="a dataset's folder: COCO, YOLO, Pascal VOC or CSV")
    result.add_argument("--train", nargs=2, metavar=("JSON", "FOLDER"), help="annotation file and image folder")
    result.add_argument("--val", nargs=2, metavar=("JSON", "FOLDER"), help="the same of what is evaluated on")
    result.add_argument(
        "--config-file",
        default="Base-DETR",
        metavar="FILE",
        help="whose DATASETS and augmentation are taken: a file, or a name: dn_detr_r50",
    )
    result.add_argument("--no-pictures", dest="no_images", action="store_true", help="look at the annotations alone")
    result.add_argument("--sheet", type=Path, metavar="PNG", help="draw training images with their boxes, augmented")
    result.add_argument("--count", type=int, default=24, help="images on the sheet")
    result.add_argument("--seed", type=int, default=0, help="of the choice and the augmentation on the sheet")
    result.add_argument("--json", metavar="FILE", help='write the report as JSON; "-" for the standard output')
    result.add_argument("--workers", type=int, default=min(os.cpu_count() or 1, 8), help="images read at a time")
    add_import(result)
    result.add_argument("opts", nargs=argparse.REMAINDER, help="KEY VALUE pairs of the configuration")
    return result


def config_of(args: argparse.Namespace) -> CfgNode:
    """The configuration that a command line asks to be checked."""
    cfg = load_config(args.config_file, ["MODEL.DEVICE", "cpu", *args.opts])
    cfg.DATASETS.FOLDER = args.data or cfg.DATASETS.FOLDER
    given = {"TRAIN": args.train, "TEST": args.val}
    if args.train or args.val:
        for key, entry in given.items():
            name = f"{'train' if key == 'TRAIN' else 'val'}: {entry[0]}" if entry else ""
            cfg.DATASETS[key] = (name,) if entry else ()
            if entry:
                cfg.DATASETS.COCO_FORMAT = [*cfg.DATASETS.COCO_FORMAT, [name, *entry]]
    return cfg


def command(arguments: Sequence[str] | None = None) -> int:
    """Parse the command line and do what it says; returns the exit status."""
    return run(parser().parse_args(arguments))


def run(args: argparse.Namespace) -> int:
    """Checks, prints and draws what the command line says; returns the exit status."""
    with tempfile.TemporaryDirectory() as folder:
        return _run(args, folder)


def _check_arguments(args: argparse.Namespace) -> None:
    """What the sheet and the report would fail of after the check, or be wrong."""
    if args.count < 1 or args.seed < 0 or args.workers < 0:
        raise ValueError(f"--count {args.count}, --seed {args.seed}, --workers {args.workers}: 1, 0 and 0 at least")
    if args.json and args.json != "-":
        check_output(args.json, "--json", folder=False)
    if args.sheet:
        check_output(args.sheet, "--sheet", folder=False)
        if Image.registered_extensions().get(args.sheet.suffix.lower()) not in Image.SAVE:
            raise ValueError(f"--sheet {args.sheet} does not end as an image does: give .png")


def _run(args: argparse.Namespace, folder: str) -> int:
    """`run`; a folder's annotations are written into `folder` where training writes them into OUTPUT_DIR."""
    try:
        _check_arguments(args)
        cfg = config_of(args)
        if cfg.DATASETS.FOLDER:
            cfg.OUTPUT_DIR = folder
            print("\n".join(apply_folder(cfg)), file=sys.stderr)
        report = check_data(cfg, images=not args.no_images, workers=args.workers)
        if args.json:
            content = {**report, "findings": [vars(finding) for finding in report["findings"]]}
            text = json.dumps(content, indent=1)
            if args.json == "-":
                print(text)
            else:
                Path(args.json).write_text(text + "\n", encoding="utf-8")
        if args.json != "-":
            print(text_of(report))
        if args.sheet:
            usable = [name for name in cfg.DATASETS.TRAIN if name in report["datasets"]]
            if usable:
                cfg.DATASETS.TRAIN = tuple(usable)
                torch.manual_seed(args.seed)
                args.sheet.parent.mkdir(parents=True, exist_ok=True)
                draw_training_images(cfg, args.count, args.seed).save(args.sheet)
                print(f"Training images, augmented: {args.sheet}", file=sys.stderr)
            else:
                print("No training set can be read: no sheet is drawn.", file=sys.stderr)
    except (OSError, ValueError) as error:
        print(f"check_dataset: {error}", file=sys.stderr)
        return 2
    return int(report["status"])
