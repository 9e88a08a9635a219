"""The benchmark of a training step: both ways are measured, and the fused one is what it says."""

from __future__ import annotations

import re

import pytest
import torch

from detr_family.benchmarks.denoising import images
from detr_family.benchmarks.training import built, main, measure
from detr_family.layers import fused


def test_two_lines_for_a_detector(capsys: pytest.CaptureFixture) -> None:
    threads = torch.get_num_threads()
    try:
        main(["dino_quickstart", "--size", "64", "80", "--repeats", "1", "--threads", "1"])
    finally:
        torch.set_num_threads(threads)
    printed = capsys.readouterr().out
    assert "1 image(s) of 64x80 a step, 7 boxes each, 1 thread(s)" in printed
    ways = re.findall(r"dino_quickstart +(\w+)(?: +\d+\.\d{3}){5} +[\d.]+x\n", printed)
    assert ways == ["plain", "fused"]
    assert float(re.findall(r"losses differ by (\S+) of", printed)[0]) < 1e-5


def test_a_step_leaves_the_weights_alone_and_plain_means_plain(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[bool] = []
    kept = fused.kernels_work
    monkeypatch.setattr(fused, "kernels_work", lambda: asked.append(True) or kept())
    cfg, model = built("dino_quickstart", [])
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    medians, _ = measure(cfg, model, images(1, 3, (64, 80)), 1, False)
    assert asked and set(medians) == {"plain", "fused"}
    assert medians["fused"]["step"] > 0
    assert all(torch.equal(value, before[name]) for name, value in model.named_parameters())
    del asked[:]
    with fused.plain_layers():
        model(images(1, 3, (64, 80)))
    assert not asked
