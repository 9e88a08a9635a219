"""Code in the documentation runs, and its links lead somewhere."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from detr_family.data.datasets.coco_json import scan_coco_json

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)


def test_the_annotation_file_of_the_page_is_one(tmp_path: Path) -> None:
    (tmp_path / "shown.json").write_text(blocks(ROOT / "docs" / "own_data.md", "json")[0])
    scan = scan_coco_json(str(tmp_path / "shown.json"), str(tmp_path))
    assert (len(scan.records), scan.num_annotations, scan.num_left_out) == (1, 1, 0)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_to_files_lead_somewhere(page: Path) -> None:
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    targets = re.findall(r"\]\(([^)#\s]+)(#[^)]*)?\)", text)
    missing = [t for t, _ in targets if "://" not in t and not (page.parent / t).exists()]
    assert not missing
