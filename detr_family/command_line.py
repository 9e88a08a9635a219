"""What the commands share."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from types import ModuleType


def add_import(parser: argparse.ArgumentParser) -> None:
    """The option `--import MODULE`, for detectors and keys that are not this package's, as projects.deformable has.

    The modules are imported while the command line is parsed, also from the folder that the command is run in.
    """
    parser.add_argument(
        "--import",
        type=_import,
        action="append",
        metavar="MODULE",
        help="import this first: it registers detectors of one's own, as projects.deformable does",
    )


def _import(name: str) -> ModuleType:
    if os.getcwd() not in sys.path:  # a script in tools/ has only its own folder there
        sys.path.append(os.getcwd())
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise argparse.ArgumentTypeError(f"{name} cannot be imported: {error}") from error
