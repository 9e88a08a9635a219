"""`evaluation.errors` for the page on a run: tables as rows of cells, curves and confusions as SVG."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from detr_family.evaluation.errors import ClassScore, Errors
from detr_family.visualization.curves import svg_of
from detr_family.visualization.draw import COLOURS

_MOST_CURVES = 8
_MOST_IN_MATRIX = 20
_MOST_ROWS = 400
_STYLES = ("-", "--")


@dataclass(frozen=True)
class Table:
    """A table: what is above it, column names, rows, and which columns are numbers."""

    title: str
    head: tuple[str, ...]
    rows: Sequence[tuple[object, ...]]
    numbers: tuple[int, ...]


def error_tables(errors: Errors) -> list[Table]:
    """Kinds of errors, classes with their thresholds, sizes of objects, and what is taken for what."""
    kinds = [(kind.name, kind.count, f"{kind.cost:.1f}") for kind in errors.kinds]
    classes = [
        (
            score.name,
            score.objects,
            _number(score.ap50),
            _number(score.threshold, ".2f"),
            _number(100 * score.precision, ".0f"),
            _number(100 * score.recall, ".0f"),
            _number(score.f1, ".2f"),
        )
        for score in errors.classes[:_MOST_ROWS]
    ]
    sizes = [
        (
            f"{size.low:g} to {size.high:g} px" if math.isfinite(size.high) else f"{size.low:g} px and more",
            size.objects,
            _number(size.ap50),
            f"{100 * size.recall:.0f}",
        )
        for size in errors.sizes
    ]
    tables = [
        Table("By kind", ("error", "at the threshold", "AP50 to gain"), kinds, (1, 2)),
        Table(
            "Best threshold by class",
            ("class", "objects", "AP50", "score", "precision (%)", "recall (%)", "F1"),
            classes,
            (1, 2, 3, 4, 5, 6),
        ),
        Table("By size (square root of the area)", ("objects", "count", "AP50", "found (%)"), sizes, (1, 2, 3)),
    ]
    confused = _confused(errors)
    if confused:
        tables.append(Table("Most often taken for another", ("is", "taken for", "times"), confused, (2,)))
    worst = errors.worst_first()[:10]
    rows = [(name.replace("\\", "/").rsplit("/", 1)[-1], *row, _number(ap)) for name, *row, ap in worst]
    head = ("image", "objects", "found", "wrong", "AP50")
    return [*tables, Table("Images with most errors (all: images.csv beside the results)", head, rows, (1, 2, 3, 4))]


def _number(value: float, form: str = ".1f") -> str:
    return "–" if math.isnan(value) else format(value, form)


def _confused(errors: Errors) -> list[tuple[object, ...]]:
    """Pairs of classes by how often one is taken for the other."""
    table = errors.confusion[:-1, :-1].copy()
    np.fill_diagonal(table, 0)
    pairs = sorted(zip(*np.nonzero(table), strict=True), key=lambda pair: -table[pair])[:10]
    return [(errors.classes[i].name, errors.classes[j].name, int(table[i, j])) for i, j in pairs]


def precision_recall_svg(errors: Errors) -> str:
    """Precision over recall of the classes with most objects, with their best thresholds marked."""
    figure = Figure(figsize=(5.4, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for number, score in enumerate(_with_most_objects(errors, _MOST_CURVES)):
        curve = np.vstack([[[0.0, score.curve[0, 1] if len(score.curve) else 0.0]], score.curve])
        colour = COLOURS[(6, 4, 2, 0, 5, 1, 3)[number % 7]]
        axes.plot(*curve.T, color=colour, linestyle=_STYLES[number % 2], label=f"{score.name} ({_number(score.ap50)})")
        axes.plot([score.recall], [score.precision], "o", color=colour, markersize=4)
    axes.set(xlim=(0, 1), ylim=(0, 1.02), xlabel="recall", ylabel="precision")
    axes.set_title("Precision and recall at IoU 0.5; dots: best thresholds", fontsize=10, loc="left")
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    if axes.lines:
        axes.legend(frameon=False, fontsize=8, title="class (AP50)", title_fontsize=8)
    return svg_of(figure)


def confusion_svg(errors: Errors) -> str:
    """The confusion matrix in shares of what there is, of at most 20 classes, those with most objects."""
    chosen = [errors.classes.index(score) for score in _with_most_objects(errors, _MOST_IN_MATRIX)]
    count = len(errors.classes)
    table = errors.confusion[np.ix_([*chosen, count], [*chosen, count])].astype(np.float64)
    shares = table / np.maximum(table.sum(1, keepdims=True), 1)
    names = [errors.classes[i].name for i in chosen]
    side = 1.8 + 0.42 * len(table)
    figure = Figure(figsize=(max(side, 4.2), max(side, 3.6)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    for i in range(len(table)):
        for j in range(len(table)):
            if table[i, j]:
                colour = "white" if shares[i, j] > 0.5 else "black"
                axes.text(j, i, f"{int(table[i, j])}", ha="center", va="center", fontsize=7, color=colour)
    axes.set_xticks(range(len(table)), [*names, "missed"], rotation=60, ha="right", fontsize=8)
    axes.set_yticks(range(len(table)), [*names, "background"], fontsize=8)
    axes.set(xlabel="taken for", ylabel="is")
    axes.set_title(f"Confusions at a score of {errors.threshold:.2f}", fontsize=10, loc="left")
    return svg_of(figure)


def _with_most_objects(errors: Errors, count: int) -> list[ClassScore]:
    known = [score for score in errors.classes if score.objects]
    return sorted(known, key=lambda score: -score.objects)[:count]
