"""Augmentation by configuration: boxes stay on their objects, whatever the transforms."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from detectron2.config import CfgNode, get_cfg
from detectron2.structures import BoxMode
from PIL import Image
from torch import Tensor

from detr_family import add_detr_family_config
from detr_family.data.dataset_mapper import DETRDatasetMapper

BOX = (30, 20, 90, 60)  # white on black, in an image of 160x120


@pytest.fixture
def record(tmp_path: Path) -> dict[str, Any]:
    pixels = np.zeros((120, 160, 3), np.uint8)
    pixels[BOX[1] : BOX[3], BOX[0] : BOX[2]] = 255
    Image.fromarray(pixels).save(tmp_path / "a.png")
    annotation = {"bbox": list(BOX), "bbox_mode": BoxMode.XYXY_ABS, "category_id": 1, "iscrowd": 0}
    crowd = {**annotation, "iscrowd": 1}
    size = {"height": 120, "width": 160}
    return {"file_name": str(tmp_path / "a.png"), **size, "image_id": 1, "annotations": [annotation, crowd]}


def cfg_with(steps: list[Any], **jitter: Any) -> CfgNode:
    cfg = get_cfg()
    add_detr_family_config(cfg)
    cfg.INPUT.MIN_SIZE_TRAIN, cfg.INPUT.RANDOM_FLIP, cfg.INPUT.FORMAT = (120,), "none", "RGB"
    cfg.INPUT.TORCHVISION = steps
    for key, value in jitter.items():
        cfg.INPUT.SCALE_JITTER[key] = value
    return cfg


def object_in(image: Tensor) -> list[int] | None:
    """The white rectangle's corners."""
    rows, columns = (torch.nonzero(image.amax(0).amax(i) > 127).flatten() for i in (1, 0))
    return [int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1] if len(rows) else None


PIPELINES = {
    "flips": [["RandomHorizontalFlip", {"p": 1.0}], ["RandomVerticalFlip", {"p": 0.5}]],
    "zoom out": [["RandomZoomOut", {"fill": 0, "p": 1.0, "side_range": [1.5, 2.0]}]],
    "crop": [["RandomCrop", {"size": [80, 100]}]],
    "IoU crop": ["RandomIoUCrop"],
    "moved": [["RandomAffine", {"degrees": 0, "translate": [0.3, 0.3], "scale": [0.6, 1.4]}]],
    "nested": [
        ["RandomApply", {"p": 1.0, "transforms": [["RandomHorizontalFlip", {"p": 1.0}], "RandomPhotometricDistort"]}]
    ],
}


@pytest.mark.parametrize("name", PIPELINES)
def test_boxes_stay_on_their_objects(name: str, record: dict[str, Any]) -> None:
    mapper = DETRDatasetMapper(cfg_with(PIPELINES[name]), True)
    moved = 0
    for seed in range(12):
        torch.manual_seed(seed)
        np.random.seed(seed)
        mapped = mapper(record)
        image, truth = mapped["image"], mapped["instances"]
        assert image.dtype == torch.uint8 and truth.image_size == tuple(image.shape[1:])
        seen = object_in(image)
        if len(truth):
            assert truth.gt_classes.tolist() == [1] and seen is not None
            assert torch.allclose(truth.gt_boxes.tensor[0], torch.tensor(seen, dtype=torch.float32), atol=1.01)
            moved += seen != list(BOX)
        else:  # RandomIoUCrop drops objects whose centre is cut off, and others what is cut off as a whole
            assert name in ("crop", "IoU crop", "moved")
    assert moved


@pytest.mark.parametrize("image_format", ["RGB", "BGR"])
def test_transforms_see_rgb(image_format: str, tmp_path: Path, record: dict[str, Any]) -> None:
    Image.new("RGB", (160, 120), (200, 0, 0)).save(record["file_name"])
    cfg = cfg_with([["RandomGrayscale", {"p": 1.0}]])
    cfg.INPUT.FORMAT = image_format
    assert int(DETRDatasetMapper(cfg, True)(record)["image"][0, 0, 0]) == pytest.approx(0.2989 * 200, abs=1)


def test_jitter_scales_and_cuts_to_a_square(record: dict[str, Any]) -> None:
    mapper = DETRDatasetMapper(cfg_with([], ENABLED=True, MIN_SCALE=0.5, MAX_SCALE=2.0, SIZE=100), True)
    shapes = set()
    for seed in range(20):
        np.random.seed(seed)
        mapped = mapper(record)
        shapes.add(tuple(mapped["image"].shape[1:]))
        assert max(shapes)[0] <= 100
        if len(mapped["instances"]):
            seen = torch.tensor(object_in(mapped["image"]), dtype=torch.float32)
            assert torch.allclose(mapped["instances"].gt_boxes.tensor[0], seen, atol=1.5)
    assert len(shapes) > 10 and (100, 100) in shapes


def test_evaluation_is_not_augmented(record: dict[str, Any]) -> None:
    cfg = cfg_with([["RandomHorizontalFlip", {"p": 1.0}]], ENABLED=True)
    cfg.INPUT.MIN_SIZE_TEST = 120
    assert object_in(DETRDatasetMapper(cfg, False)(record)["image"]) == list(BOX)


@pytest.mark.parametrize(
    ("steps", "said"),
    [
        ([["RandomHorizontalFlp", {}]], "similar: RandomHorizontalFlip"),
        ([["RandomHorizontalFlip", {"q": 1}]], "RandomHorizontalFlip does not take"),
        ([["RandomHorizontalFlip"]], "each must be"),
        ([["functional", {}]], "does not have"),
    ],
)
def test_steps_that_cannot_be(steps: list[Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        DETRDatasetMapper(cfg_with(steps), True)


def test_a_type_that_the_model_does_not_take_and_factors_that_cannot_be(record: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="of uint8"):
        DETRDatasetMapper(cfg_with([["ToDtype", {"dtype": torch.float32}]]), True)(record)
    with pytest.raises(ValueError, match=r"MIN_SCALE 2\.0, MAX_SCALE 1\.0"):
        DETRDatasetMapper(cfg_with([], ENABLED=True, MIN_SCALE=2.0, MAX_SCALE=1.0), True)
    cfg = cfg_with(["RandomIoUCrop"])
    cfg.INPUT.FORMAT = "L"
    with pytest.raises(ValueError, match=r"INPUT\.FORMAT is 'L'"):
        DETRDatasetMapper(cfg, True)
