"""Detectron2's dicts as a detector takes them: what is wrong with some is said before it does harm elsewhere."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from detectron2.structures import Boxes, Instances, RotatedBoxes
from detectron2.utils.logger import log_first_n
from torch import Tensor, nn

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
    if not isinstance(batched_inputs, Sequence) or isinstance(batched_inputs, str) or not batched_inputs:
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
                f"needed: MODEL.PIXEL_MEAN has {channels} value{'' if channels == 1 else 's'}"
            )
        if image.is_floating_point() and image.device.type == "cpu" and not torch.jit.is_tracing():
            _tell_of_small_values(image, _name(x))
    return [x["image"] for x in batched_inputs]


def _tell_of_small_values(image: Tensor, name: str) -> None:
    most = float(image.max())
    if 0 < most <= 1:
        log_first_n(
            logging.WARNING,
            f"{name} has values of at most {most:.3g}, and detectors take 0 to 255: multiply what was scaled to 0 to 1 "
            "(torchvision's ToTensor does that) by 255; what was normalised is to be given as it was before",
            name=__name__,
        )


def size_of(x: Mapping[str, Any], default: tuple[int, int]) -> tuple[int, int]:
    """Height and width of the result that a dict asks for.

    Args:
        x: one of Detectron2's dicts; "height" and "width" may be left out or None.
        default: of the image as it is.

    Raises:
        ValueError: they are no whole numbers above 0.
    """
    if torch.jit.is_tracing():  # numbers that a trace follows
        return x.get("height", default[0]), x.get("width", default[1])
    sizes = []
    for key, size in zip(("height", "width"), default, strict=True):
        given = x.get(key)
        try:
            whole = size if given is None else int(given)
            fits = whole > 0 and (given is None or bool(whole == given))
        except (TypeError, ValueError, RuntimeError):
            fits = False
        if not fits:
            raise ValueError(
                f"{_name(x)} asks for a result of {key} {given!r}: a whole number of pixels above 0 is needed, or none "
                "for that of the image given"
            )
        sizes.append(whole)
    return sizes[0], sizes[1]


def explain_boxes(batched_inputs: Sequence[dict[str, Any]], model: nn.Module) -> str:
    """Why predicted boxes are not finite: the image, the weights, or their type."""
    for x in batched_inputs:
        if not torch.isfinite(x["image"]).all():
            return f"{_name(x)} has values that are not finite"
    for name, parameter in model.named_parameters():
        if not torch.isfinite(parameter).all():
            return f"the detector's weights are not finite ({name}): load a checkpoint of before the training diverged"
    dtype = next(model.parameters()).dtype
    if dtype == torch.float16 or torch.is_autocast_enabled(batched_inputs[0]["image"].device.type):
        return "numbers grew past float16's range: use bfloat16 or float32"
    return "the detector gives numbers that are not finite"


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
        if not isinstance(truth.gt_boxes, Boxes) or isinstance(truth.gt_boxes, RotatedBoxes):
            raise ValueError(
                f"{_name(x)} has gt_boxes of type {type(truth.gt_boxes).__name__}: detectron2.structures.Boxes is "
                "needed, corners in pixels"
            )
        if not isinstance(truth.gt_classes, Tensor) or truth.gt_classes.dim() != 1:
            kind = type(truth.gt_classes).__name__
            shape = f" of shape {tuple(truth.gt_classes.shape)}" if hasattr(truth.gt_classes, "shape") else ""
            raise ValueError(f"{_name(x)} has gt_classes in a {kind}{shape}: a torch.Tensor of shape (n,) is needed")
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
    if truth.gt_classes.is_floating_point() and not torch.equal(truth.gt_classes, truth.gt_classes.round()):
        raise ValueError(f"{name} has gt_classes {truth.gt_classes.tolist()[:5]}: whole numbers from 0 are needed")
    boxes = truth.gt_boxes.tensor
    if not torch.isfinite(boxes).all():
        bad = boxes[~torch.isfinite(boxes).all(1)][0].tolist()
        raise ValueError(f"{name} has a box whose coordinates are not finite: {bad}; mend its annotation file")
    reversed_ = (boxes[:, 2:] < boxes[:, :2]).any(1)
    if reversed_.any():
        raise ValueError(
            f"{name} has a box whose right or lower edge lies before its left or upper one: "
            f"{boxes[reversed_][0].tolist()}; gt_boxes are corners (x0, y0, x1, y1) in pixels, not x, y, width, height"
        )


def _name(x: Mapping[str, Any]) -> str:
    return str(x.get("file_name", "an image"))
