"""A number of several runs' metrics.json against epochs; runs of one label are seeds of the same thing."""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from detr_family.analysis import style
from detr_family.analysis.loading import datasets_for_now, quiet
from detr_family.config import load_config
from detr_family.data.datasets.coco import register_datasets, training_dicts
from detr_family.visualization.draw import read_metrics


def add_runs(parser: argparse.ArgumentParser, required: bool) -> None:
    """--run LABEL FOLDER, as often as there are runs."""
    parser.add_argument(
        "--run",
        dest="run_folders",
        nargs=2,
        action="append",
        default=[],
        required=required,
        metavar=("LABEL", "FOLDER"),
        help="a run's output folder and what to call it; runs of one label are seeds: drawn as their mean and spread",
    )
    parser.add_argument(
        "--iterations-per-epoch",
        type=float,
        default=0.0,
        help="by default as the run's config.yaml and training set say; where that cannot be had, iterations are drawn",
    )


@dataclass
class Run:
    """One run's number over its training.

    Attributes:
        label: what the run is called.
        folder: where its metrics.json lies.
        points: (iterations done, epochs done, value), ascending; epochs are NaN where their length is not known.
    """

    label: str
    folder: str
    points: list[tuple[int, float, float]] = field(default_factory=list)


def read_runs(folders: Sequence[Sequence[str]], key: str, iterations_per_epoch: float = 0.0) -> list[Run]:
    """Read `key` from every run's metrics.json.

    Args:
        folders: pairs of label and folder.
        key: what to read, as it stands in metrics.json. A run that has none of it, or nothing finite, has no points.
        iterations_per_epoch: of all runs; 0: as each run's config.yaml and training set say.

    Raises:
        ValueError: a folder has no metrics.json, or none of the runs has the key.
    """
    runs = []
    for label, folder in folders:
        metrics = read_metrics(os.path.join(folder, "metrics.json"))
        length = iterations_per_epoch or epoch_length(folder)
        # Detectron2 numbers the evaluation after the last step one higher than those between steps.
        steps = max((e["iteration"] + 1 for e in metrics if "total_loss" in e), default=-1)
        points = []
        for entry in metrics:
            value = entry.get(key)
            if isinstance(value, (int, float)) and math.isfinite(value):
                done = entry["iteration"] + (entry is not metrics[-1] or entry["iteration"] != steps)
                points.append((done, done / length if length else math.nan, float(value)))
        runs.append(Run(label, str(folder), points))
    if not any(run.points for run in runs):
        raise ValueError(f"no run has {key!r} in its metrics.json: {', '.join(run.folder for run in runs)}")
    return runs


def epoch_length(folder: str) -> float:
    """Iterations of an epoch of the run in `folder`, as the trainer counts them; 0 where that cannot be found out."""
    path = Path(folder) / "config.yaml"
    if not path.is_file():
        return 0.0
    try:
        with quiet("detectron2", "detr_family"), datasets_for_now():
            cfg = load_config(str(path))
            register_datasets(cfg)
            return float(max(len(training_dicts(cfg)) // cfg.SOLVER.IMS_PER_BATCH, 1))
    except (ValueError, OSError):
        return 0.0


def by_label(runs: Sequence[Run]) -> dict[str, list[Run]]:
    """Runs of each label, labels in the order in which they first come; runs without points are left out."""
    groups: dict[str, list[Run]] = {}
    for run in runs:
        if run.points:
            groups.setdefault(run.label, []).append(run)
    return groups


def mean_curve(runs: Sequence[Run], epochs: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Abscissae, mean, least and greatest value of seeds of one thing, where all of them have a value."""
    tables = [{(p[1] if epochs else p[0]): p[2] for p in run.points} for run in runs]
    places = sorted(set.intersection(*(set(t) for t in tables)))
    values = np.array([[t[x] for x in places] for t in tables])
    if not places:
        return np.array([]), np.array([]), np.array([]), np.array([])
    return np.array(places), values.mean(0), values.min(0), values.max(0)


def draw_curves(runs: Sequence[Run], ylabel: str, title: str) -> Figure:
    """One line for each label; the band is the range of its seeds."""
    groups = by_label(runs)
    epochs = all(math.isfinite(p[1]) for group in groups.values() for run in group for p in run.points)
    figure = style.new_figure(6.2, 4.0)
    axes = style.tidy(figure.subplots())
    for number, (label, group) in enumerate(groups.items()):
        x, mean, least, greatest = mean_curve(group, epochs)
        colour = style.COLOURS[number % len(style.COLOURS)]
        seeds = f" ({len(group)} seeds)" if len(group) > 1 else ""
        axes.plot(
            x,
            mean,
            color=colour,
            linestyle=style.LINES[number % len(style.LINES)],
            marker=style.MARKERS[number % len(style.MARKERS)] if len(x) <= 40 else "",
            markersize=4,
            label=f"{label}{seeds}",
        )
        if len(group) > 1:
            axes.fill_between(x, least, greatest, color=colour, alpha=0.2, linewidth=0)
    axes.set_xlabel("epoch" if epochs else "iteration")
    axes.set_ylabel(ylabel)
    axes.set_ylim(bottom=0)
    axes.set_xlim(left=0)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_title(title)
    axes.legend(frameon=False)
    return figure
