"""What denoising makes of an image's boxes (DINO, figure 3).

Each --config-file of a detector that learns to denoise is a row of drawings: the noised boxes of its first groups as
a training step would get them, a positive in full lines, a negative (contrastive denoising) dashed, a flipped label
named.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from detr_family.analysis import command_line, style
from detr_family.analysis.loading import (
    Image,
    choose_image,
    load_cfg,
    load_detector,
    names_of_classes,
    title_of,
)
from detr_family.modeling.denoising import DenoisingGroups
from detr_family.modeling.set_detector import SetDetector


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """See the module."""
    parser.add_argument(
        "--config-file",
        dest="configs",
        action="append",
        required=True,
        metavar="FILE",
        help="draw this one's denoising",
    )
    parser.add_argument("--groups", type=int, default=3, help="denoising groups to draw (3)")
    parser.add_argument("--noise-seed", type=int, default=0, help="of the noise (0)")
    parser.add_argument("--image", default="", metavar="FILE", help="an image; by default one of DATASETS.TEST")
    parser.add_argument("--index", type=int, default=-1, help="which image of DATASETS.TEST, from 0")
    command_line.add_output(parser)
    command_line.add_opts(parser)


def run(args: argparse.Namespace) -> list[Path]:
    """See the module."""
    if args.groups < 1:
        raise ValueError(f"--groups {args.groups} must be at least 1")
    rows, image = [], None
    names: list[str] = []
    for config in args.configs:
        cfg = load_cfg(config, args.opts)
        model = load_detector(cfg, untrained=True)  # the noise does not depend on weights
        image = image or choose_image(cfg, args.image, args.index, need_boxes=True)
        names = names or names_of_classes(cfg)
        rows.append((title_of(model), noised(model, image, args.noise_seed)))
    assert image is not None
    written = style.save_figure(draw(image, rows, names, args.groups), args.output, "denoising")
    return [*written, style.save_json(numbers_of(image, rows, names), args.output, "denoising")]


@dataclass
class NoisedBox:
    """One denoising query of an image.

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


def noised(model: SetDetector, image: Image, seed: int) -> list[NoisedBox]:
    """The denoising queries that a training step would get of this image alone.

    Args:
        model: DN-DETR, DINO, or another with `make_groups(targets)` and `generator`.
        image: with boxes.
        seed: of the noise.

    Raises:
        ValueError: a detector without denoising, or one where it is switched off.
    """
    detector: Any = model
    if not hasattr(detector, "make_groups"):
        raise ValueError(f"{title_of(model)} learns no denoising: give a configuration of DN-DETR or DINO")
    device = model.device
    detector.generator = torch.Generator(device).manual_seed(seed)
    groups: DenoisingGroups | None = detector.make_groups(image.targets(device))
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


def numbers_of(image: Image, rows: Sequence[tuple[str, list[NoisedBox]]], names: Sequence[str]) -> dict[str, Any]:
    """What the drawing shows, of all groups."""
    return {
        "picture": image.name,
        "truth": [
            {"class": names[label], "box_xyxy": box}
            for label, box in zip(image.truth.gt_classes.tolist(), image.truth_xyxy, strict=True)
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


def draw(image: Image, rows: Sequence[tuple[str, list[NoisedBox]]], names: Sequence[str], num_groups: int) -> Figure:
    """A row for each detector: the ground truth, then its groups."""
    most = max(x.group for _, boxes in rows for x in boxes) + 1
    columns = 1 + min(num_groups, most)
    height, width = image.image.shape[:2]
    figure = style.new_figure(2.7 * columns, 2.75 * height / width * len(rows) + 0.75)
    grid = style.subplots(figure, len(rows), columns)
    truth, labels = image.truth_xyxy, image.truth.gt_classes.tolist()
    palette = style.COLOURS[:-1]
    for row, (name, boxes) in zip(grid, rows, strict=True):
        for group, axes in enumerate(row, start=-1):
            style.show_image(axes, image.image, "ground truth" if group < 0 else f"group {group + 1}")
            for i, box in enumerate(truth if group < 0 else []):
                style.draw_box(axes, box, palette[i % len(palette)])
                style.label_box(axes, box, names[labels[i]], palette[i % len(palette)])
            for x in (x for x in boxes if x.group == group):
                colour = palette[x.box % len(palette)]
                xyxy = image.in_pixels(torch.as_tensor(x.box_cxcywh))
                style.draw_box(axes, xyxy, colour, "-" if x.positive else (0, (3, 2)), 1.8 if x.positive else 1.2)
                if x.label != labels[x.box]:
                    style.label_box(axes, xyxy, f"as {names[x.label]}", colour, 6.5)
        row[0].set_ylabel(name)
    handles = [Line2D([], [], color="black", label="positive: to be restored")]
    if any(not x.positive for _, boxes in rows for x in boxes):
        handles.append(Line2D([], [], color="black", linestyle="--", label="negative: to be rejected"))
    figure.legend(handles=handles, loc="outside lower center", ncols=2, frameon=False)
    figure.suptitle("Denoising queries of one image; a label is drawn where it was flipped", fontsize=9)
    return figure
