"""The benchmarks run and print what they promise."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from detr_family.benchmarks import denoising, dino

CONFIG = str(Path(__file__).resolve().parents[2] / "configs" / "dn_detr_quickstart.yaml")


def test_cost_of_denoising(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    small = ["MODEL.DETR.HIDDEN_DIM", "16", "MODEL.DETR.NUM_HEADS", "2", "MODEL.DETR.DEC_LAYERS", "2"]
    options = ["--pictures", "2", "--boxes", "3", "--size", "64", "64", "--repeats", "2"]
    monkeypatch.setattr("sys.argv", ["denoising", "--config-file", CONFIG, *options, *small])
    denoising.main()
    printed = capsys.readouterr().out
    assert "2 images of 64x64 with 3 boxes" in printed
    assert re.search(r"making the groups \d+\.\d+ ms", printed)


def test_native_against_torch(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    config = str(Path(CONFIG).with_name("dino_quickstart.yaml"))
    small = ["MODEL.DETR.HIDDEN_DIM", "16", "MODEL.DETR.NUM_HEADS", "2", "MODEL.DETR.DEC_LAYERS", "2"]
    monkeypatch.setattr("sys.argv", ["dino", "--config-file", config, "--size", "64", "96", "--repeats", "1", *small])
    dino.main()
    printed = capsys.readouterr().out
    assert re.search(r"inference +\d+\.\d+ +\d+\.\d+ +\d+\.\d+ +native \d+%, torch \d+%", printed)
    assert re.search(r"training +\d", printed)


def test_autocast_is_that_of_the_run_alone() -> None:
    seen: list[torch.dtype] = []
    for autocast in (True, False):
        dino.on_path(
            lambda: seen.append(torch.nn.functional.linear(torch.ones(1, 2), torch.ones(2, 2)).dtype), "torch", autocast
        )()
    assert seen == [torch.bfloat16, torch.float32]
