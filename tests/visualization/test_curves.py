"""Curves of a run: every scalar is somewhere, and odd runs can be drawn."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image

from detr_family.visualization.curves import Panel, panel_svg, panels, series, write_csv, write_curves
from detr_family.visualization.draw import read_metrics

RUN: list[dict[str, Any]] = [
    {"iteration": 19, "total_loss": 9.0, "loss_ce": 1.0, "loss_ce_0": 1.5, "loss_ce_dn": 2.0, "lr": 1e-4, "time": 0.5},
    {"iteration": 39, "total_loss": math.nan, "loss_ce": 0.5, "grad_norm": 3.0, "eta_seconds": 9.0, "data_time": 0.1},
    {"iteration": 40, "bbox/AP": 10.0, "bbox/AP50": 20.0, "bbox/APs": math.nan, "bbox/APm": 3.0, "bbox/AP-red": 4.0},
    {"iteration": 40, "ema/bbox/AP": 11.0, "matching_instability": 2.5, "something new": 1},
]


def keys(metrics: list[dict[str, Any]]) -> dict[str, list[str]]:
    return {panel.title: list(panel.keys) for panel in panels(metrics)}


def test_scalars_that_belong_together_share_a_panel_and_new_ones_get_their_own() -> None:
    assert keys(RUN) == {
        "Training loss": ["total_loss"],
        "Box AP on the test set": ["bbox/AP", "bbox/AP50", "ema/bbox/AP"],
        "Box AP by size of the objects": ["bbox/APm"],  # nothing small: no curve
        "Losses of the last decoder layer": ["loss_ce"],
        "Losses of denoising and proposals": ["loss_ce_dn"],
        "Instability of the matching": ["matching_instability"],
        "Norm of the gradient": ["grad_norm"],
        "Learning rate": ["lr"],
        "Seconds an iteration": ["data_time", "time"],
        "something new": ["something new"],
    }


def test_no_panel_has_more_curves_than_colours() -> None:
    metrics = [{"iteration": 1, **{f"loss_{letter}": 1.0 for letter in "abcdefghij"}}]
    assert [len(members) for members in keys(metrics).values()] == [7, 3]


def test_long_runs_are_averaged() -> None:
    metrics = [{"iteration": i, "total_loss": float(i % 2)} for i in range(20000)]
    iterations, values = series(metrics, "total_loss")
    assert len(values) == 1000 and np.allclose(values, 0.5) and iterations[0] == 9.5


@pytest.mark.parametrize("metrics", [RUN, RUN[:1], RUN[1:2], [{"iteration": 0}], []])
def test_curves_are_written_whatever_the_run(metrics: list[dict[str, Any]], tmp_path: Path) -> None:
    write_curves(metrics, str(tmp_path / "curves.png"))
    with Image.open(tmp_path / "curves.png") as image:
        assert image.width > 1000
    for panel in panels(metrics):
        ElementTree.fromstring(panel_svg(panel, metrics))


def test_the_svg_has_a_legend_and_no_address_to_fetch() -> None:
    svg = panel_svg(Panel("AP", "%", {"bbox/AP": "first", "ema/bbox/AP": "second"}), RUN)
    assert ">first<" in svg and ">second<" in svg and ">iteration<" in svg
    assert "<image" not in svg and "url(http" not in svg


def test_the_csv_has_every_scalar(tmp_path: Path) -> None:
    (tmp_path / "metrics.json").write_text("".join(json.dumps(entry) + "\n" for entry in RUN))
    write_csv(read_metrics(str(tmp_path / "metrics.json")), str(tmp_path / "metrics.csv"))
    rows = list(csv.DictReader((tmp_path / "metrics.csv").open()))
    assert [row["iteration"] for row in rows] == ["19", "39", "40"]
    assert rows[0]["loss_ce_0"] == "1.5" and rows[2]["bbox/AP-red"] == "4.0" and rows[2]["loss_ce"] == ""
