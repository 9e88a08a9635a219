"""Where the encoder looks from chosen points, and the decoder for each object (DETR, figures 3 and 6).

For detectors that compare every token with every other these are attention weights, averaged over heads. Deformable
detectors (DINO) look at sampling points instead: those are drawn, larger and darker with more weight. The last layer
counts unless --layer says otherwise.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from torch import Tensor

from detr_family.analysis import command_line, style
from detr_family.analysis.attention_weights import CROSS, ENCODER, DenseCall, SamplingCall, watch, watch_outputs
from detr_family.analysis.loading import (
    Detections,
    Image,
    choose_image,
    detections,
    encoding_of,
    load_cfg,
    load_detector,
    names_of_classes,
    predict,
    title_of,
)
from detr_family.modeling.set_detector import SetDetector

_MOST_POINTS = 4


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """See the module."""
    parser.add_argument(
        "--point",
        dest="points",
        action="append",
        default=[],
        metavar="X,Y",
        help="where the encoder looks from, as shares of width and height; may be repeated; by default the middles of "
        "found objects",
    )
    parser.add_argument("--layer", type=int, default=-1, help="encoder and decoder layer, from 0; -1 the last")
    parser.add_argument("--score", type=float, default=0.5, help="objects that score at least this are drawn (0.5)")
    parser.add_argument("--objects", type=int, default=6, help="at most so many objects, the best ones (6)")
    command_line.add_output(parser)
    command_line.add_model(parser, one_image=True)


def run(args: argparse.Namespace) -> list[Path]:
    """See the module."""
    points = [_point(text) for text in args.points]
    cfg = load_cfg(args.config_file, args.opts)
    model = load_detector(cfg, args.untrained)
    image = choose_image(cfg, args.image, args.index)
    looks, found = looks_of(model, image, args.layer)
    shown = found.once_per_query().above(args.score, args.objects)
    points = points or [(float(x), float(y)) for x, y, _, _ in shown.boxes_cxcywh[:_MOST_POINTS]] or [(0.5, 0.5)]
    name, names = title_of(model), names_of_classes(cfg)
    if not len(shown) and len(found):
        print(f"nothing scores {args.score} or more, the best {float(found.scores[0]):.2g}: lower --score to see where")
    written = []
    if looks.encoder is not None:
        written += style.save_figure(draw_encoder(image, looks, points, name), args.output, "attention_encoder")
    else:
        print(f"{name} as configured has no encoder layer: only the decoder is drawn")
    written += style.save_figure(draw_decoder(image, looks, shown, names, name), args.output, "attention_decoder")
    numbers = {
        "picture": image.name,
        "size": list(image.image.shape[:2]),
        "detector": name,
        "encoder": [] if looks.encoder is None else [numbers_of(looks, looks.encoder, looks.token(p)) for p in points],
        "points": points,
        "decoder": [
            {
                "class": names[int(shown.classes[i])],
                "score": float(shown.scores[i]),
                "box_cxcywh": shown.boxes_cxcywh[i].tolist(),
                **numbers_of(looks, looks.cross, int(shown.queries[i])),
            }
            for i in range(len(shown))
        ],
    }
    return [*written, style.save_json(numbers, args.output, "attention")]


def _point(text: str) -> tuple[float, float]:
    try:
        x, y = (float(part) for part in text.split(","))
    except ValueError as error:
        raise ValueError(f"--point {text!r} is no x,y") from error
    if not (0 <= x <= 1 and 0 <= y <= 1):
        raise ValueError(f"--point {text!r} lies outside of the image: shares of width and height are in [0, 1]")
    return x, y


@dataclass
class Looks:
    """What one encoder and one decoder layer look at in one image.

    Attributes:
        encoder: the encoder's self-attention; None where there is no encoder.
        cross: the decoder's cross-attention.
        grids: (height, width) of each feature level in tokens, and how many pixels of the image a token stands for
            down and across.
    """

    encoder: DenseCall | SamplingCall | None
    cross: DenseCall | SamplingCall
    grids: list[tuple[int, int, float, float]]
    size: tuple[int, int]

    def token(self, point: tuple[float, float]) -> int:
        """The token of the finest level that lies under a point of the image (shares of width and height)."""
        height, width, down, across = self.grids[0]
        row = min(int(point[1] * self.size[0] / down), height - 1)
        column = min(int(point[0] * self.size[1] / across), width - 1)
        return row * width + column


def looks_of(model: SetDetector, image: Image, layer: int = -1) -> tuple[Looks, Detections]:
    """Predict one image and note where the model looks.

    Args:
        model: in evaluation mode.
        image: what to predict.
        layer: of encoder and decoder, from 0; negative counts from the end.

    Raises:
        ValueError: there is no such layer.
    """
    images = model.preprocess_image([image.inputs])
    height, width = images.tensor.shape[-2:]
    with watch(model, f"{ENCODER}|{CROSS}") as calls, watch_outputs(encoding_of(model)) as positions:
        prediction = predict(model, image)
    encoder = [call for call in calls if "encoder." in call.name]
    cross = [call for call in calls if "decoder." in call.name]
    for what, known in (("encoder", encoder), ("decoder", cross)):
        if known and not -len(known) <= layer < len(known):
            raise ValueError(f"--layer {layer}: the {what} has layers 0 to {len(known) - 1}")
    look = cross[layer]
    shapes = look.spatial_shapes if isinstance(look, SamplingCall) else [tuple(positions[0].shape[1:3])]
    grids = [(h, w, _pixels(height, h), _pixels(width, w)) for h, w in shapes]
    looks = Looks(encoder[layer] if encoder else None, look, grids, image.image.shape[:2])
    return looks, detections(model, prediction)


def _pixels(side: int, tokens: int) -> float:
    """Pixels that a token stands for: the stride, a power of two, where the side is no multiple of it."""
    return float(2 ** round(math.log2(side / tokens)))


def heat_map(looks: Looks, call: DenseCall, query: int) -> np.ndarray:
    """(h, w) attention weights of a query, averaged over heads."""
    height, width = looks.grids[0][:2]
    mean: Tensor = call.weights()[0, :, query].mean(0)
    return mean.view(height, width).cpu().numpy()


def sampling_points(looks: Looks, call: SamplingCall, query: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A query's sampling points: (n, 2) x and y in pixels, (n,) weights that sum to one over all heads, (n,) levels."""
    places = call.locations[0, query].float().cpu().numpy()  # M x L x P x 2, in shares of each level
    extent = np.array([[w * across, h * down] for h, w, down, across in looks.grids])  # L x 2
    weights = call.weights[0, query].float().cpu().numpy() / places.shape[0]
    levels = np.broadcast_to(np.arange(places.shape[1])[None, :, None], weights.shape)
    return (places * extent[:, None]).reshape(-1, 2), weights.reshape(-1), levels.reshape(-1)


def numbers_of(looks: Looks, call: DenseCall | SamplingCall, query: int) -> dict[str, Any]:
    """What the figures show of one query."""
    if isinstance(call, DenseCall):
        return {"query": query, "attention": heat_map(looks, call, query)}
    xy, weights, levels = sampling_points(looks, call, query)
    return {"query": query, "points_xy": xy, "weights": weights, "levels": levels}


def _lay_over(axes: Axes, looks: Looks, call: DenseCall | SamplingCall, query: int, colour: str) -> None:
    height, width = looks.size
    if isinstance(call, DenseCall):
        heat = heat_map(looks, call, query)
        rows, columns, down, across = looks.grids[0]
        extent = (0, columns * across, rows * down, 0)
        axes.imshow(heat, extent=extent, cmap=style.fade(colour), vmin=0, vmax=heat.max(), interpolation="nearest")
    else:
        xy, weights, levels = sampling_points(looks, call, query)
        for level in range(len(looks.grids)):
            chosen = levels == level
            strength = weights[chosen] / weights.max()
            axes.scatter(
                xy[chosen, 0],
                xy[chosen, 1],
                s=3 + 22 * strength,
                marker=style.MARKERS[level % len(style.MARKERS)],
                color=colour,
                alpha=0.25 + 0.75 * strength,
                edgecolors="white",
                linewidths=0.4,
            )
    axes.set_xlim(0, width)
    axes.set_ylim(height, 0)


def _level_legend(figure: Figure, looks: Looks, call: DenseCall | SamplingCall) -> None:
    if isinstance(call, SamplingCall):
        handles = [
            Line2D(
                [], [], linestyle="", color="black", marker=style.MARKERS[i % len(style.MARKERS)], label=f"{h} x {w}"
            )
            for i, (h, w, _, _) in enumerate(looks.grids)
        ]
        figure.legend(handles=handles, title="feature level", loc="outside lower center", ncols=5, frameon=False)


def draw_encoder(image: Image, looks: Looks, points: Sequence[tuple[float, float]], name: str) -> Figure:
    """The image with the points, and beside it what the encoder looks at from each."""
    assert looks.encoder is not None
    height, width = looks.size
    columns = len(points) + 1
    figure = style.new_figure(2.3 * columns, 2.2 * height / width + 0.9)
    grid = style.subplots(figure, 1, columns)[0]
    style.show_image(grid[0], image.image, "chosen points")
    for i, (x, y) in enumerate(points):
        colour = style.COLOURS[i % len(style.COLOURS)]
        for axes in (grid[0], grid[i + 1]):
            if axes is not grid[0]:
                style.show_image(axes, _pale(image.image), f"from point {i + 1}")
                _lay_over(axes, looks, looks.encoder, looks.token((x, y)), colour)
            axes.plot(x * width, y * height, "o", color=colour, markeredgecolor="white", markersize=8)
        grid[0].annotate(
            f"{i + 1}",
            (x * width, y * height),
            (5, 5),
            textcoords="offset points",
            color="white",
            bbox={"facecolor": colour, "edgecolor": "none", "pad": 1},
        )
    what = "self-attention" if isinstance(looks.encoder, DenseCall) else "sampling points"
    figure.suptitle(f"{name}, {looks.encoder.name}: {what}, all heads together", fontsize=9)
    _level_legend(figure, looks, looks.encoder)
    return figure


def draw_decoder(image: Image, looks: Looks, shown: Detections, class_names: Sequence[str], name: str) -> Figure:
    """One image for each object found, with its box and what its query looks at."""
    height, width = looks.size
    count = max(len(shown), 1)
    columns = min(count, 3)
    rows = math.ceil(count / columns)
    figure = style.new_figure(max(2.6 * columns, 4.6), rows * (2.4 * height / width + 0.25) + 0.7)
    grid = style.subplots(figure, rows, columns)
    boxes = image.in_pixels(shown.boxes_cxcywh)
    for i, axes in enumerate(grid.flat):
        if i >= len(shown):
            axes.set_visible(False)
            continue
        colour = style.COLOURS[i % len(style.COLOURS)]
        style.show_image(axes, _pale(image.image))
        _lay_over(axes, looks, looks.cross, int(shown.queries[i]), colour)
        style.draw_box(axes, boxes[i], colour)
        found = f"{class_names[int(shown.classes[i])]} {float(shown.scores[i]):.2f}"
        axes.set_title(f"{found}, query {int(shown.queries[i])}", color=colour)
    if not len(shown):
        grid[0, 0].set_visible(True)
        style.show_image(grid[0, 0], image.image, "no object scores enough: see --score")
    what = "cross-attention" if isinstance(looks.cross, DenseCall) else "sampling points"
    figure.suptitle(f"{name}, {looks.cross.name}: {what}, all heads together", fontsize=9)
    _level_legend(figure, looks, looks.cross)
    return figure


def _pale(image: np.ndarray) -> np.ndarray:
    """In grey and towards white, so that colours laid over it can be read."""
    grey = image.astype(np.float32).mean(-1, keepdims=True)
    return np.repeat(0.45 * grey + 0.55 * 255, 3, axis=-1).astype(np.uint8)
