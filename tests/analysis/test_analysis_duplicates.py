"""Detections counted per object, and those that repeat a better one."""

from __future__ import annotations

import csv
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from detectron2.structures import ImageList

from detr_family.analysis import duplicates, loading
from detr_family.analysis.command_line import main
from detr_family.modeling.structures import SetPrediction


def test_detections_are_counted_per_object(work: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first object of each image is found twice, the second once, and once more as another class."""
    cfg = loading.load_cfg(work.config("DETR"))
    model = loading.load_detector(cfg, untrained=True)
    mapper = loading.DETRDatasetMapper(cfg, is_train=False)
    mapped = [loading.map_image(cfg, mapper, record) for record in loading.dataset(cfg)]
    coming = iter(mapped)

    def predict(images: ImageList, targets: None = None) -> SetPrediction:
        truth = next(coming).targets(torch.device("cpu"))
        logits, boxes = torch.full((1, 1, 7, 4), -9.0), torch.full((1, 1, 7, 4), 0.01)
        logits[..., 3] = 9.0
        for slot, (box, shift) in enumerate(((0, 0), (0, 0), (1, 0), (1, 1))):
            if box < len(truth):
                logits[0, 0, slot, 3] = -9.0
                logits[0, 0, slot, (truth.labels[box] + shift) % 3] = 9.0
                boxes[0, 0, slot] = truth.boxes_cxcywh[box]
        return SetPrediction(logits, boxes)

    monkeypatch.setattr(model, "predict", predict)
    counts = duplicates.count(cfg, model, score=0.5, iou=0.9)
    expected = [n for p in mapped for n in [2, 1, 0, 0, 0, 0][: len(p.truth)]]
    assert counts.per_object.tolist() == expected
    assert counts.near_duplicates == sum(len(p.truth) > 0 for p in mapped)  # another class is another object
    row = duplicates.row_of("x", duplicates.Counts(np.array([0, 1, 1, 3]), 3))
    assert (row["missed"], row["once"], row["twice or more"]) == (25, 50, 25)
    assert row["detections per found object"] == pytest.approx(5 / 3)
    assert row["near-duplicates per object"] == 0.75


def test_near_duplicates() -> None:
    boxes = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 9], [20, 20, 30, 30], [0, 0, 10, 10], [1, 0, 10, 10]])
    classes = torch.tensor([0, 0, 0, 1, 0])
    assert duplicates.near_duplicates(boxes, classes, 0.7) == 2  # the second and the last; class 1 is another object
    assert duplicates.near_duplicates(boxes[:4], classes[:4], 0.7) == 1
    assert duplicates.near_duplicates(boxes[:4], classes[:4], 0.95) == 0
    assert duplicates.near_duplicates(boxes[:0], classes[:0], 0.7) == 0


@pytest.mark.parametrize("name", tiny.DETECTORS)
def test_duplicates_of_every_detector(name: str, work: Any) -> None:
    model = ["--model", work.config(name), work.weights(name), "--score", "0"]
    written = main(["duplicates", *model, "--iou", "0.1", "--output", str(work.output)])
    row = next(csv.DictReader(written[-1].open()))
    assert int(row["objects"]) > 4
    assert sum(float(row[key]) for key in ("missed", "once", "twice or more")) == pytest.approx(100, abs=0.01)


def test_names_of_runs() -> None:
    assert duplicates.names_of_runs(["out/dn/model_final.pth"]) == ["dn"]
    assert duplicates.names_of_runs(["a/dn/seed0/m.pth", "a/cdn/seed0/m.pth"]) == ["dn/seed0", "cdn/seed0"]
    assert duplicates.names_of_runs(["a/x.pth", "a/y.pth"]) == ["a/x.pth", "a/y.pth"]
    assert duplicates.names_of_runs(["model.pth"]) == ["model.pth"]


def test_no_objects(work: Any) -> None:
    work.without_boxes()
    with pytest.raises(SystemExit, match="'shapes_val' has no object"):
        main(["duplicates", "--model", work.config("DNDETR"), work.weights("DNDETR"), "--output", str(work.output)])
