"""The matching worked through, and instability over epochs."""

from __future__ import annotations

import csv
import json
from typing import Any

import numpy as np
import pytest
import tiny
from folders import yolo
from scipy.optimize import linear_sum_assignment

from detr_family.analysis import loading, matching
from detr_family.analysis.command_line import main


@pytest.mark.parametrize("name", tiny.DETECTORS)
def test_command(name: str, work: Any) -> None:
    written = work.call("matching", name)
    assert [p.name for p in written] == ["matching.png", "matching.svg", "matching.json"]
    data = json.loads(written[2].read_text())
    cost = np.array(data["cost"])
    assert cost.shape == (len(data["boxes"]), cost.shape[1]) and len(data["boxes"]) >= 2
    np.testing.assert_allclose(sum(np.array(part) for part in data["parts"].values()), cost, atol=1e-4)
    rows, columns = linear_sum_assignment(cost)
    assert [box["query"] for box in data["boxes"]] == columns.tolist()
    assert data["total_cost"] == pytest.approx(cost[rows, columns].sum(), abs=1e-3)


def test_more_boxes_than_queries_and_a_weight_of_zero(work: Any) -> None:
    opts = ("MODEL.DETR.NUM_QUERIES", "1", "MODEL.DETR.COST.GIOU", "0")
    data = json.loads(work.call("matching", "DETR", "--untrained", opts=opts)[2].read_text())
    assert sum(box["query"] is not None for box in data["boxes"]) == 1 < len(data["boxes"])
    assert np.abs(data["parts"]["GIoU"]).max() == 0 < np.abs(data["parts"]["L1"]).max()


def test_a_folder_is_enough(work: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """In another format, and under another name, than the configuration's datasets."""
    monkeypatch.chdir(work.folder)
    folder = yolo(work.folder / "pets", splits={"train": "ab", "val": "a"})
    named = ("--data", str(folder), "--untrained")
    opts = ("MODEL.DETR.NUM_CLASSES", "2")
    data = json.loads(work.call("matching", "DETR", *named, opts=opts)[2].read_text())
    assert data["picture"] == "a.jpg" and len(data["boxes"]) == 2 and not (work.folder / "run").exists()


def test_another_image(work: Any) -> None:
    cfg = loading.load_cfg(work.config("DABDETR"))
    index, record = next((i, r) for i, r in enumerate(loading.dataset(cfg)) if r["annotations"])
    data = json.loads(work.call("matching", "DABDETR", "--index", str(index))[2].read_text())
    assert data["picture"] == record["file_name"].rsplit("/", 1)[-1]


def test_assigned_queries_are_always_shown(work: Any) -> None:
    cfg = loading.load_cfg(work.config("DETR"))
    found = matching.match(loading.load_detector(cfg, untrained=True), loading.choose_image(cfg))
    assert set(found.query) <= set(matching.shown_queries(found))


def test_a_image_without_boxes_is_told(work: Any) -> None:
    work.without_boxes()
    with pytest.raises(SystemExit, match="has no true boxes"):
        work.call("matching", "DETR")


def test_instability_of_runs(work: Any) -> None:
    for label, values in (("a", (9.0, 4.0)), ("b", (3.0, 2.0))):
        folder = work.folder / label
        folder.mkdir()
        lines = [{"iteration": 10 * i + 9, matching.KEY: v} for i, v in enumerate(values)]
        (folder / "metrics.json").write_text("".join(json.dumps(x) + "\n" for x in lines))
    runs = [part for x in "ab" for part in ("--run", x.upper(), str(work.folder / x))]
    written = main(["matching", *runs, "--iterations-per-epoch", "10", "--output", str(work.output)])
    rows = list(csv.DictReader(written[-1].open()))
    assert [(r["run"], float(r["epoch"]), float(r["IS"])) for r in rows] == [
        *[("A", 1, 9), ("A", 2, 4), ("B", 1, 3), ("B", 2, 2)]
    ]


def test_nothing_to_do_is_told(work: Any) -> None:
    with pytest.raises(SystemExit, match="give --config-file for the matching of an image, or --run"):
        main(["matching", "--output", str(work.output)])
