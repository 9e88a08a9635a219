"""A whole detector as a function of tensors: what the exporters trace.

It calls the detector's own parts, so that what is exported is what is trained and evaluated; only the lists of images
at the front and Detectron2's `Instances` at the end are left out.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from detectron2.structures import ImageList
from torch import Tensor, nn

from detr_family.layers.deformable_attention import pure_torch_path
from detr_family.layers.shapes import int_tensor
from detr_family.modeling.postprocessing import boxes_in_pixels
from detr_family.modeling.set_detector import SetDetector

TENSORRT_DOMAIN, TENSORRT_PLUGIN = "trt.plugins", "MultiscaleDeformableAttnPlugin_TRT"


class DetectionGraph(nn.Module):
    """Images of one tensor in, detections of fixed number out.

    Args:
        model: the detector; a copy of it, in evaluation mode, is taken.
        input_format: the channel order that it was trained with (INPUT.FORMAT), "RGB" or "BGR".
        device: where the copy goes.
    """

    def __init__(self, model: SetDetector, *, input_format: str, device: torch.device) -> None:
        super().__init__()
        self.model = copy.deepcopy(model).to(device).eval().requires_grad_(False)
        self.flip = input_format == "BGR"

    def forward(self, images: Tensor, sizes: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Normalise, predict, choose the best.

        Args:
            images: (B, 3, H, W) uint8, RGB.
            sizes: (B, 2) int64, the height and width that each image fills before the padding at the right and below;
                0 stands for all of it. None: no image is padded, and all that follows from sizes is constant where
                the shape of `images` is.

        Returns:
            boxes (B, k, 4) as x1, y1, x2, y2 in pixels of `images`, clipped to the image; scores (B, k) in descending
            order; labels (B, k) int64.
        """
        model = self.model
        batch, _, height, width = images.shape
        pixels = images.flip(1) if self.flip else images
        pixels = model.normalize(pixels)
        if sizes is None:  # fixed: numbers also while tracing
            scores, labels, boxes = model.detect(pixels, None)
            sizes = torch.tensor([(int(height), int(width))] * int(batch), device=images.device)
        else:
            sizes = torch.where(sizes > 0, sizes, int_tensor([[height, width]], images.device))
            padding = model.padding_mask(ImageList(pixels, sizes))
            scores, labels, boxes = model.detect(pixels.masked_fill(padding[:, None], 0.0), sizes)
        return boxes_in_pixels(boxes, sizes), scores, labels


def tensorrt_node(value: Tensor, shapes: Tensor, starts: Tensor, locations: Tensor, weights: Tensor) -> Tensor:
    """Deformable attention as a node that TensorRT replaces by its own plugin of that name; it computes nothing here.

    Inputs and output are those of multiscaleDeformableAttnPlugin's description: value (B, S, M, D), spatial shapes
    (L, 2) and level starts (L,) as int32, locations (B, Q, M, L, P, 2) and weights (B, Q, M, L, P) to (B, Q, M, D).

    Returns:
        (B, Q, M*D), as `ms_deform_attn`.
    """
    batch, queries = locations.shape[:2]
    output: Tensor = torch.onnx.ops.symbolic(
        f"{TENSORRT_DOMAIN}::{TENSORRT_PLUGIN}",
        (value, shapes.int(), starts.int(), locations, weights),
        {"plugin_version": "1", "plugin_namespace": ""},
        dtype=value.dtype,
        shape=(batch, queries, *value.shape[2:]),
        version=1,
    )
    return output.flatten(2)


@contextmanager
def traceable(*, native: bool, plugin: bool = False) -> Iterator[None]:
    """For tracing: no gradients, attention in its plain form.

    Args:
        native: deformable attention as this package's operator.
        plugin: as the node of TensorRT's plugin, which only an ONNX file can hold.
    """
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with torch.no_grad():
            if native:
                yield
            else:
                with pure_torch_path(tensorrt_node if plugin else None):
                    yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
