"""A bipartite matching worked through on one image, and how unstable matching is over epochs (DN-DETR, figure 2).

With --config-file: the costs of every true box against the queries, in their weighted parts (class, L1, GIoU), the
assignment of least total cost (DETR, section 3.1), and image and boxes with it. With --run: the instability IS of one
or more runs against the epoch, from the `matching_instability` of their metrics.json.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure

from detr_family.analysis import command_line, style
from detr_family.analysis.curves import add_runs, draw_curves, read_runs
from detr_family.analysis.loading import (
    Image,
    choose_image,
    load_cfg,
    load_detector,
    names_of_classes,
    predict,
    title_of,
)
from detr_family.modeling.matcher import HungarianMatcher
from detr_family.modeling.set_detector import SetDetector
from detr_family.modeling.structures import SetPrediction, Targets

KEY = "matching_instability"
_MOST_QUERIES = 24
_MOST_BOXES = 12


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """See the module."""
    parser.add_argument("--config-file", default="", metavar="FILE", help="configuration of the detector")
    parser.add_argument(
        "--untrained", action="store_true", help="weights as they are initialised from SEED, in place of MODEL.WEIGHTS"
    )
    parser.add_argument("--image", default="", metavar="FILE", help="an image; by default one of DATASETS.TEST")
    parser.add_argument("--index", type=int, default=-1, help="which image of DATASETS.TEST, from 0")
    add_runs(parser, required=False)
    command_line.add_output(parser)
    command_line.add_opts(parser)


def run(args: argparse.Namespace) -> list[Path]:
    """See the module."""
    if not args.config_file and not args.run_folders:
        raise ValueError("give --config-file for the matching of an image, or --run LABEL FOLDER for instability")
    written: list[Path] = []
    if args.config_file:
        cfg = load_cfg(args.config_file, args.opts)
        model = load_detector(cfg, args.untrained)
        image = choose_image(cfg, args.image, args.index, need_boxes=True)
        matching = match(model, image)
        names = names_of_classes(cfg)
        written += style.save_figure(draw(image, matching, names, title_of(model)), args.output, "matching")
        written.append(style.save_json(numbers_of(image, matching, names), args.output, "matching"))
    if args.run_folders:
        runs = read_runs(args.run_folders, KEY, args.iterations_per_epoch)
        figure = draw_curves(runs, "instability IS (changed queries per image)", "How unstable matching is")
        written += style.save_figure(figure, args.output, "instability")
        rows = [{"run": r.label, "epoch": x, "iteration": i, "IS": y} for r in runs for i, x, y in r.points]
        written.append(style.save_csv(rows, ("run", "epoch", "iteration", "IS"), args.output, "instability"))
    return written


@dataclass
class Matching:
    """One image's matching of the last decoder layer.

    Attributes:
        parts: name -> (T, Q) weighted costs, which add up to `total`.
        total: (T, Q).
        query: (T,) the query of each true box; -1 where there are more boxes than queries.
        labels: (T,) classes.
        boxes_cxcywh: (Q, 4) predicted boxes.
    """

    parts: dict[str, np.ndarray]
    total: np.ndarray
    query: np.ndarray
    labels: np.ndarray
    prediction: SetPrediction


def match(model: SetDetector, image: Image) -> Matching:
    """Match what the last decoder layer predicts for an image with its true boxes."""
    prediction = predict(model, image).layers(-1)
    targets = image.targets(prediction.logits.device)
    assignment = model.matcher(prediction, targets)
    query = np.full(len(targets), -1)
    query[assignment.target[0].cpu().numpy()] = assignment.query[0].cpu().numpy()
    return Matching(
        parts=cost_parts(model.matcher, prediction, targets),
        total=model.matcher.cost(prediction, targets)[0].cpu().numpy(),
        query=query,
        labels=targets.labels.cpu().numpy(),
        prediction=prediction,
    )


@torch.no_grad()
def cost_parts(matcher: HungarianMatcher, prediction: SetPrediction, targets: Targets) -> dict[str, np.ndarray]:
    """The weighted terms of the matching cost (DETR, equation 1), (T, Q) each: "class", "L1" and "GIoU".

    Each is the whole cost of a matcher whose other weights are zero; a weight of zero gives zeros.
    """
    weights = {"class": matcher.cost_class, "L1": matcher.cost_l1, "GIoU": matcher.cost_giou}
    parts = {}
    for name, weight in weights.items():
        alone = {key: (weight if key == name else 0.0) for key in weights}
        if weight == 0:
            parts[name] = np.zeros((len(targets), prediction.logits.shape[1]), np.float32)
            continue
        single = HungarianMatcher(
            class_cost=matcher.class_cost, cost_class=alone["class"], cost_l1=alone["L1"], cost_giou=alone["GIoU"]
        )
        parts[name] = single.cost(prediction, targets)[0].cpu().numpy()
    return parts


def shown_queries(matching: Matching) -> np.ndarray:
    """The queries worth a column: those assigned, then those with the least cost for any box; ascending."""
    assigned = matching.query[matching.query >= 0][:_MOST_BOXES]
    best = np.argsort(matching.total.min(0), kind="stable")
    others = best[~np.isin(best, assigned)]
    return np.sort(np.concatenate([assigned, others[: max(_MOST_QUERIES - len(assigned), 0)]])).astype(int)


def draw(image: Image, matching: Matching, class_names: list[str], name: str) -> Figure:
    """The image with true boxes and those assigned to them, and the cost matrices with the assignment marked."""
    columns, count = shown_queries(matching), min(len(matching.query), _MOST_BOXES)
    rows = [f"{i}: {class_names[matching.labels[i]]}" for i in range(count)]
    figure = style.new_figure(11.0, 5.6)
    left, right = np.ravel(np.asarray(figure.subfigures(1, 2, width_ratios=[1, 1.75])))
    axes = left.subplots()
    style.show_image(axes, image.image, f"{image.name}: ground truth (full) and assigned boxes (dashed)")
    truth, predicted = image.truth_xyxy, image.in_pixels(matching.prediction.boxes[0])
    for i in range(count):
        colour = style.COLOURS[i % (len(style.COLOURS) - 1)]
        style.draw_box(axes, truth[i], colour)
        if matching.query[i] >= 0:
            box = predicted[matching.query[i]]
            style.draw_box(axes, box, colour, "--", 1.4)
            middle, other = (truth[i][:2] + truth[i][2:]) / 2, (box[:2] + box[2:]) / 2
            axes.plot(
                [middle[0], other[0]], [middle[1], other[1]], color=colour, linewidth=1.2, marker=".", clip_on=True
            )
        style.label_box(axes, truth[i], f"{i}: {class_names[matching.labels[i]]}", colour)
    hidden = len(matching.query) - count
    axes.set_xlabel(f"{hidden} more boxes are not drawn" if hidden else "")
    grid = right.subplots(4, 1, sharex=True)
    for axes, (title, cost) in zip(grid, [("sum", matching.total), *matching.parts.items()], strict=True):
        drawn = axes.imshow(cost[:count][:, columns], cmap=style.HEAT, aspect="auto", interpolation="nearest")
        figure.colorbar(drawn, ax=axes, pad=0.01)
        axes.set_ylabel(title)
        axes.set_yticks(range(count), rows if count <= 8 else [str(i) for i in range(count)], fontsize=7)
        for i in range(count):
            place = np.flatnonzero(columns == matching.query[i])
            if len(place):
                axes.plot(
                    place[0], i, "o", markerfacecolor="none", markeredgecolor="white", markersize=9, markeredgewidth=3
                )
                axes.plot(place[0], i, "o", markerfacecolor="none", markeredgecolor=style.COLOURS[1], markersize=9)
    grid[-1].set_xticks(range(len(columns)), [str(q) for q in columns], fontsize=7, rotation=90)
    total = matching.prediction.logits.shape[1]
    grid[-1].set_xlabel(f"query ({len(columns)} of {total}: assigned ones and the cheapest others)")
    grid[0].set_title(f"{name}: weighted cost of each true box (row) and query; circles are the assignment")
    return figure


def numbers_of(image: Image, matching: Matching, class_names: list[str]) -> dict[str, Any]:
    """The matching in full, of all queries."""
    assigned = matching.query >= 0
    return {
        "picture": image.name,
        "boxes": [
            {"box": i, "class": class_names[label], "query": int(matching.query[i]) if assigned[i] else None}
            for i, label in enumerate(matching.labels)
        ],
        "total_cost": float(matching.total[assigned, matching.query[assigned]].sum()),
        "cost": matching.total,
        "parts": matching.parts,
        "predicted_boxes_cxcywh": matching.prediction.boxes[0].float().cpu().numpy(),
    }
