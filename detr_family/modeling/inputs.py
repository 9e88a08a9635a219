"""Detectron2's dicts as a detector takes them: what is wrong with some is said before it does harm elsewhere."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from detectron2.structures import Boxes, Instances
from torch import Tensor

_NEEDED = (
    "[{'image': tensor of (3, height, width), ...}, ...]; images of other kinds are detr_family.inference.Predictor's"
)


def images_of(batched_inputs: Sequence[dict[str, Any]], channels: int) -> list[Tensor]:
    """The images of a batch, each (C, H, W).

    Args:
        batched_inputs: Detectron2's dicts.
        channels: that the detector sees.

    Raises:
        ValueError: it is no list of such dicts, or empty; an image without pixels or with other channels.
    """
    if isinstance(batched_inputs, (Mapping, Tensor, str)) or not batched_inputs:
        what = "an empty list" if isinstance(batched_inputs, (list, tuple)) else f"a {type(batched_inputs).__name__}"
        raise ValueError(f"a detector takes a list of Detectron2's dicts, not {what}: {_NEEDED}")
    for x in batched_inputs:
        image = x.get("image") if isinstance(x, Mapping) else x
        if not isinstance(x, Mapping) or not isinstance(image, Tensor):
            what = (
                f"a {type(image).__name__}" if image is not None else f"none, with the keys {', '.join(map(repr, x))}"
            )
            raise ValueError(f"a detector takes Detectron2's dicts with an 'image', a tensor, not {what}: {_NEEDED}")
        if image.dim() != 3 or image.shape[0] != channels or 0 in image.shape:
            raise ValueError(
                f"{_name(x)} has shape {tuple(image.shape)}; ({channels}, height, width) with at least one pixel is "
                "needed"
            )
    return [x["image"] for x in batched_inputs]


def instances_of(batched_inputs: Sequence[dict[str, Any]], num_classes: int) -> list[Instances]:
    """The ground truth of a batch, checked on the host before it can do harm on the device.

    Args:
        batched_inputs: Detectron2's dicts.
        num_classes: of the detector.

    Raises:
        ValueError: there is none, it lacks a field, or it holds what cannot be.
    """
    for x in batched_inputs:
        truth = x.get("instances")
        if truth is None:
            raise ValueError(
                f'{_name(x)} comes without ground truth (no "instances"): losses need a mapper for training '
                "(DETRDatasetMapper(cfg, is_train=True)), predictions a model in evaluation mode (model.eval())"
            )
        lacks = [name for name in ("gt_boxes", "gt_classes") if not (isinstance(truth, Instances) and truth.has(name))]
        if lacks:
            raise ValueError(
                f'{_name(x)} has "instances" without {" and ".join(lacks)}: a mapper for training gives Instances '
                "with gt_boxes (Boxes, corners in pixels) and gt_classes (whole numbers from 0)"
            )
        if not isinstance(truth.gt_boxes, Boxes):
            raise ValueError(
                f"{_name(x)} has gt_boxes of type {type(truth.gt_boxes).__name__}: detectron2.structures.Boxes is "
                "needed, corners in pixels"
            )
        if not truth.gt_classes.is_cuda:  # a look would wait for the device
            _check_values(truth, num_classes, _name(x))
    return [x["instances"] for x in batched_inputs]


def _check_values(truth: Instances, num_classes: int, name: str) -> None:
    wrong = truth.gt_classes[(truth.gt_classes < 0) | (truth.gt_classes >= num_classes)]
    if len(wrong):
        raise ValueError(
            f"{name} has a box of class {int(wrong[0])}, but the detector has classes 0 to {num_classes - 1}: set "
            "MODEL.DETR.NUM_CLASSES to the dataset's number of classes, or to -1 to take it from DATASETS.TRAIN"
        )
    boxes = truth.gt_boxes.tensor
    if not torch.isfinite(boxes).all():
        bad = boxes[~torch.isfinite(boxes).all(1)][0].tolist()
        raise ValueError(f"{name} has a box whose coordinates are not finite: {bad}; mend its annotation file")


def _name(x: Mapping[str, Any]) -> str:
    return str(x.get("file_name", "an image"))
