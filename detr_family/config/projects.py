"""Keys and detectors that are not this package's: a project adds them by being imported."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Callable
from types import ModuleType

from detectron2.config import CfgNode

_added: list[Callable[[CfgNode], None]] = []


def project_config(add: Callable[[CfgNode], None]) -> Callable[[CfgNode], None]:
    """Decorator for a project's own keys: once it is imported, `add_detr_family_config` adds them too.

    So a project's YAML files are read by everything that reads ours, as its meta-architectures are found by
    everything that asks Detectron2's registry.

    Args:
        add: adds keys to a configuration, in place.
    """
    if add not in _added:
        _added.append(add)
    return add


def add_project_configs(cfg: CfgNode) -> None:
    """Add the keys of every imported project, in place."""
    for add in _added:
        add(cfg)


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
