"""Everything that a run has recorded, as curves: grouped by what belongs together, and as one CSV."""

from __future__ import annotations

import csv
import io
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from detr_family.visualization.draw import COLOURS

_MOST_POINTS = 1000  # of a curve; more are averaged
_MOST_CURVES = 7  # in one panel: as many as there are colours
_STYLES = ("-", "--", ":")
_NOT_DRAWN = {"iteration", "eta_seconds", "rank_data_time"}
# COCO's metrics without class names: AP-red and the like are the report's table.
_OVERALL = re.compile(r"(?:(.+?)/)?bbox/(AP|AP50|AP75)$")
_BY_SIZE = re.compile(r"(?:(.+?)/)?bbox/(AP[sml])$")
_ORDER = ("AP", "AP50", "AP75", "APs", "APm", "APl")
_LAST_LAYER = re.compile(r"loss_[a-z]+$")
_OTHER_LOSS = re.compile(r"loss_[a-z]+_[a-z]+$")


@dataclass(frozen=True)
class Panel:
    """Curves that are drawn over one another.

    Attributes:
        title: what they are.
        unit: of the vertical axis.
        keys: name in the metrics -> label in the legend.
        log: draw the vertical axis by powers of ten.
    """

    title: str
    unit: str
    keys: dict[str, str]
    log: bool = False


def panels(metrics: Sequence[dict[str, Any]]) -> list[Panel]:
    """The panels for all scalars of a run; what none of them knows gets one of its own.

    Losses of the earlier decoder layers (`loss_ce_0` ...) and AP by class are left to the CSV and the report.

    Args:
        metrics: from `detr_family.visualization.draw.read_metrics`.
    """
    keys = sorted({key for entry in metrics for key, value in entry.items() if _number(value) is not None})
    drawn = [key for key in keys if key not in _NOT_DRAWN]
    taken: set[str] = set()
    found = []

    def add(title: str, unit: str, members: dict[str, str], log: bool = False) -> None:
        taken.update(members)
        pairs = list(members.items())
        for start in range(0, len(pairs), _MOST_CURVES):
            part = f" ({start // _MOST_CURVES + 1})" if len(pairs) > _MOST_CURVES else ""
            found.append(Panel(title + part, unit, dict(pairs[start : start + _MOST_CURVES]), log))

    add("Training loss", "loss", {key: "total" for key in drawn if key == "total_loss"})
    for pattern, title in ((_OVERALL, "Box AP on the test set"), (_BY_SIZE, "Box AP by size of the objects")):
        matches = {key: match for key in drawn if (match := pattern.match(key))}
        ordered = sorted(matches, key=lambda key: (matches[key][1] or "", _ORDER.index(matches[key][2])))
        add(title, "%", {key: " ".join(filter(None, matches[key].groups())) for key in ordered})
    last = [key for key in drawn if _LAST_LAYER.match(key) and key != "total_loss"]
    add("Losses of the last decoder layer", "loss", {key: key.removeprefix("loss_") for key in last})
    other = [key for key in drawn if _OTHER_LOSS.match(key)]
    add("Losses of denoising and proposals", "loss", {key: key.removeprefix("loss_") for key in other})
    add("Instability of the matching", "queries", {key: key for key in drawn if key.startswith("matching_instab")})
    add("Norm of the gradient", "norm", {key: key for key in drawn if key == "grad_norm"}, log=True)
    rates = {key: key for key in drawn if key == "lr" or key.startswith("lr/")}
    add("Learning rate", "rate", rates)
    add(
        "Seconds an iteration",
        "s",
        {key: {"time": "all", "data_time": "waiting for data"}[key] for key in drawn if key in ("time", "data_time")},
    )
    rest = [key for key in drawn if key not in taken and not re.match(r"loss_.*_\d+$|(.+/)?bbox/", key)]
    for key in rest:
        add(key, "", {key: key})
    return found


def series(metrics: Sequence[dict[str, Any]], key: str) -> tuple[np.ndarray, np.ndarray]:
    """Iterations and finite values of a scalar; of more than 1000 points the means of equal parts."""
    points = [(entry["iteration"], value) for entry in metrics if (value := _number(entry.get(key))) is not None]
    array = np.asarray(points, dtype=np.float64).reshape(-1, 2)
    if len(array) > _MOST_POINTS:
        array = np.stack([part.mean(0) for part in np.array_split(array, _MOST_POINTS)])
    return array[:, 0], array[:, 1]


def _number(value: object) -> float | None:
    if isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value):
        return float(value)
    return None


def draw_panel(axes: Axes, panel: Panel, metrics: Sequence[dict[str, Any]]) -> None:
    """Draws one panel into matplotlib's axes."""
    for number, (key, label) in enumerate(panel.keys.items()):
        iterations, values = series(metrics, key)
        marker = "o" if len(values) <= 30 else ""
        colour, style = COLOURS[(6, 4, 2, 0, 5, 1, 3)[number % 7]], _STYLES[number % len(_STYLES)]
        axes.plot(iterations, values, color=colour, linestyle=style, marker=marker, markersize=3, label=label)
    broken = [entry["iteration"] for entry in metrics for key in panel.keys if _broken(entry.get(key))]
    for number, iteration in enumerate(broken[:20]):
        axes.axvline(iteration, color="#666666", linestyle=":", label=None if number else "not finite")
    values = np.concatenate([series(metrics, key)[1] for key in panel.keys])
    if panel.log and len(values) and 0 < 10 * values.min() < values.max():
        axes.set_yscale("log")
    elif not len(values) or values.min() >= 0:
        axes.set_ylim(bottom=0)
    axes.set_title(panel.title, fontsize=10, loc="left")
    axes.set_xlabel("iteration")
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.set_ylabel(panel.unit)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    if len(panel.keys) > 1 or broken:
        axes.legend(frameon=False, fontsize=8)


def _broken(value: object) -> bool:
    return isinstance(value, float) and not math.isfinite(value)


def write_curves(metrics: Sequence[dict[str, Any]], out_png: str) -> None:
    """All panels of a run as one PNG."""
    known = panels(metrics)
    rows = max(math.ceil(len(known) / 2), 1)
    figure = Figure(figsize=(11, 2.9 * rows), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(rows, 2, squeeze=False).flat
    for axes, panel in zip(grid, known, strict=False):
        draw_panel(axes, panel, metrics)
    for axes in list(grid)[len(known) :]:
        axes.set_visible(False)
    figure.savefig(out_png, dpi=100)


def panel_svg(panel: Panel, metrics: Sequence[dict[str, Any]]) -> str:
    """One panel as an SVG element to be put into a page."""
    figure = Figure(figsize=(5.4, 2.9), layout="constrained")
    FigureCanvasAgg(figure)
    draw_panel(figure.subplots(), panel, metrics)
    return svg_of(figure)


def svg_of(figure: Figure) -> str:
    """A figure as an SVG element, its text as text."""
    text = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "font.family": "sans-serif"}):
        figure.savefig(text, format="svg", metadata={"Date": None})
    return text.getvalue()[text.getvalue().index("<svg") :]


def write_csv(metrics: Sequence[dict[str, Any]], path: str) -> None:
    """All scalars of a run, one row for each iteration that something was recorded at."""
    keys = sorted({key for entry in metrics for key in entry} - {"iteration"})
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, ["iteration", *keys])
        writer.writeheader()
        writer.writerows(metrics)
