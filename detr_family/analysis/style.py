"""How every figure of `detr_family.analysis` looks, and how figures and numbers are written.

Colours are Okabe and Ito's, which colour-blind readers can tell apart; heat maps use cividis and viridis, which stay in
order when printed in grey. Files are the same bit for bit for the same numbers: no date, no random identifiers.
"""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LinearSegmentedColormap, to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

# Okabe and Ito, the darkest first: lines on white must be seen. Their yellow is for areas alone.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
LINES = ("-", "--", "-.", ":", (0, (5, 1)), (0, (3, 1, 1, 1)), (0, (1, 1)))
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
HEAT = "cividis"

_RC = {
    "font.size": 9.0,
    "axes.titlesize": 9.5,
    "axes.labelsize": 9.0,
    "legend.fontsize": 8.5,
    "svg.hashsalt": "detr_family",
    "svg.fonttype": "none",
}


def house_style() -> AbstractContextManager[None]:
    """A context in which figures are drawn: sizes of letters, reproducible SVG."""
    return matplotlib.rc_context(_RC)


def new_figure(width: float, height: float) -> Figure:
    """An empty figure, size in inches, that needs no display and leaves pyplot alone."""
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def subplots(figure: Figure, rows: int, columns: int) -> np.ndarray:
    """Axes of a grid, always (rows, columns)."""
    axes: np.ndarray = figure.subplots(rows, columns, squeeze=False)
    return axes


def tidy(axes: Axes) -> Axes:
    """Light grid, no frame at the right and on top."""
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    return axes


def bare(axes: Axes) -> Axes:
    """No ticks: for images and maps whose axes are those of the image."""
    axes.set_xticks([])
    axes.set_yticks([])
    return axes


def fade(colour: str) -> LinearSegmentedColormap:
    """A map from transparent to `colour`, to lay attention over an image."""
    rgb = to_rgb(colour)
    return LinearSegmentedColormap.from_list("fade", [(*rgb, 0.0), (*rgb, 0.85)])


def draw_box(axes: Axes, xyxy: Sequence[float] | np.ndarray, colour: str, style: Any = "-", width: float = 1.8) -> None:
    """The outline of a box in the axes' units, with a white rim that stands out on any ground."""
    x1, y1, x2, y2 = xyxy
    for edge, line, thick in (("white", "-", width + 1.6), (colour, style, width)):
        axes.add_patch(
            Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, edgecolor=edge, linestyle=line, linewidth=thick)
        )


def label_box(axes: Axes, xyxy: Sequence[float] | np.ndarray, text: str, colour: str, size: float = 7.0) -> None:
    """A small label at a box's upper left corner, kept inside of the axes' limits."""
    left, right = sorted(axes.get_xlim())
    top, bottom = sorted(axes.get_ylim())
    axes.text(
        min(max(xyxy[0], left), right),
        min(max(xyxy[1], top), bottom),
        text,
        fontsize=size,
        color="white",
        va="bottom" if xyxy[1] > top + 0.12 * (bottom - top) else "top",
        ha="left" if xyxy[0] < left + 0.7 * (right - left) else "right",
        bbox={"facecolor": colour, "edgecolor": "none", "pad": 1.0},
        clip_on=True,
    )


def show_image(axes: Axes, image: np.ndarray, title: str = "") -> None:
    """An RGB image (H, W, 3) whose axes are its pixels."""
    height, width = image.shape[:2]
    axes.imshow(image, extent=(0, width, height, 0), interpolation="bilinear")
    axes.set_xlim(0, width)
    axes.set_ylim(height, 0)
    axes.set_title(title)
    bare(axes)


def say_empty(axes: Axes, text: str) -> None:
    """In place of a drawing for which there is nothing to draw: what is missing, in words."""
    bare(axes)
    axes.text(0.5, 0.5, text, transform=axes.transAxes, ha="center", va="center", wrap=True, fontsize=9)


def save_figure(figure: Figure, folder: Path, stem: str, dpi: int = 110) -> list[Path]:
    """Write `stem`.png and `stem`.svg.

    Returns:
        The two files.
    """
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{stem}.png", folder / f"{stem}.svg"]
    with house_style():
        figure.savefig(paths[0], dpi=dpi, metadata={"Software": None})
        figure.savefig(paths[1], dpi=dpi, metadata={"Date": None})
    return paths


def save_json(value: Any, folder: Path, stem: str) -> Path:
    """Write `stem`.json; numbers that are not finite become null, which JSON has no other word for."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{stem}.json"
    path.write_text(json.dumps(_plain(value), indent=1, allow_nan=False) + "\n", encoding="utf-8")
    return path


def save_csv(rows: Sequence[Mapping[str, Any]], columns: Sequence[str], folder: Path, stem: str) -> Path:
    """Write `stem`.csv with these columns; what a row does not have, or is None, is empty."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{stem}.csv"
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, columns, extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows({key: _plain(row.get(key)) for key in columns} for row in rows)
    return path


def table(rows: Sequence[Mapping[str, Any]], columns: Mapping[str, str]) -> str:
    """A Markdown table: `columns` gives key -> heading. None is a dash, floats have one decimal."""

    def cell(value: Any) -> str:
        if value is None or (isinstance(value, float) and not math.isfinite(value)):
            return "-"
        return f"{value:.1f}" if isinstance(value, float) else str(value)

    lines = [list(columns.values()), *([cell(row.get(key)) for key in columns] for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(columns))]
    text = [
        "| " + " | ".join(part.ljust(width) for part, width in zip(line, widths, strict=True)) + " |" for line in lines
    ]
    text.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(text)


def mean_and_spread(values: Iterable[float]) -> tuple[float, float]:
    """Mean and standard deviation (n - 1; 0 for a single value)."""
    numbers = list(values)
    mean = sum(numbers) / len(numbers)
    if len(numbers) == 1:
        return mean, 0.0
    return mean, math.sqrt(sum((x - mean) ** 2 for x in numbers) / (len(numbers) - 1))


def _plain(value: Any) -> Any:
    """The same in what JSON knows, floats with six significant digits."""
    if isinstance(value, Mapping):
        return {str(key): _plain(x) for key, x in value.items()}
    if isinstance(value, np.ndarray):
        return _plain(value.tolist())
    if isinstance(value, (list, tuple)):
        return [_plain(x) for x in value]
    if isinstance(value, np.generic):
        return _plain(value.item())
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    return value
