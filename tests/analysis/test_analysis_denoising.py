"""Denoising drawn as a training step gets it, and detections counted per object."""

from __future__ import annotations

import csv
import json
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from detectron2.structures import ImageList

from detr_family.analysis import denoising, loading
from detr_family.analysis.command_line import main
from detr_family.structures import SetPrediction

DENOISING = [name for name in tiny.DETECTORS if name in ("DNDETR", "DINO")]


@pytest.mark.parametrize("name", DENOISING)
def test_command_draws_what_the_detector_makes(name: str, work: Any) -> None:
    output = ["--output", str(work.output)]
    written = main(["denoising", "--config-file", work.config(name), *output, "MODEL.DN.BOX_NOISE", "0.4"])
    assert [p.name for p in written] == ["denoising.png", "denoising.svg", "denoising.json"]
    data = json.loads(written[2].read_text())
    queries, boxes = data["detectors"][0]["queries"], len(data["truth"])
    cfg = loading.load_cfg(work.config(name))
    height, width = loading.choose_picture(cfg).image.shape[:2]
    positives = [q for q in queries if q["positive"]]
    assert len(positives) == boxes * (1 + max(q["group"] for q in queries))
    assert any(not q["positive"] for q in queries) == (name == "DINO")
    for query in positives:  # noise is at most once the box's size: the centre stays near
        x1, y1, x2, y2 = data["truth"][query["box"]]["box_xyxy"]
        x, y = query["box_cxcywh"][0] * width, query["box_cxcywh"][1] * height
        assert abs(x - (x1 + x2) / 2) <= 1.01 * (x2 - x1) and abs(y - (y1 + y2) / 2) <= 1.01 * (y2 - y1)


def test_noise_of_zero_gives_the_truth_back_and_a_seed_the_same(work: Any) -> None:
    cfg = loading.load_cfg(work.config("DNDETR"), ["MODEL.DN.BOX_NOISE", "0", "MODEL.DN.LABEL_NOISE", "0"])
    model, picture = loading.load_detector(cfg, untrained=True), loading.choose_picture(cfg)
    found = denoising.noised(model, picture, seed=0)
    for x in found:
        np.testing.assert_allclose(picture.in_pixels(torch.tensor(x.box_cxcywh)), picture.truth_xyxy[x.box], atol=0.2)
        assert x.label == picture.truth.gt_classes[x.box] and x.positive
    noisy = loading.load_detector(loading.load_cfg(work.config("DNDETR")), untrained=True)
    once, twice, other = (denoising.noised(noisy, picture, seed) for seed in (1, 1, 2))
    assert all((a.box_cxcywh == b.box_cxcywh).all() for a, b in zip(once, twice, strict=True))
    assert any((a.box_cxcywh != b.box_cxcywh).any() for a, b in zip(once, other, strict=True))


def test_detections_are_counted_per_object(work: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first object of each picture is found twice, the second once, and once more as another class."""
    cfg = loading.load_cfg(work.config("DETR"))
    model = loading.load_detector(cfg, untrained=True)
    mapper = loading.DETRDatasetMapper(cfg, is_train=False)
    pictures = [loading.map_picture(cfg, mapper, record) for record in loading.data_set(cfg)]
    coming = iter(pictures)

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
    counts = denoising.per_object(cfg, model, score=0.5, iou=0.9)
    expected = [n for p in pictures for n in [2, 1, 0, 0, 0, 0][: len(p.truth)]]
    assert counts.tolist() == expected
    row = denoising.duplicates_row("x", np.array([0, 1, 1, 3]))
    assert (row["missed"], row["once"], row["twice or more"]) == (25, 50, 25)
    assert row["detections per found object"] == pytest.approx(5 / 3)


@pytest.mark.parametrize("name", tiny.DETECTORS)
def test_duplicates_of_every_detector(name: str, work: Any) -> None:
    model = ["--model", work.config(name), work.weights(name), "--score", "0"]
    written = main(["denoising", *model, "--iou", "0.1", "--output", str(work.output)])
    row = next(csv.DictReader(written[-1].open()))
    assert int(row["objects"]) > 4
    assert sum(float(row[key]) for key in ("missed", "once", "twice or more")) == pytest.approx(100, abs=0.01)


def test_mistakes(work: Any) -> None:
    output = ["--output", str(work.output)]
    with pytest.raises(SystemExit, match="give --config-file to draw denoising, or --model"):
        main(["denoising", *output])
    with pytest.raises(SystemExit, match="DAB-DETR learns no denoising"):
        main(["denoising", "--config-file", work.config("DABDETR"), *output])
    with pytest.raises(SystemExit, match="has its denoising switched off"):
        main(["denoising", "--config-file", work.config("DNDETR"), *output, "MODEL.DN.GROUPS", "0"])
    work.without_boxes()
    with pytest.raises(SystemExit, match="has no true boxes"):
        main(["denoising", "--config-file", work.config("DNDETR"), *output])
    with pytest.raises(SystemExit, match="'shapes_val' has no object"):
        main(["denoising", "--model", work.config("DNDETR"), work.weights("DNDETR"), *output])
