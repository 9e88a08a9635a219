"""JPEGs decoded at a half, a quarter or an eighth of their size, if training makes them smaller anyway (INPUT.DRAFT).

libjpeg can leave out the finest frequencies while it decodes (PIL's `Image.draft`), which takes a fraction of the time.
What is left is at least as large as the largest size that the augmentation may give the image: nothing is enlarged that
would not be. The augmentation draws the same sizes, crops and flips; pixels differ by the filter, and a side by one
pixel at most, since the reduced image's sides are rounded.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from detectron2.config import CfgNode
from detectron2.data.detection_utils import SizeMismatchError, convert_PIL_to_numpy
from detectron2.structures import BoxMode
from detectron2.utils.file_io import PathManager
from PIL import Image, ImageOps

from detr_family.data.images import is_turned


def check_draft(cfg: CfgNode) -> None:
    """Whether the augmentation of a configuration can be given reduced images.

    Raises:
        ValueError: it resizes none, or masks, keypoints or proposals are wanted, which are not reduced here.
    """
    if cfg.MODEL.MASK_ON or cfg.MODEL.KEYPOINT_ON or cfg.MODEL.LOAD_PROPOSALS:
        raise ValueError("INPUT.DRAFT reduces boxes alone: not with MODEL.MASK_ON, KEYPOINT_ON or LOAD_PROPOSALS")
    if not cfg.INPUT.SCALE_JITTER.ENABLED and min(cfg.INPUT.MIN_SIZE_TRAIN) < 1:
        raise ValueError(f"INPUT.DRAFT needs a resizing, but INPUT.MIN_SIZE_TRAIN is {cfg.INPUT.MIN_SIZE_TRAIN}")


def largest_size(cfg: CfgNode, height: int, width: int) -> tuple[int, int]:
    """The largest size that a configuration's training scales an image to, before any crop: height, width in pixels."""
    shorter, longer = min(height, width), max(height, width)
    if cfg.INPUT.SCALE_JITTER.ENABLED:
        scale = cfg.INPUT.SCALE_JITTER.SIZE * cfg.INPUT.SCALE_JITTER.MAX_SCALE / longer
    else:
        scale = min(max(cfg.INPUT.MIN_SIZE_TRAIN) / shorter, cfg.INPUT.MAX_SIZE_TRAIN / longer)
        if cfg.INPUT.CROP.ENABLED:  # what is cropped is resized to this before
            scale = max(scale, max(cfg.INPUT.CROP.RESIZE) / shorter)
    return math.ceil(height * scale), math.ceil(width * scale)


def read_reduced(record: dict[str, Any], cfg: CfgNode, image_format: str) -> tuple[np.ndarray, tuple[float, float]]:
    """An image, reduced where it may be, and the factors of its width and height.

    Args:
        record: Detectron2's dict of the image.
        cfg: reads INPUT.
        image_format: "RGB", "BGR" or another of Detectron2's INPUT.FORMAT.

    Returns:
        (H, W, C) uint8, turned by its EXIF orientation; and what box coordinates are multiplied by.

    Raises:
        SizeMismatchError: the image is of another size than the record says.
    """
    with PathManager.open(record["file_name"], "rb") as file, Image.open(file) as image:
        turned = is_turned(image)
        width, height = image.size[::-1] if turned else image.size
        if (width, height) != (record.get("width", width), record.get("height", height)):
            raise SizeMismatchError(
                f"the image is {width}x{height} pixels, and {record['width']}x{record['height']} in the annotations."
            )
        needed = largest_size(cfg, height, width)
        image.draft(None, needed if turned else needed[::-1])  # None: the mode as it is
        pixels: np.ndarray = convert_PIL_to_numpy(ImageOps.exif_transpose(image), image_format)
    return pixels, (pixels.shape[1] / width, pixels.shape[0] / height)


def scaled(annotations: Sequence[dict[str, Any]], factors: tuple[float, float]) -> list[dict[str, Any]]:
    """Annotations whose boxes are multiplied by the factors of width and height; others are left as they are."""
    result = []
    for annotation in annotations:
        box = np.asarray(BoxMode.convert(annotation["bbox"], annotation["bbox_mode"], BoxMode.XYXY_ABS))
        result.append({**annotation, "bbox": (box * (factors * 2)).tolist(), "bbox_mode": BoxMode.XYXY_ABS})
    return result
