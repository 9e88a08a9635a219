"""How often a detector finds the same object (DINO, section 3.3 and figure 8).

Each --model CONFIG WEIGHTS is a row of a table and bars of a figure, of two counts over DATASETS.TEST. Detections per
true object: 0 is a missed one, 2 or more are duplicates. And near-duplicates: detections which one of the same class
with a higher score overlaps by --near-iou, wherever they lie, divided by the number of true objects. Contrastive
denoising is to lower both.
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
from torch import Tensor
from torchvision.ops import box_iou
from tqdm import tqdm

from detr_family.analysis import command_line, style
from detr_family.analysis.loading import (
    dataset,
    detections,
    load_cfg,
    load_detector,
    map_image,
    predict,
    title_of,
)
from detr_family.data.dataset_mapper import DETRDatasetMapper
from detr_family.modeling.set_detector import SetDetector

_MOST = 3  # detections per object from which on they are counted together


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """See the module."""
    command_line.add_models(parser, "count what this one finds", required=True)
    parser.add_argument("--score", type=float, default=0.3, help="detections that score at least this count (0.3)")
    parser.add_argument("--iou", type=float, default=0.5, help="for an object that they overlap by this (0.5)")
    parser.add_argument("--near-iou", type=float, default=0.7, help="least overlap of a near-duplicate (0.7)")
    parser.add_argument("--limit", type=int, default=0, help="count over the first so many images")
    command_line.add_output(parser)
    command_line.add_opts(parser)


def run(args: argparse.Namespace) -> list[Path]:
    """See the module."""
    counts = []
    runs = names_of_runs([weights for _, weights in args.models])
    for run_name, (config, weights) in zip(runs, args.models, strict=True):
        cfg = load_cfg(config, [*args.opts, "MODEL.WEIGHTS", weights])
        model = load_detector(cfg)
        found = count(cfg, model, score=args.score, iou=args.iou, near_iou=args.near_iou, limit=args.limit)
        counts.append((f"{title_of(model)} ({run_name})", found))
    table = [row_of(name, found) for name, found in counts]
    columns = list(table[0])
    print(style.table(table, {key: key for key in columns}))
    written = style.save_figure(draw(counts, args.score, args.iou), args.output, "duplicates")
    return [*written, style.save_csv(table, columns, args.output, "duplicates")]


def names_of_runs(weights: Sequence[str]) -> list[str]:
    """The folders of checkpoints, with as many of the folders above as tell them apart; the file itself where all that
    is the same."""
    paths = [Path(file) for file in weights]
    for depth in range(1, max(len(path.parts) for path in paths)):
        names = ["/".join(path.parent.parts[-depth:]) or path.name for path in paths]
        if len(set(names)) == len(names):
            return names
    return list(weights)


@dataclass
class Counts:
    """What was counted over a dataset.

    Attributes:
        per_object: (objects,) detections of each true object.
        near_duplicates: in all images.
    """

    per_object: np.ndarray
    near_duplicates: int


def near_duplicates(boxes: Tensor, classes: Tensor, iou: float) -> int:
    """Detections of an image that one of the same class before them overlaps.

    Args:
        boxes: (k, 4) as corners, best first.
        classes: (k,).
        iou: the least overlap.
    """
    near = (box_iou(boxes, boxes) >= iou) & (classes[:, None] == classes)
    return int(near.tril(-1).any(1).sum())


def count(
    cfg: CfgNode, model: SetDetector, *, score: float, iou: float, near_iou: float = 0.7, limit: int = 0
) -> Counts:
    """Counts over DATASETS.TEST[0].

    A detection counts for the object of its class that it overlaps most, if it does so by `iou` and scores `score`.

    Args:
        cfg: with the dataset registered.
        model: in evaluation mode.
        score: least score of a detection.
        iou: least IoU with the object.
        near_iou: least IoU of a near-duplicate with a better detection.
        limit: only the first so many images; 0 for all.

    Raises:
        ValueError: there is no object.
    """
    mapper = DETRDatasetMapper(cfg, is_train=False)
    counts, near = [], 0
    for record in tqdm(dataset(cfg, limit), desc="images", disable=None):
        image = map_image(cfg, mapper, record)
        found = detections(model, predict(model, image)).above(score, model.topk)
        boxes = torch.as_tensor(image.in_pixels(found.boxes_cxcywh))
        near += near_duplicates(boxes, found.classes, near_iou)
        truth = torch.as_tensor(image.truth_xyxy, dtype=torch.float32).reshape(-1, 4)
        overlap = box_iou(boxes, truth)  # k x T
        overlap[found.classes[:, None] != image.truth.gt_classes] = 0
        of_image = np.zeros(len(truth), int)
        if len(truth) and len(found):
            best, which = overlap.max(1)
            np.add.at(of_image, which[best >= iou].numpy(), 1)
        counts.append(of_image)
    joined = np.concatenate(counts)
    if not len(joined):
        raise ValueError(f"{cfg.DATASETS.TEST[0]!r} has no object in the images looked at")
    return Counts(joined, near)


def row_of(name: str, counts: Counts) -> dict[str, Any]:
    """Shares of objects in percent, the mean number of detections of those found, and near-duplicates per object."""
    each = counts.per_object
    found = each[each > 0]
    return {
        "detector": name,
        "objects": len(each),
        "missed": float((each == 0).mean() * 100),
        "once": float((each == 1).mean() * 100),
        "twice or more": float((each > 1).mean() * 100),
        "detections per found object": float(found.mean()) if len(found) else None,
        "near-duplicates per object": counts.near_duplicates / len(each),
    }


def draw(counts: Sequence[tuple[str, Counts]], score: float, iou: float) -> Figure:
    """Bars side by side: the share of objects with 0, 1, 2, ... detections."""
    figure = style.new_figure(5.6, 3.6)
    axes = style.tidy(figure.subplots())
    width = 0.8 / len(counts)
    for number, (name, found) in enumerate(counts):
        each = found.per_object
        shares = [float((each == n).mean() * 100) for n in range(_MOST)] + [float((each >= _MOST).mean() * 100)]
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
