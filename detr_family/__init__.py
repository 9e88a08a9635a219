"""DETR, Conditional DETR, DAB-DETR, DN-DETR and DINO as meta-architectures of Detectron2.

Importing the package registers them, at once where `detectron2.modeling` is loaded and else together with it, which
takes seconds (see `detr_family.registration`). All else is imported where it is asked for;
`add_detr_family_config(cfg)` adds the detectors' keys to a configuration. Where torch is not loaded yet, it also lets
torch's threads sleep while they wait for each other, see `detr_family.threads`.
"""

from __future__ import annotations

import importlib
import sys
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from detr_family.registration import register_with_detectron2
from detr_family.threads import sleep_while_waiting

if TYPE_CHECKING:
    from detr_family import model_zoo, modeling
    from detr_family.config import add_detr_family_config

sleep_while_waiting()  # before anything loads torch

if sys.modules.get("detectron2") is None and find_spec("detectron2") is None:
    raise ImportError(
        "detr_family needs Detectron2, which is not here: in a checkout python tools/install_detectron2.py (see "
        "docs/install.md), else pip install --no-build-isolation git+https://github.com/facebookresearch/detectron2"
    )
register_with_detectron2()


def __getattr__(name: str) -> Any:
    """`add_detr_family_config`, and every module of the package, as if they were imported here."""
    if name == "add_detr_family_config":
        return importlib.import_module("detr_family.config").add_detr_family_config
    if name.isidentifier() and not name.startswith("_") and find_spec(f"{__name__}.{name}") is not None:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


__all__ = ["add_detr_family_config", "model_zoo", "modeling"]
