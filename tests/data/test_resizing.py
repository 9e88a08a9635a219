"""Sizes of resized images: Detectron2's, and those of the papers' releases."""

from __future__ import annotations

import json
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.config import CfgNode
from detectron2.data import transforms as T
from PIL import Image

from detr_family.config import load_config
from detr_family.data.dataset_mapper import DETRDatasetMapper, ResizeShortestEdge, released_shape
from detr_family.inference import Predictor

ROOT = Path(__file__).resolve().parents[2]
COCO = ROOT.parent / "shared" / "data" / "coco_mini"

# (height, width), shorter side, longest, and the result by the releases' rule, worked out by hand.
BY_HAND = [
    ((480, 640), 800, 1333, (800, 1066)),  # 1066.67 is cut off, where rounding gives 1067
    ((640, 480), 800, 1333, (1066, 800)),
    ((427, 640), 800, 1333, (800, 1199)),  # 1199.06
    ((425, 640), 800, 1333, (800, 1204)),  # 1204.7
    ((333, 500), 480, 1333, (480, 720)),  # 720.7
    ((375, 500), 600, 1333, (600, 800)),
    ((500, 375), 375, 1333, (500, 375)),  # already so
    ((640, 200), 800, 1333, (1334, 417)),  # limit: 416.56 is rounded up, and the longer side passes it: 1334.4
    ((200, 640), 800, 1333, (417, 1334)),
    ((500, 240), 800, 1333, (1333, 640)),  # limit: 639.84; 1333.3
    ((240, 576), 800, 1333, (555, 1332)),  # limit: 555.42 is rounded down
    ((100, 1000), 800, 1333, (133, 1330)),  # 133.3
    ((7, 7), 800, 1333, (800, 800)),
]


@pytest.mark.parametrize(("shape", "size", "most", "expected"), BY_HAND, ids=str)
def test_sizes_are_those_worked_out_from_the_releases_rule(
    shape: tuple[int, int], size: int, most: int, expected: tuple[int, int]
) -> None:
    assert released_shape(*shape, size, most) == expected
    image = np.zeros((*shape, 3), np.uint8)
    resize = ResizeShortestEdge([size, size], most, rounding="detr")
    assert resize.get_transform(image).apply_image(image).shape[:2] == expected
    assert "rounding" in repr(resize)


def by_fractions(h: int, w: int, size: int, most: int) -> tuple[int, int]:
    """The releases' rule in exact arithmetic; what is not exact in floating point is at most a pixel off."""
    ratio = Fraction(max(h, w), min(h, w))
    if ratio * size > most:
        size = round(most / ratio)
    longer = int(ratio * size)
    return (longer, size) if w < h else (size, longer)


def test_all_sizes_of_coco_mini() -> None:
    if not COCO.is_dir():
        pytest.skip(f"needs images of COCO in {COCO}")
    records = [x for name in ("train", "val") for x in json.loads((COCO / f"{name}.json").read_text())["images"]]
    shapes = {(x["height"], x["width"]) for x in records}
    assert len(shapes) > 20
    differ = 0
    for h, w in shapes:
        for size in (*range(480, 801, 32), 400, 500, 600):
            new = released_shape(h, w, size, 1333)
            exact = by_fractions(h, w, size, 1333)
            assert max(abs(a - b) for a, b in zip(new, exact, strict=True)) <= (0 if new == exact else 1), (h, w, size)
            # A fraction of exactly nothing is the one case where floating point may cut off a whole pixel.
            assert new == exact or Fraction(max(h, w), min(h, w)) * min(new) % 1 == 0
            theirs = T.ResizeShortestEdge.get_output_shape(h, w, size, 1333)
            assert max(abs(a - b) for a, b in zip(new, theirs, strict=True)) <= 1 or max(new) > 1333
            differ += new != theirs
    assert differ > len(shapes)  # so the two rules are told apart


def small(opts: list[str] | None = None) -> CfgNode:
    keys = ["MODEL.DEVICE", "cpu", "INPUT.MIN_SIZE_TRAIN", "(50,)", "INPUT.MIN_SIZE_TEST", "50"]
    keys += ["INPUT.MAX_SIZE_TRAIN", "80", "INPUT.MAX_SIZE_TEST", "80"]
    return load_config(str(ROOT / "configs" / "detr_r50.yaml"), keys + (opts or []))


@pytest.mark.parametrize(("rounding", "expected"), [("detr", (50, 66)), ("detectron2", (50, 67))])
def test_training_crops_evaluation_and_prediction_resize_alike(
    rounding: str, expected: tuple[int, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Image.new("RGB", (40, 30)).save(tmp_path / "a.png")
    record = {"file_name": str(tmp_path / "a.png"), "height": 30, "width": 40, "image_id": 1, "annotations": []}
    cfg = small(["INPUT.RESIZE_ROUNDING", rounding, "INPUT.CROP.ENABLED", "False"])
    for training in (True, False):
        assert tuple(DETRDatasetMapper(cfg, training)(record)["image"].shape[1:]) == expected

    cfg = small(["INPUT.RESIZE_ROUNDING", rounding, "INPUT.CROP.RESIZE", "[50]", "INPUT.CROP.SIZE", "[500, 500]"])
    mapper = DETRDatasetMapper(cfg, True)
    first = mapper.augmentations.augs[0]
    monkeypatch.setattr(first, "prob", 1.0)
    monkeypatch.setattr(mapper.augmentations, "augs", [first])  # the resizing before the crop, which takes all of it
    assert tuple(mapper(record)["image"].shape[1:]) == expected

    class Seen(torch.nn.Module):
        def forward(self, inputs: list[dict[str, torch.Tensor]]) -> list[object]:
            shapes.extend(tuple(x["image"].shape[1:]) for x in inputs)
            raise KeyboardInterrupt

    shapes: list[tuple[int, ...]] = []
    predictor = Predictor(Seen(), min_size=50, max_size=80, resize_rounding=rounding)
    with pytest.raises(KeyboardInterrupt):
        predictor(str(tmp_path / "a.png"))
    assert shapes == [expected]


def test_the_papers_configs_resize_as_their_releases_and_a_wrong_name_is_told() -> None:
    for path in sorted((ROOT / "configs").glob("*.yaml")):
        assert load_config(str(path)).INPUT.RESIZE_ROUNDING == "detr", path
    assert load_config("").INPUT.RESIZE_ROUNDING == "detectron2"
    with pytest.raises(ValueError, match=r"INPUT\.RESIZE_ROUNDING is 'torchvision'"):
        DETRDatasetMapper(small(["INPUT.RESIZE_ROUNDING", "torchvision"]), False)
