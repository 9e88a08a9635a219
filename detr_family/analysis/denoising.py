"""What denoising makes of a picture's boxes, and how often objects are found twice (DINO, figures 3 and 8).

Each --config-file of a detector that learns to denoise adds a row of drawings: the noised boxes of its first groups as
a training step would get them, a positive in full lines, a negative (contrastive denoising) dashed, a flipped label
named. Each --model CONFIG WEIGHTS adds bars to the second figure: how many detections each true object of DATASETS.TEST
has, 0 being missed and 2 or more duplicates.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from torchvision.ops import box_iou
from tqdm import tqdm

from detr_family.analysis import command_line, style
from detr_family.analysis.loading import (
    Picture,
    choose_picture,
    data_set,
    detections,
    load_cfg,
    load_detector,
    map_picture,
    names_of_classes,
    predict,
    title_of,
)
from detr_family.dataset_mapper import DETRDatasetMapper
from detr_family.denoising import DenoisingGroups
from detr_family.set_detector import SetDetector

_MOST = 3  # detections per object from which on they are counted together


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """See the module."""
    parser.add_argument(
        "--config-file", dest="configs", action="append", default=[], metavar="FILE", help="draw this one's denoising"
    )
    parser.add_argument(
        "--model",
        dest="models",
        nargs=2,
        action="append",
        default=[],
        metavar=("CONFIG", "WEIGHTS"),
        help="count the detections per object of this one",
    )
    parser.add_argument("--groups", type=int, default=3, help="denoising groups to draw (3)")
    parser.add_argument("--noise-seed", type=int, default=0, help="of the noise (0)")
    parser.add_argument("--score", type=float, default=0.3, help="detections that score at least this count (0.3)")
    parser.add_argument("--iou", type=float, default=0.5, help="and overlap an object of their class by this (0.5)")
    parser.add_argument("--limit", type=int, default=0, help="count over the first so many pictures")
    parser.add_argument("--image", default="", metavar="FILE", help="a picture; by default one of DATASETS.TEST")
    parser.add_argument("--index", type=int, default=-1, help="which picture of DATASETS.TEST, from 0")
    command_line.add_output(parser)
    command_line.add_opts(parser)


def run(args: argparse.Namespace) -> list[Path]:
    """See the module."""
    if not args.configs and not args.models:
        raise ValueError("give --config-file to draw denoising, or --model CONFIG WEIGHTS to count duplicates")
    if args.groups < 1:
        raise ValueError(f"--groups {args.groups} must be at least 1")
    written: list[Path] = []
    if args.configs:
        rows, picture = [], None
        names: list[str] = []
        for config in args.configs:
            cfg = load_cfg(config, args.opts)
            model = load_detector(cfg, untrained=True)  # the noise does not depend on weights
            picture = picture or choose_picture(cfg, args.image, args.index, need_boxes=True)
            names = names or names_of_classes(cfg)
            rows.append((title_of(model), noised(model, picture, args.noise_seed)))
        assert picture is not None
        written += style.save_figure(draw(picture, rows, names, args.groups), args.output, "denoising")
        written.append(style.save_json(numbers_of(picture, rows, names), args.output, "denoising"))
    if args.models:
        counts = []
        for config, weights in args.models:
            cfg = load_cfg(config, [*args.opts, "MODEL.WEIGHTS", weights])
            model = load_detector(cfg)
            found = per_object(cfg, model, score=args.score, iou=args.iou, limit=args.limit)
            counts.append((f"{title_of(model)} ({Path(weights).parent.name or weights})", found))
        table = [duplicates_row(name, found) for name, found in counts]
        columns = ("detector", "objects", "missed", "once", "twice or more", "detections per found object")
        print(style.table(table, {key: key for key in columns}))
        written += style.save_figure(draw_duplicates(counts, args.score, args.iou), args.output, "duplicates")
        written.append(style.save_csv(table, columns, args.output, "duplicates"))
    return written


@dataclass
class NoisedBox:
    """One denoising query of a picture.

    Attributes:
        group: which group it is in.
        box: the true box that it comes from.
        positive: whether the decoder is to restore it; else it is to reject it.
        label: its class, possibly flipped.
        box_cxcywh: (4,) in [0, 1].
    """

    group: int
    box: int
    positive: bool
    label: int
    box_cxcywh: np.ndarray


def noised(model: SetDetector, picture: Picture, seed: int) -> list[NoisedBox]:
    """The denoising queries that a training step would get of this picture alone.

    Args:
        model: DN-DETR, DINO, or another with `make_groups(targets)` and `generator`.
        picture: with boxes.
        seed: of the noise.

    Raises:
        ValueError: a detector without denoising, or one where it is switched off.
    """
    detector: Any = model
    if not hasattr(detector, "make_groups"):
        raise ValueError(f"{title_of(model)} learns no denoising: give a configuration of DN-DETR or DINO")
    device = model.device
    detector.generator = torch.Generator(device).manual_seed(seed)
    groups: DenoisingGroups | None = detector.make_groups(picture.targets(device))
    if groups is None:
        raise ValueError(f"{title_of(model)} as configured has its denoising switched off")
    known = dict(zip(groups.known.query[0].tolist(), groups.known.target[0].tolist(), strict=True))
    size = len(groups) // groups.num_groups
    boxes = groups.anchors[0].sigmoid().cpu().numpy()
    result = []
    for query in torch.nonzero(~groups.padding[0])[:, 0].tolist():
        positive = query in known
        box = known[query if positive else query - size // 2]  # a group's negatives stand behind its positives
        result.append(NoisedBox(query // size, box, positive, int(groups.labels[0, query]), boxes[query]))
    return result


def numbers_of(picture: Picture, rows: Sequence[tuple[str, list[NoisedBox]]], names: Sequence[str]) -> dict[str, Any]:
    """What the drawing shows, of all groups."""
    return {
        "picture": picture.name,
        "truth": [
            {"class": names[label], "box_xyxy": box}
            for label, box in zip(picture.truth.gt_classes.tolist(), picture.truth_xyxy, strict=True)
        ],
        "detectors": [
            {
                "detector": name,
                "queries": [
                    {
                        "group": x.group,
                        "box": x.box,
                        "positive": x.positive,
                        "class": names[x.label],
                        "box_cxcywh": x.box_cxcywh,
                    }
                    for x in boxes
                ],
            }
            for name, boxes in rows
        ],
    }


def draw(
    picture: Picture, rows: Sequence[tuple[str, list[NoisedBox]]], names: Sequence[str], num_groups: int
) -> Figure:
    """A row for each detector: the truth, then its groups."""
    most = max(x.group for _, boxes in rows for x in boxes) + 1
    columns = 1 + min(num_groups, most)
    height, width = picture.image.shape[:2]
    figure = style.new_figure(2.7 * columns, 2.75 * height / width * len(rows) + 0.75)
    grid = style.subplots(figure, len(rows), columns)
    truth, labels = picture.truth_xyxy, picture.truth.gt_classes.tolist()
    palette = style.COLOURS[:-1]
    for row, (name, boxes) in zip(grid, rows, strict=True):
        for group, axes in enumerate(row, start=-1):
            style.show_picture(axes, picture.image, "truth" if group < 0 else f"group {group + 1}")
            for i, box in enumerate(truth if group < 0 else []):
                style.draw_box(axes, box, palette[i % len(palette)])
                style.label_box(axes, box, names[labels[i]], palette[i % len(palette)])
            for x in (x for x in boxes if x.group == group):
                colour = palette[x.box % len(palette)]
                xyxy = picture.in_pixels(torch.as_tensor(x.box_cxcywh))
                style.draw_box(axes, xyxy, colour, "-" if x.positive else (0, (3, 2)), 1.8 if x.positive else 1.2)
                if x.label != labels[x.box]:
                    style.label_box(axes, xyxy, f"as {names[x.label]}", colour, 6.5)
        row[0].set_ylabel(name)
    handles = [Line2D([], [], color="black", label="positive: to be restored")]
    if any(not x.positive for _, boxes in rows for x in boxes):
        handles.append(Line2D([], [], color="black", linestyle="--", label="negative: to be rejected"))
    figure.legend(handles=handles, loc="outside lower center", ncols=2, frameon=False)
    figure.suptitle("Denoising queries of one picture; a label is drawn where it was flipped", fontsize=9)
    return figure


def per_object(cfg: CfgNode, model: SetDetector, *, score: float, iou: float, limit: int = 0) -> np.ndarray:
    """How many detections each true object of DATASETS.TEST[0] has.

    A detection counts for the object of its class that it overlaps most, if it does so by `iou` and scores `score`.

    Args:
        cfg: with the data set registered.
        model: in evaluation mode.
        score: least score of a detection.
        iou: least IoU with the object.
        limit: only the first so many pictures; 0 for all.

    Returns:
        (objects,) counts.

    Raises:
        ValueError: there is no object.
    """
    mapper = DETRDatasetMapper(cfg, is_train=False)
    counts = []
    for record in tqdm(data_set(cfg, limit), desc="pictures", disable=None):
        picture = map_picture(cfg, mapper, record)
        found = detections(model, predict(model, picture)).above(score, model.topk)
        truth = torch.as_tensor(picture.truth_xyxy, dtype=torch.float32).reshape(-1, 4)
        overlap = box_iou(torch.as_tensor(picture.in_pixels(found.boxes_cxcywh)), truth)  # k x T
        overlap[found.classes[:, None] != picture.truth.gt_classes] = 0
        count = np.zeros(len(truth), int)
        if len(truth) and len(found):
            best, which = overlap.max(1)
            np.add.at(count, which[best >= iou].numpy(), 1)
        counts.append(count)
    joined = np.concatenate(counts)
    if not len(joined):
        raise ValueError(f"{cfg.DATASETS.TEST[0]!r} has no object in the pictures looked at")
    return joined


def duplicates_row(name: str, counts: np.ndarray) -> dict[str, Any]:
    """Shares of objects in percent, and the mean number of detections of those found."""
    found = counts[counts > 0]
    return {
        "detector": name,
        "objects": len(counts),
        "missed": float((counts == 0).mean() * 100),
        "once": float((counts == 1).mean() * 100),
        "twice or more": float((counts > 1).mean() * 100),
        "detections per found object": float(found.mean()) if len(found) else None,
    }


def draw_duplicates(counts: Sequence[tuple[str, np.ndarray]], score: float, iou: float) -> Figure:
    """Bars side by side: the share of objects with 0, 1, 2, ... detections."""
    figure = style.new_figure(5.6, 3.6)
    axes = style.tidy(figure.subplots())
    width = 0.8 / len(counts)
    for number, (name, count) in enumerate(counts):
        shares = [float((count == n).mean() * 100) for n in range(_MOST)] + [float((count >= _MOST).mean() * 100)]
        places = np.arange(_MOST + 1) + (number - (len(counts) - 1) / 2) * width
        bars = axes.bar(
            places,
            shares,
            width,
            color=style.COLOURS[number % len(style.COLOURS)],
            hatch=("", "//", "..", "xx")[number % 4],
            edgecolor="white",
            label=name,
        )
        axes.bar_label(bars, fmt="%.0f", fontsize=7.5)
    axes.set_xticks(range(_MOST + 1), ["0 (missed)", *(str(n) for n in range(1, _MOST)), f"{_MOST} or more"])
    axes.set_xlabel(f"detections per object (score at least {score:g}, IoU at least {iou:g}, same class)")
    axes.set_ylabel("objects (%)")
    axes.legend(frameon=False)
    return figure
