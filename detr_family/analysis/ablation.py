"""Train a list of settings on one dataset with the same seeds, and print the table with differences.

The list is a YAML file (see `detr_family.analysis.runs`); projects/ablations has DETR's encodings and losses and DINO's
rows. Called again, it goes on where it was left. KEY VALUE pairs hold for all rows, DATASETS.TRAIN for one.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from detr_family.analysis import command_line, style
from detr_family.analysis.runs import Job, Spec, find_train_net, jobs_of, last_metrics, read_spec, train

METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl")
COLUMNS = ("row", "seeds", *METRICS, "AP_sd", "to_first", "to_previous", "published", "published_to_first")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """See the module."""
    parser.add_argument("--spec", type=Path, required=True, metavar="FILE", help="the list of settings")
    parser.add_argument(
        "--config-file", default="", metavar="FILE", help="in place of the list's own config, for rows that name none"
    )
    parser.add_argument(
        "--seeds", type=command_line.whole_numbers, default=[], metavar="N,N", help="in place of the list's: 0,1,2"
    )
    parser.add_argument(
        "--train-net", type=Path, metavar="FILE", help="train_net.py, where it is not beside the package"
    )
    parser.add_argument("--num-gpus", type=int, default=0, help="of every training, as in train_net.py")
    command_line.add_output(parser)
    command_line.add_opts(parser, data=False)  # the specification names them


def run(args: argparse.Namespace) -> list[Path]:
    """See the module."""
    spec = read_spec(args.spec, args.config_file)
    jobs = jobs_of(spec, args.output, args.opts, args.seeds)
    failed = train(jobs, find_train_net(args.train_net), args.num_gpus)
    rows = compare(spec, jobs)
    headings = {
        **{"row": "row", "seeds": "seeds", "AP": "AP", "AP_sd": "sd", "AP50": "AP50", "to_first": "to first"},
        **{"to_previous": "to previous", "published": "published", "published_to_first": "published to first"},
    }
    print(style.table(rows, headings))
    written = [
        *style.save_figure(draw(rows), args.output, "ablation"),
        style.save_csv(rows, COLUMNS, args.output, "ablation"),
    ]
    if failed:
        names = ", ".join(f"{job.row.name} (seed {job.seed})" for job in failed)
        raise ValueError(f"{len(failed)} of {len(jobs)} trainings failed: {names}; the table is without them")
    return written


def compare(spec: Spec, jobs: Sequence[Job]) -> list[dict[str, Any]]:
    """One row for each of the list's, means over the seeds that were evaluated: see COLUMNS.

    Differences are of mean AP; the spread is the standard deviation over seeds. What has not been evaluated is None.
    """
    rows: list[dict[str, Any]] = []
    for row in spec.rows:
        results = [x for x in (last_metrics(job) for job in jobs if job.row == row) if x]
        entry: dict[str, Any] = {"row": row.name, "seeds": len(results), "published": row.published}
        for metric in METRICS:
            values = [x[metric] for x in results if metric in x]
            entry[metric] = style.mean_and_spread(values)[0] if values else None
        many = [x["AP"] for x in results]
        entry["AP_sd"] = style.mean_and_spread(many)[1] if len(many) > 1 else None
        entry["to_first"] = _difference(entry, rows[0], "AP") if rows else None
        entry["to_previous"] = _difference(entry, rows[-1], "AP") if rows else None
        entry["published_to_first"] = _difference(entry, rows[0], "published") if rows else None
        rows.append(entry)
    return rows


def _difference(entry: dict[str, Any], other: dict[str, Any], key: str) -> float | None:
    return None if entry[key] is None or other[key] is None else float(entry[key] - other[key])


def draw(rows: Sequence[dict[str, Any]]) -> Figure:
    """Bars of AP with the spread over seeds, the papers' figures beside them as diamonds where there are any."""
    figure = style.new_figure(6.4, 0.45 * len(rows) + 1.3)
    axes = style.tidy(figure.subplots())
    places = range(len(rows))
    for place, row in zip(places, rows, strict=True):
        if row["AP"] is None:
            axes.text(0.5, place, "no evaluation", va="center", fontsize=8, color="0.4")
            continue
        axes.barh(place, row["AP"], color=style.COLOURS[5], xerr=row["AP_sd"], capsize=3)
        axes.annotate(f"{row['AP']:.1f}", (row["AP"], place), (4, 6), textcoords="offset points", fontsize=8)
    published = [
        (row["published"], place) for place, row in zip(places, rows, strict=True) if row["published"] is not None
    ]
    if published:
        axes.plot(*zip(*published, strict=True), "D", color=style.COLOURS[1], markersize=5, label="published, on COCO")
        figure.legend(frameon=False, loc="outside lower center")
    axes.set_yticks(list(places), [row["row"] for row in rows])
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.set_xlabel("box AP on the test set (%)" + (", bars: standard deviation of seeds" if _seeds(rows) else ""))
    axes.set_xlim(left=0)
    return figure


def _seeds(rows: Sequence[dict[str, Any]]) -> bool:
    return any(row["AP_sd"] is not None for row in rows)
