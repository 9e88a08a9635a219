"""Imports run one way, floor by floor and from each paper to the next, and nowhere in a circle."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "detr_family"
IN_EACH_FOLDER = ("__init__.py", "conftest.py")

# From the ground up; a room's own modules may import each other. docs/architecture.md says what is in each.
FLOORS = [
    ["contents", "errors", "threads"],
    ["layers"],
    ["config", "collect_env"],
    ["modeling.structures"],
    ["modeling.backbone", "modeling.postprocessing", "modeling.matcher", "modeling.criterion"],
    ["modeling.denoising", "modeling.freezing", "modeling.heads", "modeling.inputs", "modeling.loading"],
    ["modeling.transformer"],
    ["modeling.set_detector", "modeling.deformable"],
    ["modeling.detr"],
    ["modeling.conditional_detr"],
    ["modeling.dab_detr"],
    ["modeling.dn_detr"],
    ["modeling.dino"],
    ["modeling"],
    ["registration"],
    ["checkpoint"],
    ["data"],
    ["evaluation"],
    ["inference", "visualization", "model_zoo"],
    ["export"],
    ["engine"],
    ["benchmarks"],
    ["analysis"],
    ["commands"],
    ["__main__"],
]
FLOOR = {name: i for i, names in enumerate(FLOORS) for name in names}
MODULES = {
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix("__init__").rstrip("."): path
    for path in sorted(PACKAGE.rglob("*.py"))
}


def room(module: str) -> str:
    """The entry of FLOORS that a module belongs to."""
    parts = module.split(".")
    for n in range(len(parts), 0, -1):
        if (name := ".".join(parts[:n])) in FLOOR:
            return name
    raise AssertionError(f"say in {Path(__file__).name} on which floor {module} stands")


def imported(path: Path) -> set[str]:
    """The modules of the package that a file imports, at its top or within a function."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "detr_family":
            base = node.module.partition(".")[2]
            for alias in node.names:
                name = f"{base}.{alias.name}".lstrip(".")
                found.add(name if name in MODULES else base)
        elif isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[2] for alias in node.names if alias.name.startswith("detr_family.")}
    return found


@pytest.mark.parametrize("module", [name for name in MODULES if name])
def test_imports_run_one_way(module: str) -> None:
    here = room(module)
    for name in imported(MODULES[module]):
        assert name, f"{module} imports the package itself: name the module"
        there = room(name)
        assert there == here or FLOOR[there] < FLOOR[here], f"{module} imports {name}"


def test_no_import_runs_in_a_circle() -> None:
    edges = {module: imported(path) & set(MODULES) - {module} for module, path in MODULES.items()}
    done: set[str] = set()

    def follow(module: str, way: tuple[str, ...]) -> None:
        assert module not in way, f"a circle: {' -> '.join((*way[way.index(module) :], module))}"
        if module not in done:
            for other in sorted(edges[module]):
                follow(other, (*way, module))
            done.add(module)

    for module in MODULES:
        follow(module, ())


_IMPORT_EACH = """
import importlib, os, sys, traceback
import detectron2.data, detectron2.evaluation, detectron2.layers
import matplotlib.pyplot, scipy.optimize, torch.utils.benchmark, torchvision
import detr_family  # runs before any of its modules in any case
assert "detectron2.modeling" not in sys.modules  # which brings the detectors, in the middle of who imports it first
for name in sys.argv[1:]:
    child = os.fork()
    if not child:
        try:
            importlib.import_module(name)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    if os.waitpid(child, 0)[1]:
        sys.exit(f"{name} cannot be imported first")
"""


def test_every_module_can_be_the_first_to_be_imported() -> None:
    names = ["detr_family." + module for module in MODULES if module and not module.endswith("__main__")]
    run = subprocess.run([sys.executable, "-c", _IMPORT_EACH, *names], cwd=ROOT, capture_output=True, text=True)
    assert not run.returncode, run.stderr[-2000:]


def test_the_package_does_not_know_its_projects() -> None:
    for path in MODULES.values():
        for node in ast.walk(ast.parse(path.read_text())):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            assert not [name for name in names if name.split(".")[0] in ("projects", "tests", "tools")], path


def test_the_check_sees_what_is_imported() -> None:
    assert {"config", "modeling.matcher", "modeling.criterion", "modeling.structures"} <= imported(
        MODULES["modeling.set_detector"]
    )
    assert "modeling" in imported(MODULES[""])


def test_no_module_grows_past_one_subject() -> None:
    for module, path in MODULES.items():
        lines = len(path.read_text().splitlines())
        assert lines <= 500 or module == "modeling.dino", f"{module} has {lines} lines: part it"


def test_no_two_files_of_tests_have_one_name() -> None:
    """pytest imports them by it, and collects nothing where two have the same."""
    folders = (ROOT / "tests", *(path for path in (ROOT / "projects").rglob("tests") if path.is_dir()))
    names = [path.name for folder in folders for path in folder.rglob("*.py") if path.name not in IN_EACH_FOLDER]
    assert not {name for name in names if names.count(name) > 1}
