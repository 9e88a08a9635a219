"""The detectors are registered where Detectron2's registries are: as `detectron2.modeling` has been loaded.

That module takes three seconds to load. Who wants a detector has it loaded anyway, by `build_model` or a trainer; who
reads a config or checks a dataset does not need it.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

REGISTRIES = "detectron2.modeling"


def register_with_detectron2() -> None:
    """Import the detectors, which registers them: now, or right after `detectron2.modeling`."""
    if REGISTRIES in sys.modules:
        _import_detectors()
    elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


def _import_detectors() -> None:
    import detr_family.modeling  # noqa: F401  (a statement: two threads that wait for each other go on)


class _Finder(MetaPathFinder):
    """Finds one module as it would be found anyway, and has the detectors imported after it.

    It stays in the list when that is done: other threads may be going through it.
    """

    done = False

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if self.done or fullname != REGISTRIES:
            return None
        others = [finder for finder in sys.meta_path if finder is not self and hasattr(finder, "find_spec")]
        specs = (finder.find_spec(fullname, path, target) for finder in others)
        spec = next((spec for spec in specs if spec is not None), None)
        if spec is None or spec.loader is None:
            return spec
        spec.loader = loader = copy.copy(spec.loader)  # finders may have one for several modules
        execute = loader.exec_module

        def execute_and_register(module: ModuleType) -> None:
            execute(module)
            _import_detectors()
            self.done = True

        loader.exec_module = execute_and_register  # type: ignore[method-assign]
        return spec


__all__ = ["register_with_detectron2"]
