"""Denoising drawn as a training step gets it."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import tiny
import torch

from detr_family.analysis import denoising, loading
from detr_family.analysis.command_line import main

DENOISING = [name for name in tiny.DETECTORS if name in ("DNDETR", "DINO")]


@pytest.mark.parametrize("name", DENOISING)
def test_command_draws_what_the_detector_makes(name: str, work: Any) -> None:
    output = ["--output", str(work.output)]
    written = main(["denoising", "--config-file", work.config(name), *output, "MODEL.DN.BOX_NOISE", "0.4"])
    assert [p.name for p in written] == ["denoising.png", "denoising.svg", "denoising.json"]
    data = json.loads(written[2].read_text())
    queries, boxes = data["detectors"][0]["queries"], len(data["truth"])
    cfg = loading.load_cfg(work.config(name))
    height, width = loading.choose_image(cfg).image.shape[:2]
    positives = [q for q in queries if q["positive"]]
    assert len(positives) == boxes * (1 + max(q["group"] for q in queries))
    assert any(not q["positive"] for q in queries) == (name == "DINO")
    for query in positives:  # noise is at most once the box's size: the centre stays near
        x1, y1, x2, y2 = data["truth"][query["box"]]["box_xyxy"]
        x, y = query["box_cxcywh"][0] * width, query["box_cxcywh"][1] * height
        assert abs(x - (x1 + x2) / 2) <= 1.01 * (x2 - x1) and abs(y - (y1 + y2) / 2) <= 1.01 * (y2 - y1)


def test_noise_of_zero_gives_the_truth_back_and_a_seed_the_same(work: Any) -> None:
    cfg = loading.load_cfg(work.config("DNDETR"), ["MODEL.DN.BOX_NOISE", "0", "MODEL.DN.LABEL_NOISE", "0"])
    model, image = loading.load_detector(cfg, untrained=True), loading.choose_image(cfg)
    found = denoising.noised(model, image, seed=0)
    for x in found:
        np.testing.assert_allclose(image.in_pixels(torch.tensor(x.box_cxcywh)), image.truth_xyxy[x.box], atol=0.2)
        assert x.label == image.truth.gt_classes[x.box] and x.positive
    noisy = loading.load_detector(loading.load_cfg(work.config("DNDETR")), untrained=True)
    once, twice, other = (denoising.noised(noisy, image, seed) for seed in (1, 1, 2))
    assert all((a.box_cxcywh == b.box_cxcywh).all() for a, b in zip(once, twice, strict=True))
    assert any((a.box_cxcywh != b.box_cxcywh).any() for a, b in zip(once, other, strict=True))


def test_mistakes(work: Any) -> None:
    output = ["--output", str(work.output)]
    with pytest.raises(SystemExit, match="DAB-DETR learns no denoising"):
        main(["denoising", "--config-file", work.config("DABDETR"), *output])
    with pytest.raises(SystemExit, match="has its denoising switched off"):
        main(["denoising", "--config-file", work.config("DNDETR"), *output, "MODEL.DN.GROUPS", "0"])
    work.without_boxes()
    with pytest.raises(SystemExit, match="has no true boxes"):
        main(["denoising", "--config-file", work.config("DNDETR"), *output])
