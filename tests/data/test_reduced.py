"""JPEGs decoded smaller: boxes and sizes as of the whole image, pixels that differ little, and what is left whole."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from detectron2.config import CfgNode, get_cfg
from detectron2.structures import BoxMode
from PIL import Image

from detr_family import add_detr_family_config
from detr_family.data.dataset_mapper import DETRDatasetMapper
from detr_family.data.images import ImageError
from detr_family.data.reduced import largest_size, read_reduced

WIDTH, HEIGHT = 641, 480
BOX = [101.0, 80.0, 240.0, 160.0]


@pytest.fixture
def cfg() -> CfgNode:
    result = get_cfg()
    add_detr_family_config(result)
    result.INPUT.FORMAT, result.INPUT.DRAFT = "RGB", True
    result.INPUT.MIN_SIZE_TRAIN, result.INPUT.MAX_SIZE_TRAIN = (60, 90), 200
    result.INPUT.CROP.ENABLED = False
    result.INPUT.CROP.TYPE, result.INPUT.CROP.SIZE = "absolute_range", [38, 50]
    result.INPUT.CROP.RESIZE = [44, 56]
    return result


def photograph(path: Path, orientation: int = 1) -> dict[str, Any]:
    """A smooth image, white where the box is as it is shown, in a file turned by `orientation`."""
    y, x = np.mgrid[:HEIGHT, :WIDTH]
    pixels = np.stack([60 + 40 * np.sin(x / 90), 60 + 40 * np.cos(y / 70), 60 + 0 * x], 2).astype(np.uint8)
    left, top, width, height = (int(value) for value in BOX)
    pixels[top : top + height, left : left + width] = 255
    image, exif = Image.fromarray(pixels), Image.Exif()
    if orientation == 6:
        image = image.transpose(Image.Transpose.ROTATE_90)
        exif[0x0112] = 6
    image.save(path, exif=exif, **({"quality": 95} if path.suffix == ".jpg" else {}))
    box = {"bbox": BOX, "bbox_mode": BoxMode.XYWH_ABS, "category_id": 3, "iscrowd": 0}
    return {
        **{"file_name": str(path), "width": WIDTH, "height": HEIGHT, "image_id": 5},
        "annotations": [box, {**box, "bbox": [0, 0, 9, 9], "iscrowd": 1}],
    }


def mapped(cfg: CfgNode, record: dict[str, Any], draft: bool, seed: int) -> dict[str, Any]:
    cfg = cfg.clone()
    cfg.INPUT.DRAFT = draft
    np.random.seed(seed)
    result: dict[str, Any] = DETRDatasetMapper(cfg, True)(record)
    return result


@pytest.mark.parametrize("orientation", [1, 6])
@pytest.mark.parametrize("crop", [False, True])
def test_the_same_draws_give_the_same_view(cfg: CfgNode, tmp_path: Path, orientation: int, crop: bool) -> None:
    cfg.INPUT.CROP.ENABLED = crop
    record = photograph(tmp_path / "a.jpg", orientation)
    before = str(record)
    for seed in range(12):
        whole, reduced = (mapped(cfg, record, draft, seed) for draft in (False, True))
        assert reduced.keys() == whole.keys() and (reduced["height"], reduced["width"]) == (HEIGHT, WIDTH)
        sides = np.subtract(reduced["image"].shape, whole["image"].shape)
        assert reduced["image"].dtype == torch.uint8 and abs(sides).max() <= 1
        boxes = [one["instances"].gt_boxes.tensor for one in (whole, reduced)]
        assert len(boxes[0]) == len(boxes[1]) and reduced["instances"].gt_classes.tolist() == [3] * len(boxes[1])
        torch.testing.assert_close(*boxes, rtol=0, atol=1.2)
        h, w = np.minimum(reduced["image"].shape[1:], whole["image"].shape[1:])
        difference = (reduced["image"][:, :h, :w].float() - whole["image"][:, :h, :w].float()).abs()
        assert difference.mean() < 6  # most of it along the borders of the white box
    assert str(record) == before


def test_an_image_is_decoded_no_smaller_than_it_may_become(cfg: CfgNode, tmp_path: Path) -> None:
    record = photograph(tmp_path / "a.jpg")
    sizes = {}
    for side in (400, 200, 100, 90, 60):
        cfg.INPUT.MIN_SIZE_TRAIN, cfg.INPUT.MAX_SIZE_TRAIN = (20, side), 1000
        sizes[side] = read_reduced(record, cfg, "RGB")[0].shape[:2]
        assert all(has >= needs for has, needs in zip(sizes[side], largest_size(cfg, HEIGHT, WIDTH), strict=True))
    assert sizes == {400: (480, 641), 200: (240, 321), 100: (120, 161), 90: (120, 161), 60: (120, 161)}
    cfg.INPUT.MAX_SIZE_TRAIN = 60  # the longer side decides
    assert read_reduced(record, cfg, "RGB")[0].shape[:2] == (60, 81)
    cfg.INPUT.CROP.ENABLED, cfg.INPUT.CROP.RESIZE = True, [200]
    assert read_reduced(record, cfg, "RGB")[0].shape[:2] == (240, 321)
    cfg.INPUT.SCALE_JITTER.ENABLED, cfg.INPUT.SCALE_JITTER.SIZE = True, 150  # times 2
    assert read_reduced(record, cfg, "RGB")[0].shape[:2] == (240, 321)


@pytest.mark.parametrize("name", ["a.png", "a.jpg"])
def test_what_cannot_be_reduced_is_as_without(cfg: CfgNode, tmp_path: Path, name: str) -> None:
    record = photograph(tmp_path / name)
    if name == "a.jpg":
        cfg.INPUT.MIN_SIZE_TRAIN, cfg.INPUT.MAX_SIZE_TRAIN = (300,), 500
    whole, reduced = (mapped(cfg, record, draft, 3) for draft in (False, True))
    assert torch.equal(whole["image"], reduced["image"])
    torch.testing.assert_close(whole["instances"].gt_boxes.tensor, reduced["instances"].gt_boxes.tensor)
    cfg.INPUT.MIN_SIZE_TEST = 60
    assert DETRDatasetMapper(cfg, False).draft is None  # evaluations are as ever


def test_what_is_wrong_is_told_as_without(cfg: CfgNode, tmp_path: Path) -> None:
    record = photograph(tmp_path / "a.jpg")
    with pytest.raises(ImageError, match=r"a\.jpg: the image is 641x480 pixels, and 640x480 in the annotations"):
        mapped(cfg, {**record, "width": 640}, True, 0)
    (tmp_path / "a.jpg").write_bytes((tmp_path / "a.jpg").read_bytes()[:9000])
    with pytest.raises(ImageError, match=r"a\.jpg cannot be read"):
        mapped(cfg, record, True, 0)
    cfg.INPUT.MIN_SIZE_TRAIN = (0,)
    with pytest.raises(ValueError, match=r"INPUT\.DRAFT needs a resizing, but INPUT\.MIN_SIZE_TRAIN is \(0,\)"):
        DETRDatasetMapper(cfg, True)
    cfg.MODEL.MASK_ON = True
    with pytest.raises(ValueError, match=r"INPUT\.DRAFT reduces boxes alone"):
        DETRDatasetMapper(cfg, True)
