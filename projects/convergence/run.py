#!/usr/bin/env python
"""Train the five on the same data with the same budget and seeds; plot AP against epochs and write the table.

python projects/convergence/run.py --output output/convergence
python projects/convergence/run.py --spec projects/convergence/gpu.yaml --num-gpus 8 --output output/convergence_coco

Called again it goes on where it was left: finished runs are kept, an interrupted one is resumed.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from detr_family.analysis import convergence, matching, style
from detr_family.analysis.command_line import whole_numbers
from detr_family.analysis.curves import Run, draw_curves, read_runs
from detr_family.analysis.runs import Job, find_train_net, jobs_of, read_spec, train
from detr_family.config.options import OptionsParser

HERE = Path(__file__).resolve().parent


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the command line, train, write."""
    parser = OptionsParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--spec", type=Path, default=HERE / "shapes.yaml", help="which runs (see detr_family.analysis.runs)"
    )
    parser.add_argument("--output", type=Path, default=Path("output/convergence"), help="folder for everything")
    parser.add_argument("--seeds", type=whole_numbers, default=[], metavar="N,N", help="in place of the list's: 0,1,2")
    parser.add_argument("--num-gpus", type=int, default=0, help="of every training, as in train_net.py")
    parser.add_argument("--no-training", action="store_true", help="only plot and table of the runs that are there")
    parser.add_argument("opts", nargs=argparse.REMAINDER, metavar="KEY VALUE", help="of all runs")
    args = parser.parse_args(arguments)
    try:
        jobs = jobs_of(read_spec(args.spec), args.output, args.opts, args.seeds)
        failed = [] if args.no_training else train(jobs, find_train_net(None), args.num_gpus)
        with style.house_style():
            report(jobs, args.output)
    except (OSError, ValueError) as error:
        sys.exit(f"convergence: {error}")
    except KeyboardInterrupt:
        sys.exit("convergence: interrupted; the same command goes on from the last checkpoint")
    if failed:
        sys.exit(f"convergence: {len(failed)} of {len(jobs)} trainings failed, see above; the plot is without them")


def report(jobs: Sequence[Job], output: Path) -> None:
    """Plot, table and verdict of what has been evaluated, and the instability of matching where it was recorded."""
    folders = [(job.row.name, str(job.folder)) for job in jobs if (job.folder / "metrics.json").is_file()]
    if not folders:
        raise ValueError(f"no run in {output} has been trained yet")
    runs = read_runs(folders, "bbox/AP")
    written = convergence.write(runs, "bbox/AP", output)
    lines = order(runs)
    print("\n".join(lines))
    written.append(output / "order.txt")
    written[-1].write_text("\n".join(lines) + "\n", encoding="utf-8")
    try:
        unstable = read_runs(folders, matching.KEY)
    except ValueError:  # not recorded: TEST.INSTABILITY_IMAGES is 0
        unstable = []
    if unstable:
        figure = draw_curves(unstable, "instability IS (changed queries per image)", "How unstable matching is")
        written += style.save_figure(figure, output, "instability")
    for path in written:
        print(path)


def order(runs: Sequence[Run]) -> list[str]:
    """For each paper and the one before it: whether its last AP is higher, and by more than the seeds differ.

    A difference counts as outside of the spread where every seed of the one is above every seed of the other.
    """
    groups: dict[str, list[float]] = {}
    for run in runs:
        if run.points:
            groups.setdefault(run.label, []).append(run.points[-1][2])
    lines = []
    names = list(groups)
    for before, after in itertools.pairwise(names):
        lines.append(f"{after} against {before}: {verdict(groups[before], groups[after])}")
    return lines or ["one detector alone: there is no order to tell"]


def verdict(before: Sequence[float], after: Sequence[float]) -> str:
    """The difference of mean AP in words."""
    difference: Any = style.mean_and_spread(after)[0] - style.mean_and_spread(before)[0]
    text = f"{difference:+.1f} AP"
    if min(len(before), len(after)) < 2:
        return f"{text} (one seed: no spread to compare with)"
    if min(after) > max(before):
        return f"{text}, above it with every seed"
    if max(after) < min(before):
        return f"{text}, BELOW it with every seed"
    return f"{text}, within the spread of the seeds"


if __name__ == "__main__":
    main()
