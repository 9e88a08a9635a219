"""Bipartite matching of predictions and ground truth (DETR, section 3.1, equation 1)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torchvision.ops import box_convert

from detr_family.layers.boxes import generalized_iou
from detr_family.modeling.structures import Assignment, SetPrediction, Targets

ClassCost = Callable[[Tensor, Tensor, Tensor], Tensor]


def softmax_class_cost(layer_logits: Tensor, image: Tensor, labels: Tensor) -> Tensor:
    """-p(label) with p the softmax over all classes and no-object: the paper drops the logarithm here.

    Args:
        layer_logits: (N, B, Q, K).
        image: (T,) the image of each box.
        labels: (T,) the class of each box.

    Returns:
        (N, T, Q).
    """
    log_total = layer_logits.logsumexp(-1)[:, image]  # N x T x Q
    logits = layer_logits[:, image, :, labels].transpose(0, 1)  # N x T x Q
    return -(logits - log_total).exp()


@dataclass(frozen=True)
class FocalClassCost:
    """The focal loss of the label's logit as a positive, less that as a negative (Deformable DETR's release).

    Attributes:
        alpha: weight of positives.
        gamma: exponent of what is not yet right.
    """

    alpha: float
    gamma: float

    def __call__(self, layer_logits: Tensor, image: Tensor, labels: Tensor) -> Tensor:
        """As `softmax_class_cost`, for sigmoid classifiers: (N, B, Q, K), (T,), (T,) -> (N, T, Q)."""
        p = layer_logits[:, image, :, labels].transpose(0, 1).sigmoid()  # N x T x Q
        eps = 1e-8  # the releases'
        positive = -self.alpha * (1 - p) ** self.gamma * (p + eps).log()
        negative = -(1 - self.alpha) * p**self.gamma * (1 - p + eps).log()
        return positive - negative


class HungarianMatcher:
    """The one-to-one assignment of least total cost, for every image and decoder layer at once.

    The cost of every pair exists only within its image, in one (N, T, Q) tensor which makes the only copy
    to the host of the whole loss. It is computed in float32 whatever the autocast state, and a NaN in it does
    not stop the assignment: the loss of such a batch is NaN, and what is wrong is told from there.

    Args:
        class_cost: (layer_logits, image, labels) -> (N, T, Q), see `softmax_class_cost`.
        cost_class: weight of the class term.
        cost_l1: weight of the L1 distance of cxcywh boxes.
        cost_giou: weight of the negative generalised IoU.

    Raises:
        ValueError: all three weights are zero.
    """

    def __init__(self, *, class_cost: ClassCost, cost_class: float, cost_l1: float, cost_giou: float) -> None:
        if cost_class == cost_l1 == cost_giou == 0:
            raise ValueError("the matching needs a cost: MODEL.DETR.COST.CLASS, L1 and GIOU are all 0")
        self.class_cost = class_cost
        self.cost_class = cost_class
        self.cost_l1 = cost_l1
        self.cost_giou = cost_giou

    @torch.no_grad()
    def cost(self, prediction: SetPrediction, targets: Targets) -> Tensor:
        """Cost of each box of the batch against each query of its own image, (N, T, Q) float32."""
        with torch.autocast(prediction.layer_logits.device.type, enabled=False):
            boxes = prediction.layer_boxes.float()[:, targets.image]  # N x T x Q x 4
            truth = targets.boxes_cxcywh[:, None]  # T x 1 x 4
            cost = self.cost_class * self.class_cost(prediction.layer_logits.float(), targets.image, targets.labels)
            cost = cost + self.cost_l1 * (boxes - truth).abs().sum(-1)
            return cost - self.cost_giou * generalized_iou(
                box_convert(boxes, "cxcywh", "xyxy"), box_convert(truth, "cxcywh", "xyxy")
            )

    @torch.no_grad()
    def __call__(self, prediction: SetPrediction, targets: Targets) -> Assignment:
        """Match every layer of `prediction`.

        Returns:
            Assignment with M = sum over images of min(Q, boxes of the image).
        """
        from scipy.optimize import linear_sum_assignment  # a fifth of the time of importing this package

        num_layers = len(prediction.layer_logits)
        device = prediction.layer_logits.device
        # Where a cost is not a number any assignment is as good as another.
        cost = torch.nan_to_num(self.cost(prediction, targets), nan=1e6, posinf=1e6, neginf=-1e6)
        host = cost.cpu().numpy()
        query, target = [], []
        for layer in range(num_layers):
            start = 0
            for count in targets.counts:
                if count:
                    box, slot = linear_sum_assignment(host[layer, start : start + count])
                    query.append(torch.from_numpy(slot))
                    target.append(torch.from_numpy(box + start))
                start += count
        if not query:
            none = torch.empty((num_layers, 0), dtype=torch.long, device=device)
            return Assignment(none, none)
        pairs = torch.stack([torch.cat(query), torch.cat(target)]).view(2, num_layers, -1).to(device, non_blocking=True)
        return Assignment(query=pairs[0], target=pairs[1])
