"""Test-time augmentation: an image at several sizes, as it is and mirrored, and what is found in all of them merged.

Detectron2's keys: `TEST.AUG.MIN_SIZES`, `MAX_SIZE` and `FLIP`. Merged are boxes of one class, by `TEST.AUG.MERGE`:
"wbf", weighted boxes fusion (arXiv 1910.13302), averages boxes that overlap, weighted with their scores, and lowers the
score of what is found in few of the views; "nms" keeps the best of those that overlap.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import transforms as T
from detectron2.structures import Boxes, Instances
from torch import Tensor, nn
from torchvision.ops import batched_nms, box_iou

from detr_family.data.dataset_mapper import ResizeShortestEdge

MERGES = ("wbf", "nms")


def augmented(cfg: CfgNode, model: nn.Module) -> nn.Module:
    """`model` with the test-time augmentation of a configuration, or `model` where TEST.AUG.ENABLED is False.

    Raises:
        ValueError: a setting of TEST.AUG that cannot be.
    """
    aug = cfg.TEST.AUG
    if not aug.ENABLED:
        return model
    return AugmentedDetector(
        model,
        min_sizes=aug.MIN_SIZES,
        max_size=aug.MAX_SIZE,
        flip=aug.FLIP,
        merge=aug.MERGE,
        iou=aug.MERGE_IOU,
        detections=cfg.TEST.DETECTIONS_PER_IMAGE,
        resize_rounding=cfg.INPUT.RESIZE_ROUNDING,
    )


class AugmentedDetector(nn.Module):
    """A detector that looks at several views of each image. It takes images of their own size, not resized.

    Args:
        model: with Detectron2's contract.
        min_sizes: shorter sides of the views, pixels.
        max_size: the most that a longer side may have.
        flip: look at each of them mirrored, too.
        merge: "wbf" or "nms".
        iou: from which overlap on two boxes of a class are one.
        detections: the most of an image.
        resize_rounding: INPUT.RESIZE_ROUNDING.

    Raises:
        ValueError: no sizes, or a merge or overlap that cannot be.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        min_sizes: Sequence[int],
        max_size: int,
        flip: bool,
        merge: str,
        iou: float,
        detections: int,
        resize_rounding: str,
    ) -> None:
        super().__init__()
        if not min_sizes or min(min_sizes) < 1:
            raise ValueError(f"TEST.AUG.MIN_SIZES is {tuple(min_sizes)}; give one or more sizes in pixels")
        if merge not in MERGES:
            raise ValueError(f"TEST.AUG.MERGE is {merge!r}; it may be {' or '.join(map(repr, MERGES))}")
        if not 0 < iou < 1:
            raise ValueError(f"TEST.AUG.MERGE_IOU is {iou}; it lies between 0 and 1")
        self.model = model
        self.num_classes = getattr(model, "num_classes", None)
        self.resizes = [ResizeShortestEdge([size, size], max_size, rounding=resize_rounding) for size in min_sizes]
        self.flip = flip
        self.merge, self.iou, self.detections = merge, iou, detections

    def forward(self, batched_inputs: Sequence[dict[str, Any]]) -> list[dict[str, Instances]]:
        """Detectron2's contract: "image" (C, H, W) uint8 in, "instances" in the size that height and width say out."""
        return [{"instances": self._detect(entry)} for entry in batched_inputs]

    def _detect(self, entry: dict[str, Any]) -> Instances:
        pixels = entry["image"].permute(1, 2, 0).cpu().numpy()
        height, width = entry.get("height", pixels.shape[0]), entry.get("width", pixels.shape[1])
        found = []
        for view, mirrored in self._views(pixels):
            (output,) = self.model([{**entry, "image": view, "height": height, "width": width}])
            instances = output["instances"].to("cpu")
            boxes = instances.pred_boxes.tensor
            if mirrored:
                boxes = torch.stack([width - boxes[:, 2], boxes[:, 1], width - boxes[:, 0], boxes[:, 3]], 1)
            found.append((boxes, instances.scores, instances.pred_classes))
        boxes, scores, classes = (torch.cat(part) for part in zip(*found, strict=True))
        if self.merge == "wbf":
            boxes, scores, classes = weighted_boxes_fusion(boxes, scores, classes, self.iou, len(found))
        else:
            kept = batched_nms(boxes, scores, classes, self.iou)
            boxes, scores, classes = boxes[kept], scores[kept], classes[kept]
        order = scores.argsort(descending=True, stable=True)[: self.detections]
        merged = Instances((height, width))
        merged.pred_boxes, merged.scores, merged.pred_classes = Boxes(boxes[order]), scores[order], classes[order]
        return merged

    def _views(self, pixels: np.ndarray) -> Iterator[tuple[Tensor, bool]]:
        """Views of an image (H, W, C) as tensors (C, h, w), and whether they are mirrored."""
        seen = set()
        for resize in self.resizes:
            made = T.AugInput(np.ascontiguousarray(pixels))
            resize(made)
            if made.image.shape in seen:  # MAX_SIZE makes several sizes the same
                continue
            seen.add(made.image.shape)
            for mirrored in (False, True) if self.flip else (False,):
                view = made.image[:, ::-1] if mirrored else made.image
                yield torch.as_tensor(np.ascontiguousarray(view.transpose(2, 0, 1))), mirrored


def weighted_boxes_fusion(
    boxes: Tensor, scores: Tensor, classes: Tensor, iou: float, views: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Weighted boxes fusion (arXiv 1910.13302, section 3).

    Args:
        boxes: (N, 4), x1, y1, x2, y2.
        scores: (N,).
        classes: (N,).
        iou: from which overlap with a cluster's box on a box joins it.
        views: that the boxes are from.

    Returns:
        Boxes (M, 4), scores (M,) and classes (M,): of each cluster the mean of its boxes, weighted with their scores,
        and the mean of its scores, times the share of views that it has boxes of.
    """
    fused_boxes, fused_scores, fused_classes = [], [], []
    for number in classes.unique():
        own = torch.nonzero(classes == number).flatten()
        own = own[scores[own].argsort(descending=True, stable=True)]
        sums = boxes.new_zeros((len(own), 4))  # of score times box
        totals, counts = boxes.new_zeros(len(own)), boxes.new_zeros(len(own))
        clusters = 0
        for i in own:
            place = clusters
            if clusters:
                overlap = box_iou(boxes[i][None], sums[:clusters] / totals[:clusters, None])[0]
                best = int(overlap.argmax())
                place = best if overlap[best] > iou else clusters
            weight = scores[i].clamp(min=1e-9)
            sums[place] += weight * boxes[i]
            totals[place] += weight
            counts[place] += 1
            clusters = max(clusters, place + 1)
        kept = slice(clusters)
        fused_boxes.append(sums[kept] / totals[kept, None])
        fused_scores.append(totals[kept] / counts[kept] * counts[kept].clamp(max=views) / views)
        fused_classes.append(number.expand(clusters))
    if not fused_boxes:
        return boxes, scores, classes
    return torch.cat(fused_boxes), torch.cat(fused_scores), torch.cat(fused_classes)
