"""The comparison table, and that the published figures in it are those of the docs."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest
import tiny

from detr_family.analysis import summary
from detr_family.analysis.command_line import main
from detr_family.benchmarks.complexity import count_gflops

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("name", tiny.DETECTORS)
def test_command(name: str, work: Any, capsys: pytest.CaptureFixture[str]) -> None:
    size = ["--size", "64,96", "--repeats", "2", "--output", str(work.output)]
    written = main(["summary", "--config-file", work.config(name), *size])
    row = next(csv.DictReader(written[-1].open()))
    model = tiny.build(name)
    assert float(row["params"]) == pytest.approx(sum(p.numel() for p in model.parameters()) / 1e6, rel=1e-4)
    assert float(row["gflops"]) == pytest.approx(count_gflops(model, 64, 96), rel=1e-4) and float(row["gflops"]) > 0
    assert float(row["fps"]) > 0 and row["AP"] == "" and row["device"] == "cpu" and row["size"] == "64x96"
    assert f"| {name}" in capsys.readouterr().out


def test_a_papers_model_stands_beside_its_published_row(work: Any) -> None:
    config = str(ROOT / "configs" / "dab_detr_r50.yaml")
    size = ["--size", "96,128", "--repeats", "0", "--output", str(work.output)]
    written = main(["summary", "--config-file", config, *size])
    row = next(csv.DictReader(written[-1].open()))
    assert (row["epochs"], row["AP"], row["gflops_published"], row["fps"]) == ("50", "42.2", "94", "")
    assert float(row["params"]) == pytest.approx(float(row["params_published"]), abs=0.5)


def test_sizes_that_cannot_be(work: Any) -> None:
    with pytest.raises(SystemExit, match="two lengths in pixels of at least 32 are needed"):
        main(["summary", "--config-file", work.config("DETR"), "--size", "8,9"])
    assert summary.frames_per_second(tiny.build("DETR").eval(), (64, 64), 1) > 0
