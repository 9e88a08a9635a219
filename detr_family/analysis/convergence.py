"""AP against epochs of several runs (DN-DETR, figure 5; DINO, figure 7).

Each --run is a folder that train_net.py wrote; runs with the same label are seeds, drawn as their mean and range. The
table has each label's best and last AP, their standard deviation over seeds, and when half of the best was passed.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from detr_family.analysis import command_line, style
from detr_family.analysis.curves import Run, add_runs, by_label, draw_curves, read_runs

COLUMNS = ("run", "seeds", "epochs", "last", "last_sd", "best", "half_at_epoch")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """See the module."""
    add_runs(parser, required=True)
    parser.add_argument("--metric", default="bbox/AP", help="as in metrics.json (bbox/AP)")
    command_line.add_output(parser)


def run(args: argparse.Namespace) -> list[Path]:
    """See the module."""
    runs = read_runs(args.run_folders, args.metric, args.iterations_per_epoch)
    for empty in (r for r in runs if not r.points):
        print(f"{empty.label}: {empty.folder} has no {args.metric} yet")
    return write(runs, args.metric, args.output)


def write(runs: Sequence[Run], metric: str, folder: Path, stem: str = "convergence") -> list[Path]:
    """Draw the runs, print and write their table and their points."""
    rows = summary(runs)
    headings = ("run", "seeds", "epochs", "last", "sd", "best", "half of best at epoch")
    print(style.table(rows, dict(zip(COLUMNS, headings, strict=True))))
    name = metric.rsplit("/", 1)[-1]
    points = [
        {"run": r.label, "folder": r.folder, "iteration": i, "epoch": x, "value": y}
        for r in runs
        for i, x, y in r.points
    ]
    return [
        *style.save_figure(
            draw_curves(runs, f"box {name} on the test set (%)", f"{name} over the training"), folder, stem
        ),
        style.save_csv(points, ("run", "folder", "iteration", "epoch", "value"), folder, f"{stem}_points"),
        style.save_csv(rows, COLUMNS, folder, stem),
    ]


def summary(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """One row for each label: see COLUMNS. Means over its seeds; the spread is the standard deviation."""
    rows = []
    for label, group in by_label(runs).items():
        last, spread = style.mean_and_spread(r.points[-1][2] for r in group)
        best, _ = style.mean_and_spread(max(p[2] for p in r.points) for r in group)
        half, _ = style.mean_and_spread(_half(r) for r in group)
        epochs, _ = style.mean_and_spread(r.points[-1][1] for r in group)
        rows.append(
            {
                "run": label,
                "seeds": len(group),
                "epochs": epochs,
                "last": last,
                "last_sd": spread if len(group) > 1 else None,
                "best": best,
                "half_at_epoch": half,
            }
        )
    return rows


def _half(run: Run) -> float:
    """The first epoch whose value is at least half of the best one."""
    best = max(p[2] for p in run.points)
    return next(p[1] for p in run.points if p[2] >= best / 2)
