"""The detectors are registered where Detectron2's registries are: as `detectron2.modeling` has been loaded.

That module takes three seconds to load. Who wants a detector has it loaded anyway, by `build_model` or a trainer; who
reads a config or checks a dataset does not need it.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

REGISTRIES = "detectron2.modeling"
DETECTORS = "detr_family.modeling"


def register_with_detectron2() -> None:
    """Import the detectors, which registers them: now, or right after `detectron2.modeling`."""
    if REGISTRIES in sys.modules:
        importlib.import_module(DETECTORS)
    elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


class _Finder(MetaPathFinder):
    """Finds one module as it would be found anyway, and has another imported after it."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != REGISTRIES:
            return None
        sys.meta_path.remove(self)
        try:
            spec = importlib.util.find_spec(fullname)
        finally:
            sys.meta_path.insert(0, self)  # for another try, should the module not load
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def execute_and_register(module: ModuleType) -> None:
            execute(module)
            sys.meta_path.remove(self)
            importlib.import_module(DETECTORS)

        spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]
        return spec


__all__ = ["register_with_detectron2"]
