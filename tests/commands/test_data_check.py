"""The data check as a command: exit status, JSON, and the sheet of augmented images."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from own_data import ANNOTATIONS, write
from PIL import Image

from detr_family.commands.data_check import config_of, draw_training_images, parser, run
from detr_family.data import register_datasets
from detr_family.data.datasets.shapes import write_shapes
from detr_family.visualization.draw import COLOURS

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def shapes(tmp_path: Path) -> list[str]:
    """Command-line options that name two clean sets."""
    known = set(DatasetCatalog.list())
    entries = write_shapes(str(tmp_path / "shapes"), 30, 8)
    yield ["--train", *entries[0][1:], "--val", *entries[1][1:]]
    for name in set(DatasetCatalog.list()) - known:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)


def status(*arguments: str) -> int:
    return run(parser().parse_args(arguments))


def test_a_clean_set_has_status_0_and_its_counts(shapes: list[str], capsys: pytest.CaptureFixture) -> None:
    assert status(*shapes) == 0
    text = capsys.readouterr().out
    assert "30 images" in text and "triangle" in text and "0 errors, 0 warnings, 2 notes" in text


def test_warnings_have_status_1_and_errors_2(coco_folder: Path, capsys: pytest.CaptureFixture) -> None:
    doubled = write(coco_folder, {"annotations": [*ANNOTATIONS, {**ANNOTATIONS[0], "id": 9}]}, "doubled.json")
    assert status("--train", doubled, str(coco_folder)) == 1
    (coco_folder / "a.png").write_bytes(b"")
    assert status("--train", doubled, str(coco_folder), "--no-pictures") == 1
    assert status("--train", doubled, str(coco_folder)) == 2
    assert "a.png cannot be read" in capsys.readouterr().out
    assert status("--train", str(coco_folder / "none.json"), str(coco_folder)) == 2
    assert "none.json" in capsys.readouterr().out


def test_class_names_that_differ_are_an_error(coco_folder: Path, capsys: pytest.CaptureFixture) -> None:
    other = write(coco_folder, {"categories": [{"id": 3, "name": "x"}], "annotations": []}, "other.json")
    train = write(coco_folder)
    assert status("--train", train, str(coco_folder), "--val", other, str(coco_folder), "--no-pictures") == 2
    assert "Class names differ" in capsys.readouterr().out


def test_json_report(shapes: list[str], tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert status(*shapes, "--json", str(tmp_path / "report.json"), "--no-pictures") == 0
    capsys.readouterr()
    assert status(*shapes, "--json", "-", "--no-pictures") == 0
    report = json.loads(capsys.readouterr().out)
    assert report == json.loads((tmp_path / "report.json").read_text())
    assert report["status"] == 0 and [f["kind"] for f in report["findings"]] == ["category_ids", "category_ids"]
    assert {known["pictures"] for known in report["datasets"].values()} == {30, 8}


def test_nothing_to_check_is_said(capsys: pytest.CaptureFixture) -> None:
    assert status("DATASETS.TRAIN", "()", "DATASETS.TEST", "()") == 2
    assert "No dataset to check" in capsys.readouterr().err


def test_the_sheet_shows_what_the_training_sees(shapes: list[str]) -> None:
    args = parser().parse_args([*shapes, "INPUT.MIN_SIZE_TRAIN", "(96,)"])
    cfg = config_of(args)
    register_datasets(cfg)
    before = np.random.get_state()[1].tolist()
    sheet = draw_training_images(cfg, 6, seed=1)
    assert sheet == draw_training_images(cfg, 6, seed=1)  # repeatable, and no trace in numpy's global state
    assert np.random.get_state()[1].tolist() == before
    pixels = np.asarray(sheet)
    for colour in COLOURS[:3]:  # each of the three classes is shown
        rgb = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
        assert (pixels == rgb).all(-1).sum() > 100
    cfg.INPUT.RANDOM_FLIP = "vertical"
    assert sheet != draw_training_images(cfg, 6, seed=1)


def test_a_damaged_image_has_its_place_on_the_sheet(coco_folder: Path) -> None:
    (coco_folder / "a.png").write_bytes(b"")
    cfg = config_of(parser().parse_args(["--train", write(coco_folder), str(coco_folder)]))
    register_datasets(cfg)
    sheet = draw_training_images(cfg, 9)
    assert (np.asarray(sheet) == 0xBB).all(-1).sum() > 50000


@pytest.mark.slow
def test_the_tool_itself(shapes: list[str], tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "tools" / "check_dataset.py"), *shapes, "--sheet", str(tmp_path / "s.png")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    ended = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment, check=False)
    assert ended.returncode == 0, ended.stderr
    assert Image.open(tmp_path / "s.png").width > 1000
