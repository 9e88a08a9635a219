"""Positional attention maps: of models side by side, by width and height, by temperature (DAB-DETR, figures 4, 6, 7).

Without --model the two figures that need no training are drawn, from the encodings' formulas: how width and height
modulate the map (equation 6), and how the temperature sharpens it (section 4.5). Each --model CONFIG WEIGHTS adds a
detector to figure 4: what its decoder's queries look at by position alone. A detector with deformable attention has no
such maps; its sampling points are drawn by the command `attention`.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from detr_family.analysis import command_line, style
from detr_family.analysis.attention_weights import CROSS, DenseCall, SamplingCall, watch, watch_outputs
from detr_family.analysis.loading import (
    Image,
    choose_image,
    encoding_of,
    load_cfg,
    load_detector,
    predict,
    title_of,
)
from detr_family.layers.position_encoding import SinePositionEncoding, sine_of_coordinates
from detr_family.modeling.detr import DETR
from detr_family.modeling.set_detector import SetDetector

UNTRAINED = "untrained"
TEMPERATURES = (1.0, 2.0, 5.0, 10.0, 20.0, 100.0, 1000.0, 10000.0)
SIZES = ((0.2, 0.2), (0.2, 0.5), (0.5, 0.2), (0.4, 0.4))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """See the module."""
    command_line.add_models(
        parser,
        f"a detector for figure 4; the word {UNTRAINED!r} in place of a file leaves the weights as initialised",
        required=False,
    )
    parser.add_argument("--layer", type=int, default=-1, help="decoder layer, from 0; -1 the last")
    parser.add_argument("--queries", type=int, default=4, help="maps for each detector (4)")
    parser.add_argument(
        "--temperatures",
        type=command_line.numbers,
        default=list(TEMPERATURES),
        metavar="T,T",
        help="of figure 7: 1,20,10000",
    )
    parser.add_argument("--image", default="", metavar="FILE", help="an image; by default one of DATASETS.TEST")
    parser.add_argument("--index", type=int, default=-1, help="which image of DATASETS.TEST, from 0")
    command_line.add_output(parser)
    command_line.add_opts(parser)


def run(args: argparse.Namespace) -> list[Path]:
    """See the module."""
    if min(args.temperatures) <= 0:
        raise ValueError(f"--temperatures {args.temperatures}: a temperature must be positive")
    if args.queries < 1:
        raise ValueError(f"--queries {args.queries} must be at least 1")
    by_temperature = {t: analytic_map((0.5, 0.5), temperature=t) for t in args.temperatures}
    by_size = {size: analytic_map((0.5, 0.5), size=size) for size in SIZES}
    written = style.save_figure(draw_temperatures(by_temperature), args.output, "positional_temperature")
    written += style.save_figure(draw_sizes(by_size), args.output, "positional_size")
    numbers = {
        "temperature": [{"temperature": t, "map": x} for t, x in by_temperature.items()],
        "size": [{"width": w, "height": h, "map": x} for (w, h), x in by_size.items()],
    }
    written.append(style.save_json(numbers, args.output, "positional"))
    if args.models:
        maps = []
        for config, weights in args.models:
            untrained = weights == UNTRAINED
            cfg = load_cfg(config, [*args.opts, *([] if untrained else ["MODEL.WEIGHTS", weights])])
            model = load_detector(cfg, untrained)
            image = choose_image(cfg, args.image, args.index)
            title = title_of(model) + (f" ({UNTRAINED})" if untrained else "")
            maps.append((title, model_maps(model, image, args.layer)))
        chosen = similar_queries([m for _, m in maps], args.queries)
        written += style.save_figure(draw_models(maps, chosen), args.output, "positional_models")
        listing = [
            {"detector": name, "queries": queries, "maps": found[queries]}
            for (name, found), queries in zip(maps, chosen, strict=True)
        ]
        written.append(style.save_json(listing, args.output, "positional_models"))
    return written


def analytic_map(
    centre: tuple[float, float],
    *,
    temperature: float = 20.0,
    size: tuple[float, float] | None = None,
    reference: float = 0.2,
    grid: int = 40,
    dim: int = 256,
) -> np.ndarray:
    """softmax(PE(x, y) . PE(x', y') / sqrt(D)) over the cells of a square map, from DAB-DETR's encodings.

    Args:
        centre: x, y of the query in [0, 1].
        temperature: of both encodings.
        size: width and height of the anchor; the x part is scaled by reference / width, the y part by reference
            / height (equation 6, where the network predicts the reference). None: no modulation.
        reference: see `size`.
        grid: cells along each side.
        dim: D, half of it for x and half for y.

    Returns:
        (grid, grid), row by row; sums to one.
    """
    mask = torch.zeros(1, grid, grid, dtype=torch.bool)
    key = SinePositionEncoding(dim, temperature_x=temperature, temperature_y=temperature)(mask)[0]
    query = sine_of_coordinates(torch.tensor([centre]), dim // 2, temperature)[0]  # y half first
    if size is not None:
        query = query * modulation(size, reference, dim)
    logits = (key @ query) / math.sqrt(dim)
    return logits.flatten().softmax(0).view(grid, grid).numpy()


def modulation(size: tuple[float, float], reference: float, dim: int) -> Tensor:
    """(D,) factors of equation 6: reference / height for the half of y, which comes first, reference / width for x."""
    ratio = torch.tensor([reference / size[1], reference / size[0]])
    return ratio.repeat_interleave(dim // 2)


@torch.no_grad()
def model_maps(model: SetDetector, image: Image, layer: int = -1) -> np.ndarray:
    """What each query of a decoder layer looks at by position alone, averaged over heads.

    DETR adds content and position; its positional part is softmax((W_q o) . (W_k p) / sqrt(d)) with the object query o
    and the encoding p. Conditional DETR and those that follow have the positional half apart.

    Returns:
        (Q, h, w); each sums to one.

    Raises:
        ValueError: no such layer, or a detector without positions in its cross-attention.
    """
    name = title_of(model)
    with watch(model, CROSS) as calls, watch_outputs(encoding_of(model)) as positions:
        predict(model, image)
    if not -len(calls) <= layer < len(calls):
        raise ValueError(f"--layer {layer}: the decoder of {name} has layers 0 to {len(calls) - 1}")
    call = calls[layer]
    if isinstance(call, SamplingCall):
        raise ValueError(
            f"{name} has deformable attention: no positional map, but sampling points (see the command attention)"
        )
    height, width = positions[0].shape[1:3]
    if isinstance(model, DETR):
        maps = _detr_maps(model, call, positions[0].flatten(1, 2))
    else:
        maps = call.positional_weights()[0].mean(0)
    return maps.view(-1, height, width).cpu().numpy()


def _detr_maps(model: DETR, call: DenseCall, position: Tensor) -> Tensor:
    """(Q, S) of DETR's added encodings."""
    if model.transformer.decoder_position != "attention" or model.transformer.query_position != "attention":
        raise ValueError(
            "DETR's positional map needs MODEL.DETR.SPATIAL_ENCODING.DECODER and QUERY_ENCODING at 'attention'"
        )
    layer = model.get_submodule(call.name)
    with watch(layer) as alone:
        layer(model.query_embed.weight[None], position, position, need_weights=False)
    positional = alone[0]
    assert isinstance(positional, DenseCall)
    positional.mask = call.mask
    return positional.weights()[0].mean(0)


def centres(maps: np.ndarray) -> np.ndarray:
    """(Q, 2) x, y in [0, 1] of each map's greatest value."""
    peak = maps.reshape(len(maps), -1).argmax(1)
    row, column = np.divmod(peak, maps.shape[2])
    return np.stack([(column + 0.5) / maps.shape[2], (row + 0.5) / maps.shape[1]], 1)


def similar_queries(maps: Sequence[np.ndarray], count: int) -> list[np.ndarray]:
    """Queries of the first detector spread over the image, and of each other those that look nearest to there."""
    first = centres(maps[0])
    wanted = np.array([[0.3, 0.3], [0.7, 0.35], [0.35, 0.7], [0.7, 0.7], [0.5, 0.5], [0.15, 0.5], [0.85, 0.5]])
    places: list[int] = []
    for i in range(count):
        distance = np.linalg.norm(first - wanted[i % len(wanted)], axis=1)
        distance[places] = np.inf
        if np.isfinite(distance).any():
            places.append(int(distance.argmin()))
    targets = first[places]
    chosen = []
    for values in maps:
        distance = np.linalg.norm(centres(values)[:, None] - targets, axis=2)  # Q x targets
        queries: list[int] = []
        for column in distance.T:  # each query once, as long as there are enough
            free = column.copy()
            if len(queries) < len(free):
                free[queries] = np.inf
            queries.append(int(free.argmin()))
        chosen.append(np.array(queries))
    return chosen


def _map(axes: Axes, values: np.ndarray, title: str) -> None:
    height, width = values.shape
    axes.imshow(values, extent=(0, width / height, 1, 0), cmap=style.HEAT, vmin=0, vmax=values.max())
    axes.set_title(title, fontsize=8.5)
    style.bare(axes)


def draw_temperatures(maps: dict[float, np.ndarray]) -> Figure:
    """DAB-DETR's figure 7: a higher temperature gives a flatter map."""
    columns = min(len(maps), 4)
    rows = math.ceil(len(maps) / columns)
    figure = style.new_figure(1.9 * columns, 2.1 * rows + 0.6)
    grid = style.subplots(figure, rows, columns)
    for axes in grid.flat[len(maps) :]:
        axes.set_visible(False)
    for axes, (temperature, values) in zip(grid.flat, maps.items(), strict=False):
        _map(axes, values, f"T = {temperature:g}, peak {values.max() * values.size:.1f} x even")
    figure.suptitle(
        "Positional attention of a query in the middle, by temperature T (bright: own peak, dark: none)", fontsize=9
    )
    return figure


def draw_sizes(maps: dict[tuple[float, float], np.ndarray]) -> Figure:
    """DAB-DETR's figure 6: the map widens along the longer side of the anchor, which is drawn."""
    figure = style.new_figure(2.1 * len(maps), 2.7)
    grid = style.subplots(figure, 1, len(maps))[0]
    for axes, ((width, height), values) in zip(grid, maps.items(), strict=True):
        _map(axes, values, f"w = {width:g}, h = {height:g}")
        box = (0.5 - width / 2, 0.5 - height / 2, 0.5 + width / 2, 0.5 + height / 2)
        style.draw_box(axes, box, style.COLOURS[1])
    figure.suptitle(
        "Positional attention modulated by the anchor's width and height (T = 20, each to its own scale)", fontsize=9
    )
    return figure


def draw_models(maps: Sequence[tuple[str, np.ndarray]], chosen: Sequence[np.ndarray]) -> Figure:
    """DAB-DETR's figure 4: a row for each detector, a column for queries that look to about the same place."""
    columns = len(chosen[0])
    figure = style.new_figure(1.9 * columns + 0.6, 2.05 * len(maps) + 0.5)
    grid = style.subplots(figure, len(maps), columns)
    for row, (name, found), queries in zip(grid, maps, chosen, strict=True):
        for axes, query in zip(row, queries, strict=True):
            _map(axes, found[query], f"query {query}")
        row[0].set_ylabel(name)
    figure.suptitle("Positional attention of the decoder's queries (bright: its own peak, dark: none)", fontsize=9)
    return figure
