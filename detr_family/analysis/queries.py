"""Every query slot's boxes over a dataset, as points in the unit square (DETR, figure 7), and the learned anchors.

Each point is the centre of one predicted box, coloured by its shape as the paper does: small, large and wide, large and
tall. Where the detector has learned places of its own (Conditional DETR's reference points, the anchors of DAB-DETR and
DN-DETR) they are drawn too.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import numpy as np
import torch
from detectron2.config import CfgNode
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from torch import Tensor, nn
from tqdm import tqdm

from detr_family.analysis import command_line, style
from detr_family.analysis.loading import dataset, load_cfg, load_detector, map_image, predict, title_of
from detr_family.data.dataset_mapper import DETRDatasetMapper
from detr_family.modeling.conditional_detr import ConditionalDETR
from detr_family.modeling.dab_detr import DABDETR
from detr_family.modeling.dn_detr import DNDETR
from detr_family.modeling.set_detector import SetDetector

SHAPES = {"small": style.COLOURS[2], "large, wide": style.COLOURS[1], "large, tall": style.COLOURS[0]}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """See the module."""
    parser.add_argument("--slots", type=int, default=20, help="query slots to draw, those that score best (20)")
    parser.add_argument("--limit", type=int, default=0, help="only the first so many images")
    parser.add_argument(
        "--small", type=float, default=0.01, metavar="SHARE", help="boxes below this share of the image are small"
    )
    command_line.add_output(parser)
    command_line.add_model(parser)


def run(args: argparse.Namespace) -> list[Path]:
    """See the module."""
    cfg = load_cfg(args.config_file, args.opts)
    model = load_detector(cfg, args.untrained)
    boxes, scores, aspect = slot_boxes(cfg, model, limit=args.limit)
    slots = np.argsort(-scores.mean(0), kind="stable")[: max(args.slots, 1)]
    shapes = shape_of(boxes, aspect[:, None], args.small)
    name = title_of(model)
    rows = [
        {
            "slot": slot,
            "picture": image,
            **dict(zip(("x", "y", "w", "h"), map(float, boxes[image, slot]), strict=True)),
            "score": float(scores[image, slot]),
            "shape": shapes[image, slot],
        }
        for slot in slots.tolist()
        for image in range(len(boxes))
    ]
    written = style.save_figure(draw(boxes, shapes, slots, name), args.output, "queries")
    columns = ("slot", "picture", "x", "y", "w", "h", "score", "shape")
    written.append(style.save_csv(rows, columns, args.output, "queries"))
    places = learned_places(model)
    if places is None:
        print(f"{name} has no learned places: its queries are vectors, or its anchors come from the encoder")
        return written
    written += style.save_figure(draw_places(places.numpy(), name, args.small), args.output, "anchors")
    keys = ("x", "y", "w", "h")[: places.shape[1]]
    anchors = [{"query": i, **dict(zip(keys, p, strict=True))} for i, p in enumerate(places.tolist())]
    written.append(style.save_csv(anchors, ("query", *keys), args.output, "anchors"))
    return written


def slot_boxes(cfg: CfgNode, model: SetDetector, *, limit: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What every slot of the last decoder layer predicts over DATASETS.TEST[0].

    Returns:
        Boxes (images, Q, 4) as cxcywh in [0, 1], the best class's probability (images, Q), and the images'
        width divided by their height (images,).
    """
    mapper = DETRDatasetMapper(cfg, is_train=False)
    boxes, scores, aspect = [], [], []
    for record in tqdm(dataset(cfg, limit), desc="images", disable=None):
        image = map_image(cfg, mapper, record)
        prediction = predict(model, image)
        logits = prediction.logits[0].float().cpu()
        # A classifier with a row for no-object is a softmax over it, the others are sigmoids.
        softmax = logits.shape[-1] > model.num_classes
        scores.append((logits.softmax(-1)[:, :-1] if softmax else logits.sigmoid()).max(-1).values.numpy())
        boxes.append(prediction.boxes[0].float().cpu().numpy())
        aspect.append(image.image.shape[1] / image.image.shape[0])
    return np.stack(boxes), np.stack(scores), np.array(aspect)


def shape_of(boxes_cxcywh: np.ndarray, aspect: np.ndarray | float, small: float) -> np.ndarray:
    """The name in SHAPES of each box.

    Args:
        boxes_cxcywh: (..., 4) in [0, 1].
        aspect: the image's width divided by its height; broadcasts against the boxes.
        small: the share of the image's area below which a box is small.
    """
    width, height = boxes_cxcywh[..., 2], boxes_cxcywh[..., 3]
    wide = np.where(width * aspect >= height, "large, wide", "large, tall")
    return np.where(width * height < small, "small", wide)


@torch.no_grad()
def learned_places(model: SetDetector) -> Tensor | None:
    """(Q, 2) reference points or (Q, 4) anchors in [0, 1] that the detector has learned; None where it has none."""
    if isinstance(model, ConditionalDETR):
        places: Tensor = model.transformer.decoder.ref_point_head(model.query_embed.weight).sigmoid()
        return places.cpu()
    if isinstance(model, (DABDETR, DNDETR)):
        return model.anchors().sigmoid().cpu()
    for name, module in model.named_modules():  # those on a deformable transformer
        if name.endswith("refpoint_embed") and isinstance(module, nn.Embedding):
            return module.weight.sigmoid().cpu()
    return None


def draw(boxes: np.ndarray, shapes: np.ndarray, slots: np.ndarray, name: str) -> Figure:
    """One unit square for each slot."""
    columns = min(len(slots), 5)
    rows = math.ceil(len(slots) / columns)
    figure = style.new_figure(1.55 * columns + 0.4, 1.6 * rows + 0.9)
    grid = style.subplots(figure, rows, columns)
    size = float(np.clip(1500 / len(boxes), 1.5, 14))
    for axes, slot in zip(grid.flat, slots.tolist(), strict=False):
        for shape, colour in SHAPES.items():
            chosen = boxes[shapes[:, slot] == shape, slot]
            axes.scatter(chosen[:, 0], chosen[:, 1], s=size, color=colour, alpha=0.7, linewidths=0)
        _unit_square(axes)
        axes.set_title(f"slot {slot}", fontsize=8)
    for axes in grid.flat[len(slots) :]:
        axes.set_visible(False)
    figure.suptitle(f"{name}: centres of the boxes of {len(slots)} slots over {len(boxes)} images", fontsize=9.5)
    legend = "each square is the image, x to the right and y downwards, whatever its shape"
    handles = [Line2D([], [], marker="o", linestyle="", color=c, label=s) for s, c in SHAPES.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=3, frameon=False, title=legend)
    return figure


def draw_places(places: np.ndarray, name: str, small: float) -> Figure:
    """The learned points, or anchors with their centres coloured by shape and the boxes around some of them."""
    figure = style.new_figure(4.2, 4.3)
    axes = figure.subplots()
    if places.shape[1] == 2:
        axes.scatter(places[:, 0], places[:, 1], s=14, color=style.COLOURS[0], label="reference point")
        title = f"{name}: {len(places)} learned reference points"
    else:
        shapes = shape_of(places, 1.0, small)
        for shape, colour in SHAPES.items():
            chosen = places[shapes == shape]
            for x, y, w, h in chosen[:: max(1, len(places) // 60)]:
                axes.plot(
                    [x - w / 2, x + w / 2, x + w / 2, x - w / 2, x - w / 2],
                    [y - h / 2, y - h / 2, y + h / 2, y + h / 2, y - h / 2],
                    color=colour,
                    alpha=0.2,
                    linewidth=0.8,
                )
            axes.scatter(chosen[:, 0], chosen[:, 1], s=14, color=colour, label=f"{shape}: {len(chosen)}")
        title = f"{name}: {len(places)} learned anchors, before the first layer"
    _unit_square(axes)
    axes.set_xticks([0, 0.5, 1])
    axes.set_yticks([0, 0.5, 1])
    axes.set_xlabel("x / width of the image")
    axes.set_ylabel("y / height of the image")
    axes.set_title(title)
    figure.legend(loc="outside lower center", ncols=3, frameon=False)
    return figure


def _unit_square(axes: Axes) -> None:
    axes.set_xlim(0, 1)
    axes.set_ylim(1, 0)
    axes.set_aspect("equal")
    axes.set_xticks([])
    axes.set_yticks([])
