"""Arithmetic of boxes: generalised IoU element by element (arXiv 1902.09630, algorithm 1), and logits."""

from __future__ import annotations

import torch
from torch import Tensor


def generalized_iou(boxes1_xyxy: Tensor, boxes2_xyxy: Tensor) -> Tensor:
    """GIoU of boxes that broadcast against each other: one pair per element, or a matrix with extra axes.

    torchvision's `generalized_box_iou` pairs all with all, which costs batch x batch when several images
    are matched at once, and gives NaN for two boxes without area; fvcore's `giou_loss` adds an eps that is
    felt by small boxes in normalised coordinates.

    Args:
        boxes1_xyxy: (..., 4), any unit.
        boxes2_xyxy: (..., 4), the same unit.

    Returns:
        (...) in [-1, 1]. Boxes without area give finite values and gradients; nothing is asserted.
    """
    tiny = torch.finfo(boxes1_xyxy.dtype).tiny
    # The intersection's and the hull's corners.
    inter = torch.min(boxes1_xyxy[..., 2:], boxes2_xyxy[..., 2:]) - torch.max(
        boxes1_xyxy[..., :2], boxes2_xyxy[..., :2]
    )
    hull = torch.max(boxes1_xyxy[..., 2:], boxes2_xyxy[..., 2:]) - torch.min(boxes1_xyxy[..., :2], boxes2_xyxy[..., :2])
    inter_area = inter.clamp(min=0).prod(-1)
    hull_area = hull.clamp(min=0).prod(-1)
    area1 = (boxes1_xyxy[..., 2:] - boxes1_xyxy[..., :2]).prod(-1)
    area2 = (boxes2_xyxy[..., 2:] - boxes2_xyxy[..., :2]).prod(-1)
    union = area1 + area2 - inter_area
    iou = inter_area / union.clamp(min=tiny)
    return iou - (hull_area - union) / hull_area.clamp(min=tiny)


def inverse_sigmoid(x: Tensor, eps: float) -> Tensor:
    """The logit of `x`, kept finite: probability and complement are raised to `eps`.

    Args:
        x: any shape; values outside of [0, 1] count as 0 or 1.
        eps: 1e-5 in Conditional and Deformable DETR, 1e-3 from DAB-DETR on: the papers' weights depend on it.
    """
    # Not clamped twice in a row, which an optimiser of ONNX graphs (onnxscript 0.7) merges into a broken one.
    return (x.clamp(eps, 1.0) / (1 - x.clamp(0.0, 1.0)).clamp(min=eps)).log()
