"""The benchmarks run and print what they promise."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from detectron2.structures import Boxes, Instances

from detr_family.benchmarks import denoising, dino, duplicates

CONFIG = str(Path(__file__).resolve().parents[1] / "configs" / "dn_detr_quickstart.yaml")


def test_cost_of_denoising(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    small = ["MODEL.DETR.HIDDEN_DIM", "16", "MODEL.DETR.NUM_HEADS", "2", "MODEL.DETR.DEC_LAYERS", "2"]
    options = ["--pictures", "2", "--boxes", "3", "--size", "64", "64", "--repeats", "2"]
    monkeypatch.setattr("sys.argv", ["denoising", "--config-file", CONFIG, *options, *small])
    denoising.main()
    printed = capsys.readouterr().out
    assert "2 pictures of 64x64 with 3 boxes" in printed
    assert re.search(r"making the groups \d+\.\d+ ms", printed)


def test_native_against_torch(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    config = str(Path(CONFIG).with_name("dino_quickstart.yaml"))
    small = ["MODEL.DETR.HIDDEN_DIM", "16", "MODEL.DETR.NUM_HEADS", "2", "MODEL.DETR.DEC_LAYERS", "2"]
    monkeypatch.setattr("sys.argv", ["dino", "--config-file", config, "--size", "64", "96", "--repeats", "1", *small])
    dino.main()
    printed = capsys.readouterr().out
    assert re.search(r"inference +\d+\.\d+ +\d+\.\d+ +\d+\.\d+ +native \d+%, torch \d+%", printed)
    assert re.search(r"training +\d", printed)


def test_near_duplicates() -> None:
    boxes = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 9], [1, 0, 10, 10], [20, 20, 30, 30], [0, 0, 10, 10]])
    found = Instances(
        (40, 40), pred_boxes=Boxes(boxes), scores=torch.tensor([0.8, 0.9, 0.2, 0.7, 0.6]),
        pred_classes=torch.tensor([0, 0, 0, 0, 1]),
    )  # fmt: skip
    truth = Instances((40, 40), gt_boxes=Boxes(boxes[[0, 3, 0]]), gt_classes=torch.tensor([0, 1, 1]))
    assert duplicates.near_duplicates(found, 0.1, 0.7) == 2  # two of the first three; class 1 is another object
    assert duplicates.near_duplicates(found, 0.3, 0.7) == 1
    assert duplicates.near_duplicates(found, 0.3, 0.95) == 0
    per_object, share = duplicates.measure([(found, truth), (found[:0], truth[:0])], 0.3, 0.7)
    assert per_object == pytest.approx(1 / 3) and share == pytest.approx(2 / 3)
