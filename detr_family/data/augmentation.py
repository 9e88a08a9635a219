"""More augmentation by configuration: large-scale jitter, and any transforms of torchvision.transforms.v2.

* `INPUT.SCALE_JITTER` (arXiv 2012.07177, section 3): an image is scaled so that it fits into a square of SIZE times a
  factor between MIN_SCALE and MAX_SCALE, and cut to the square. It takes the place of the recipe's crop and resizing.
* `INPUT.TORCHVISION`: [name, arguments] of each transform, applied one after the other to what the resizing, cropping
  and flipping before it left. Boxes go along; what a transform leaves of one outside the image is cut off.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.data import transforms as T
from detectron2.structures import Boxes, Instances
from torchvision import tv_tensors
from torchvision.transforms import v2

_LEAST_SIDE = 1e-3  # of what is left of a box, pixels


def scale_jitter(cfg: CfgNode) -> list[T.Augmentation]:
    """Detectron2's augmentations for INPUT.SCALE_JITTER, without padding: batches are padded anyway.

    Raises:
        ValueError: factors or a size that cannot be.
    """
    jitter = cfg.INPUT.SCALE_JITTER
    if not 0 < jitter.MIN_SCALE <= jitter.MAX_SCALE or jitter.SIZE < 1:
        raise ValueError(
            f"INPUT.SCALE_JITTER has MIN_SCALE {jitter.MIN_SCALE}, MAX_SCALE {jitter.MAX_SCALE}, SIZE {jitter.SIZE}; "
            "the factors must be positive and in this order, the size a number of pixels"
        )
    size = jitter.SIZE
    return [T.ResizeScale(jitter.MIN_SCALE, jitter.MAX_SCALE, size, size), T.FixedSizeCrop((size, size), pad=False)]


class TorchvisionTransforms:
    """Transforms of torchvision.transforms.v2 on images with boxes.

    Args:
        steps: [name, arguments] each, as in INPUT.TORCHVISION; arguments called `transforms` are lists of such.
        image_format: of the images, "RGB" or "BGR"; the transforms see RGB.

    Raises:
        ValueError: another format, a step that is no such pair, a name that torchvision has not, arguments that it does
            not take.
    """

    def __init__(self, steps: Sequence[Any], image_format: str) -> None:
        if image_format not in ("RGB", "BGR"):
            raise ValueError(f"INPUT.TORCHVISION takes images in RGB or BGR, but INPUT.FORMAT is {image_format!r}")
        self.pipeline = v2.Compose([_step(step) for step in steps])
        self.bgr = image_format == "BGR"

    def __call__(self, mapped: dict[str, Any]) -> dict[str, Any]:
        """A model's input with its image and, where there are instances, gt_boxes and gt_classes transformed.

        Args:
            mapped: "image" (3, H, W) uint8, and maybe "instances"; left as it is.

        Raises:
            ValueError: a transform does not leave an image of 8 bits and three channels.
        """
        image = mapped["image"].flip(0) if self.bgr else mapped["image"]
        instances = mapped.get("instances", Instances(tuple(image.shape[1:])))
        boxes = instances.gt_boxes.tensor if "instances" in mapped else torch.zeros(0, 4)
        height, width = image.shape[1:]
        sample = {
            "image": tv_tensors.Image(image),
            "boxes": tv_tensors.BoundingBoxes(boxes, format="XYXY", canvas_size=(height, width)),
        }
        made = self.pipeline(sample)
        pixels = made["image"].as_subclass(torch.Tensor)
        if pixels.dtype != torch.uint8 or pixels.ndim != 3 or pixels.shape[0] != 3:
            raise ValueError(
                f"INPUT.TORCHVISION leaves an image of {tuple(pixels.shape)}, {pixels.dtype}; it must be (3, height, "
                "width) of uint8: leave out what changes the type or normalises"
            )
        result = {**mapped, "image": (pixels.flip(0) if self.bgr else pixels).contiguous()}
        if "instances" in mapped:
            height, width = pixels.shape[1:]
            corners = made["boxes"].as_subclass(torch.Tensor).clone()
            corners[:, 0::2] = corners[:, 0::2].clamp(0, width)
            corners[:, 1::2] = corners[:, 1::2].clamp(0, height)
            kept = ((corners[:, 2:] - corners[:, :2]) > _LEAST_SIDE).all(1)
            result["instances"] = Instances(
                (height, width), gt_boxes=Boxes(corners[kept]), gt_classes=instances.gt_classes[kept]
            )
        return result


def _step(step: Any) -> Any:
    """One transform from [name, arguments]."""
    if isinstance(step, str):
        step = [step, {}]
    if not (
        isinstance(step, (list, tuple)) and len(step) == 2 and isinstance(step[0], str) and isinstance(step[1], dict)
    ):
        raise ValueError(f"INPUT.TORCHVISION has the entry {step!r}; each must be [name, {{argument: value}}]")
    name, arguments = step
    known = [n for n in dir(v2) if isinstance(getattr(v2, n), type) and issubclass(getattr(v2, n), v2.Transform)]
    if name not in known:
        similar = difflib.get_close_matches(name, known, n=3)
        hint = f"; similar: {', '.join(similar)}" if similar else ""
        raise ValueError(f"INPUT.TORCHVISION names {name!r}, which torchvision.transforms.v2 does not have{hint}")
    if isinstance(arguments.get("transforms"), (list, tuple)):
        arguments = {**arguments, "transforms": [_step(inner) for inner in arguments["transforms"]]}
    try:
        return getattr(v2, name)(**arguments)
    except (TypeError, ValueError) as error:
        raise ValueError(f"INPUT.TORCHVISION: {name} does not take {arguments}: {error}") from error
