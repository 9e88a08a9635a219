"""The subcommands of `python -m detr_family.analysis`, and what their command lines have in common."""

from __future__ import annotations

import argparse
import importlib
import logging
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from detr_family.analysis.loading import datasets_for_now
from detr_family.analysis.style import house_style
from detr_family.config.options import OptionsParser
from detr_family.config.projects import add_import
from detr_family.errors import check_output

# The module of each has add_arguments(parser), run(args) -> files written, and a docstring that says what it is.
COMMANDS = (
    *("summary", "layers", "attention", "queries", "positional", "matching", "denoising", "duplicates"),
    *("convergence", "ablation"),
)


def add_output(parser: argparse.ArgumentParser) -> None:
    """--output, which every command has."""
    parser.add_argument("--output", type=Path, default=Path("output/analysis"), help="folder for figures and numbers")


def add_model(parser: argparse.ArgumentParser, one_image: bool = False) -> None:
    """What names one detector with its weights and data, and for some commands one image."""
    parser.add_argument("--config-file", required=True, metavar="FILE", help="configuration of the detector")
    parser.add_argument(
        "--untrained", action="store_true", help="weights as they are initialised from SEED, in place of MODEL.WEIGHTS"
    )
    if one_image:
        parser.add_argument("--image", default="", metavar="FILE", help="an image; by default one of DATASETS.TEST")
        parser.add_argument("--index", type=int, default=-1, help="which image of DATASETS.TEST, from 0")
    add_opts(parser)


def add_models(parser: argparse.ArgumentParser, purpose: str, *, required: bool) -> None:
    """--model CONFIG WEIGHTS, once for each detector that is compared: `models`, a list of pairs."""
    parser.add_argument(
        "--model",
        dest="models",
        nargs=2,
        action="append",
        default=[],
        required=required,
        metavar=("CONFIG", "WEIGHTS"),
        help=purpose,
    )


def numbers(text: str) -> list[float]:
    """For argparse: "1,20" -> [1.0, 20.0]. (A list with blanks would swallow the KEY VALUE pairs behind it.)"""
    return [float(part) for part in text.split(",")]


def whole_numbers(text: str) -> list[int]:
    """For argparse: "0,1,2" -> [0, 1, 2]."""
    return [int(part) for part in text.split(",")]


def add_opts(parser: argparse.ArgumentParser, *, data: bool = True) -> None:
    """KEY VALUE pairs, and --data."""
    if data:
        parser.add_argument("--data", metavar="DIR", help="a dataset's folder: COCO, YOLO, Pascal VOC or CSV")
    parser.add_argument("opts", nargs=argparse.REMAINDER, metavar="KEY VALUE", help="as on train_net.py's command line")


def parser() -> argparse.ArgumentParser:
    """The whole command line; the modules of its first option are imported while it is parsed."""
    top = OptionsParser(prog="python -m detr_family.analysis", description="The papers' tables and figures.")
    add_import(top)
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name in COMMANDS:
        module = importlib.import_module(f"detr_family.analysis.{name}")
        text = str(module.__doc__)
        sub = commands.add_parser(
            name,
            help=text.split("\n")[0],
            description=text,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        module.add_arguments(sub)
        sub.set_defaults(run=module.run)
    return top


def main(arguments: Sequence[str] | None = None) -> list[Path]:
    """Run one command and print what it wrote. A mistake of the user's ends with one line and exit status 1."""
    args = parser().parse_args(arguments)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    try:
        check_output(args.output, "--output", folder=True)
        with house_style(), datasets_for_now(), tempfile.TemporaryDirectory() as folder:
            if getattr(args, "data", None):  # what is read anew of it goes into OUTPUT_DIR
                args.opts = ["DATASETS.FOLDER", args.data, "OUTPUT_DIR", folder, *args.opts]
            written: list[Path] = args.run(args)
    except (OSError, ValueError) as error:
        sys.exit(f"{args.command}: {error}")
    except KeyboardInterrupt:
        sys.exit(f"{args.command}: interrupted")
    for path in written:
        print(path)
    return written
