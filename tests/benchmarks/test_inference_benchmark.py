"""The benchmark of prepared detectors prints a line for each, with all its forms."""

from __future__ import annotations

import re

import pytest

from detr_family.benchmarks.inference import main


def test_a_line_for_each_detector(capsys: pytest.CaptureFixture) -> None:
    main(["dino_quickstart", "--size", "64", "80", "--repeats", "1", "--threads", "1"])
    line = capsys.readouterr().out.splitlines()[-1]
    assert re.fullmatch(r"dino_quickstart +[\d.]+ +[\d.]+ +[\d.]+x +[\d.]+ +[\d.]+x", line)
