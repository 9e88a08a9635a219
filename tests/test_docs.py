"""Code in the documentation runs, and its links lead somewhere."""

from __future__ import annotations

import json
import re
import runpy
from pathlib import Path

import pytest
from PIL import Image

from detr_family.data.datasets.coco_json import scan_coco_json

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)


def test_the_annotation_file_of_the_page_is_one(tmp_path: Path) -> None:
    (tmp_path / "shown.json").write_text(blocks(ROOT / "docs" / "own_data.md", "json")[0])
    scan = scan_coco_json(str(tmp_path / "shown.json"), str(tmp_path))
    assert (len(scan.records), scan.num_annotations, scan.num_left_out) == (1, 1, 0)


def test_yolo_files_are_converted_as_the_page_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # shown turned by a quarter
    for name in ("images", "labels"):
        (tmp_path / name).mkdir()
    Image.new("RGB", (200, 100)).save(tmp_path / "images" / "a.jpg", exif=exif)
    Image.new("RGB", (40, 30)).save(tmp_path / "images" / "b.jpg")
    (tmp_path / "labels" / "a.txt").write_text("1 0.5 0.25 0.2 0.1\n0 0.1 0.1 0.1 0.1\n")
    (code,) = [block for block in blocks(ROOT / "docs" / "own_data.md", "python") if "YOLO" in block]
    (tmp_path / "convert.py").write_text(code, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    runpy.run_path("convert.py")
    records = scan_coco_json("train.json", "images").records
    assert [(r["width"], r["height"], len(r["annotations"])) for r in records] == [(100, 200, 2), (40, 30, 0)]
    assert records[0]["annotations"][0]["bbox"] == pytest.approx([40, 40, 20, 20])
    assert [c["name"] for c in json.loads(Path("train.json").read_text())["categories"]] == ["stop", "give way"]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_to_files_lead_somewhere(page: Path) -> None:
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    targets = re.findall(r"\]\(([^)#\s]+)(#[^)]*)?\)", text)
    missing = [t for t, _ in targets if "://" not in t and not (page.parent / t).exists()]
    assert not missing
