"""Draws the docs' figures anew, from our own models: make figures.

Figures that need no training take seconds. For the others a small detector is trained first (projects/convergence/
figures.yaml: minutes on one core; kept in the output folder, so only once), and those of the whole story are taken from
the runs of projects/convergence/run.py where they are there. The same seed gives the same images.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from detr_family.analysis.command_line import main as analysis
from detr_family.analysis.runs import Job, data_opts, find_train_net, jobs_of, read_spec, slug, train

ROOT = Path(__file__).resolve().parent.parent
PROJECT = ROOT / "projects" / "convergence"
CONFIGS = PROJECT / "configs"
MOST_BYTES = 150_000  # of an image in the docs


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the command line, train what is missing, draw, copy into the docs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--output", type=Path, default=Path("output/figures"), help="folder for models and full results"
    )
    parser.add_argument("--docs", type=Path, default=ROOT / "docs" / "figures", help="where the docs' images go")
    parser.add_argument("--story", type=Path, default=Path("output/convergence"), help="runs of projects/convergence")
    parser.add_argument("--untrained-only", action="store_true", help="only the figures that need no training")
    args = parser.parse_args(arguments)
    try:
        written = without_training(args.output)
        if not args.untrained_only:
            written += with_a_model(args.output) + of_the_story(args.output, args.story)
        copy(written, args.docs)
    except (OSError, ValueError) as error:
        sys.exit(f"figures: {error}")


def without_training(output: Path) -> list[Path]:
    """Formulas, and what denoising makes of boxes."""
    data = [*data_opts(read_spec(PROJECT / "figures.yaml"), output.resolve())]
    written = analysis(["positional", "--output", str(output)])
    denoising = [x for x in ("dn_detr", "dino") if (CONFIGS / f"{x}_shapes.yaml").is_file()]
    configs = [part for x in denoising for part in ("--config-file", str(CONFIGS / f"{x}_shapes.yaml"))]
    return written + analysis(["denoising", *configs, "--output", str(output), *data])


def with_a_model(output: Path) -> list[Path]:
    """What a trained detector shows: matching, decoder layers, attention, slots."""
    jobs = jobs_of(read_spec(PROJECT / "figures.yaml"), output)
    if train(jobs, find_train_net(None)):
        raise ValueError("the detector for the figures could not be trained, see above")
    written = []
    for command, more in (
        ("matching", []),
        ("layers", []),
        ("attention", ["--score", "0.3", "--objects", "3"]),
        ("queries", ["--slots", "10"]),
    ):
        written += analysis([command, "--config-file", str(jobs[0].row.config), *more, *_end(jobs[0], output)])
    return written


def of_the_story(output: Path, story: Path) -> list[Path]:
    """Curves and side-by-side maps of the five, from finished runs of projects/convergence with the first seed."""
    spec = read_spec(PROJECT / "shapes.yaml")
    folders = {row.name: story / slug(row.name) / f"seed{spec.seeds[0]}" for row in spec.rows}
    missing = [name for name, folder in folders.items() if not (folder / "model_final.pth").is_file()]
    if missing:
        print(
            f"no finished run of {', '.join(missing)} in {story}: the figures of the whole story are left as they are"
        )
        return []
    runs = [part for name, folder in folders.items() for part in ("--run", name, str(folder))]
    written = analysis(["convergence", *runs, "--output", str(output)])
    written += analysis(["matching", *runs, "--output", str(output)])
    # Each run's own configuration: it has its dataset and whatever it was trained with.
    models = {n: ["--model", str(f / "config.yaml"), str(f / "model_final.pth")] for n, f in folders.items()}
    dense = [part for name in ("DETR", "Conditional DETR", "DAB-DETR") for part in models[name]]
    written += analysis(["positional", *dense, "--output", str(output)])
    twice = [part for name in ("DAB-DETR", "DN-DETR", "DINO") for part in models[name]]
    return written + analysis(["duplicates", *twice, "--output", str(output)])


def _end(job: Job, output: Path) -> list[str]:
    """What every command on a trained model ends with."""
    return ["--output", str(output), *job.opts, "MODEL.WEIGHTS", str(job.folder / "model_final.pth")]


def copy(written: Sequence[Path], docs: Path) -> None:
    """Put the PNGs among the files written into the docs, in 256 colours.

    Raises:
        ValueError: one is too large for that.
    """
    docs.mkdir(parents=True, exist_ok=True)
    for path in (p for p in written if p.suffix == ".png"):
        target = docs / path.name
        with Image.open(path) as image:
            image.convert("RGB").quantize(256, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE).save(
                target, optimize=True
            )
        if target.stat().st_size > MOST_BYTES:
            raise ValueError(f"{target} has {target.stat().st_size} bytes, more than {MOST_BYTES}")
        print(f"-> {target}")


if __name__ == "__main__":
    main()
