"""Slots and learned places."""

from __future__ import annotations

import csv
from typing import Any

import numpy as np
import pytest
import tiny

from detr_family.analysis import loading, queries


@pytest.mark.parametrize("name", tiny.DETECTORS)
def test_command(name: str, work: Any, capsys: pytest.CaptureFixture[str]) -> None:
    written = {p.name: p for p in work.call("queries", name, "--slots", "3")}
    rows = list(csv.DictReader(written["queries.csv"].open()))
    assert len(rows) == 3 * 4 and len({r["slot"] for r in rows}) == 3
    assert all(0 <= float(r[k]) <= 1 for r in rows for k in ("x", "y", "w", "h", "score"))
    places = list(csv.DictReader(written["anchors.csv"].open())) if "anchors.csv" in written else None
    if name == "DETR":
        assert places is None and "no learned places" in capsys.readouterr().out
    elif name in ("ConditionalDETR", "DABDETR", "DNDETR"):
        assert places is not None and len(places) == 7
        assert ("w" in places[0]) == (name != "ConditionalDETR")


def test_shapes_have_their_names() -> None:
    boxes = np.array([[0.5, 0.5, 0.05, 0.1], [0.5, 0.5, 0.4, 0.3], [0.5, 0.5, 0.3, 0.4]])
    assert queries.shape_of(boxes, 1.0, 0.01).tolist() == ["small", "large, wide", "large, tall"]
    assert queries.shape_of(boxes, 2.0, 0.01).tolist() == ["small", "large, wide", "large, wide"]  # in pixels


def test_slots_that_score_best_are_drawn(work: Any) -> None:
    cfg = loading.load_cfg(work.config("DABDETR"))
    _, scores, aspect = queries.slot_boxes(cfg, loading.load_detector(cfg, untrained=True), limit=2)
    assert scores.shape == (2, 7) and aspect.shape == (2,)
    rows = list(
        csv.DictReader(work.call("queries", "DABDETR", "--slots", "1", "--untrained", "--limit", "2")[2].open())
    )
    assert {int(r["slot"]) for r in rows} == {int(scores.mean(0).argmax())}
