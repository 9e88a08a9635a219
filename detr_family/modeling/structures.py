"""The three things that detectors, matcher and criterion hand to each other.

Letters: N decoder layers, B images in the batch, Q queries, K class logits, T boxes of the whole batch,
M matched pairs of the whole batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from detectron2.structures import Instances
from torch import Tensor
from torchvision.ops import box_convert


@dataclass
class SetPrediction:
    """Predicted sets of every decoder layer, first layer first.

    Attributes:
        layer_logits: (N, B, Q, K) class logits.
        layer_boxes: (N, B, Q, 4) boxes as cxcywh in [0, 1] of the unpadded image.
    """

    layer_logits: Tensor
    layer_boxes: Tensor

    @property
    def logits(self) -> Tensor:
        """(B, Q, K) class logits of the last layer."""
        return self.layer_logits[-1]

    @property
    def boxes(self) -> Tensor:
        """(B, Q, 4) cxcywh boxes of the last layer."""
        return self.layer_boxes[-1]

    @property
    def aux(self) -> list[SetPrediction]:
        """One prediction per earlier decoder layer, first layer first."""
        return [self.layers(i, i + 1) for i in range(len(self.layer_logits) - 1)]

    def layers(self, start: int, stop: int | None = None) -> SetPrediction:
        """The prediction of decoder layers start..stop only."""
        return SetPrediction(self.layer_logits[start:stop], self.layer_boxes[start:stop])


@dataclass
class Targets:
    """Ground truth of a batch, all images behind each other.

    Attributes:
        labels: (T,) int64 contiguous classes.
        boxes_cxcywh: (T, 4) float32 in [0, 1] of the unpadded image.
        image: (T,) int64, the image of the batch that each box belongs to, ascending.
        counts: boxes per image, on the host.
    """

    labels: Tensor
    boxes_cxcywh: Tensor
    image: Tensor
    counts: list[int]

    @classmethod
    def from_instances(cls, instances: Sequence[Instances], device: torch.device) -> Targets:
        """Normalise the boxes of Detectron2's `Instances` by their own image's size.

        Args:
            instances: one per image, with `gt_boxes` (pixels, xyxy) and `gt_classes`; may be empty.
            device: where the result shall live; the boxes travel there in one copy.
        """
        counts = [len(x) for x in instances]
        boxes, labels = [], []
        for x in instances:
            height, width = x.image_size
            scale = torch.tensor([width, height, width, height], dtype=torch.float32)
            boxes.append(x.gt_boxes.tensor.float() / scale.to(x.gt_boxes.tensor.device))
            labels.append(x.gt_classes)
        image = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
        return cls(
            labels=torch.cat(labels).long().to(device, non_blocking=True),
            boxes_cxcywh=box_convert(torch.cat(boxes), "xyxy", "cxcywh").to(device, non_blocking=True),
            image=image.to(device, non_blocking=True),
            counts=counts,
        )

    def __len__(self) -> int:
        return sum(self.counts)


@dataclass
class Assignment:
    """Which query answers for which box; every layer has the same number M of pairs.

    Attributes:
        query: (N, M) int64, the query of its image.
        target: (N, M) int64, an index into `Targets`, which also tells the image.
    """

    query: Tensor
    target: Tensor

    def layers(self, start: int, stop: int | None = None) -> Assignment:
        """The pairs of decoder layers start..stop only."""
        return Assignment(self.query[start:stop], self.target[start:stop])

    def expand(self, num_layers: int) -> Assignment:
        """The pairs of one layer for each of `num_layers` layers."""
        return Assignment(self.query.expand(num_layers, -1), self.target.expand(num_layers, -1))
