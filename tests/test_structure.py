"""Imports run one way, from the parts to the papers, and from each paper to the next."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "detr_family"

# A module may import those of lower levels, and its own folder.
LEVELS = [
    ["structures", "layers", "swin", "command_line", "released_names", "checkpoint_files"],
    ["config", "backbone", "postprocess", "matcher", "criterion", "denoising", "freezing"],
    ["set_detector", "deformable"],
    ["detr"],
    ["conditional_detr"],
    ["dab_detr"],
    ["dn_detr"],
    ["dino"],
    ["__init__"],
    ["checkpoint"],
    ["datasets"],
    ["dataset_mapper", "evaluation", "visualize", "collect_env"],
    ["predictor", "curves", "picture_scores"],
    ["report"],
    ["engine"],
    ["config_reference", "quickstart", "benchmarks", "data_check", "demo"],
    ["analysis"],
]
LEVEL = {name: i for i, names in enumerate(LEVELS) for name in names}
FILES = sorted(PACKAGE.rglob("*.py"))


def part(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "detr_family":
            rest = node.module.split(".")[1:]
            found |= {rest[0]} if rest else {alias.name for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {a.name.split(".")[1] for a in node.names if a.name.startswith("detr_family.")}
    return {"__init__" if name == "add_detr_family_config" else name for name in found}


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_run_one_way(path: Path) -> None:
    here = part(path)
    assert here in LEVEL, f"say in {Path(__file__).name} where {here} stands"
    for name in imported(path) - {here}:
        assert LEVEL[name] < LEVEL[here] or here == "__init__", f"{path.name} imports {name}"


def test_the_check_sees_what_is_imported() -> None:
    assert {"set_detector", "matcher", "criterion", "layers", "structures"} <= imported(PACKAGE / "detr.py")
    assert "detr" in imported(PACKAGE / "__init__.py")
