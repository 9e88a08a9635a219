"""The set loss of matched predictions (DETR, section 3.1, equation 2, and appendix A.2).

Matching is not done here: the criterion takes pairs, so that denoising can bring those it knows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from detectron2.utils import comm
from torch import Tensor
from torchvision.ops import box_convert, sigmoid_focal_loss

from detr_family.layers.boxes import generalized_iou
from detr_family.modeling.structures import Assignment, SetPrediction, Targets

ClassLoss = Callable[[Tensor, Tensor, "Tensor | float"], Tensor]


def mean_over_ranks(value: Tensor) -> Tensor:
    """The mean of a tensor over all processes; the tensor itself where there is one process."""
    if comm.get_world_size() == 1:
        return value
    total = value.clone()
    dist.all_reduce(total)
    return total / comm.get_world_size()


@dataclass(frozen=True)
class _WholeBatch:
    box_counts: Sequence[int]
    parts: int


_whole_batch: ContextVar[_WholeBatch | None] = ContextVar("whole_batch", default=None)


@contextmanager
def part_of_batch(box_counts: Sequence[int], parts: int) -> Iterator[None]:
    """Losses computed inside are of one of `parts` equal parts of a batch whose gradients are accumulated.

    What a loss is divided by is then averaged over the parts as it is over processes, so that the mean of the
    parts' losses is the loss of the whole batch: a part is to a process what a process is to the run.

    Args:
        box_counts: boxes of every image of this process's whole batch.
        parts: how many parts it is computed in.
    """
    token = _whole_batch.set(_WholeBatch(box_counts, parts))
    try:
        yield
    finally:
        _whole_batch.reset(token)


def mean_num_boxes(targets: Targets) -> Tensor:
    """0-d float32: boxes of the batch, averaged over all processes and over the parts of an accumulated batch.

    At least one box in all of them together: so the loss never depends on how a batch is split.
    """
    whole = _whole_batch.get() or _WholeBatch(targets.counts, 1)
    mean = sum(whole.box_counts) / whole.parts
    count = torch.full((), mean, device=targets.labels.device)  # filled there: a copy would wait for the device
    return mean_over_ranks(count).clamp(min=1 / (whole.parts * comm.get_world_size()))


@dataclass(frozen=True)
class SoftmaxClassLoss:
    """Cross-entropy over K - 1 classes and no-object, the last logit.

    The weights that its weighted mean divides by are averaged over all processes, and over the parts of an
    accumulated batch, which the release does not do: so the loss is the same however a batch is split, and with one
    process it is the release's.

    Attributes:
        no_object_weight: the weight of no-object (0.1 in DETR), against the imbalance of classes.
    """

    no_object_weight: float

    def __call__(self, layer_logits: Tensor, classes: Tensor, num_boxes: Tensor | float) -> Tensor:
        """Loss of every layer.

        Args:
            layer_logits: (N, B, Q, K).
            classes: (N, B, Q) int64, K - 1 where nothing is matched.
            num_boxes: not used here, the mean is over queries.

        Returns:
            (N,).
        """
        weight = layer_logits.new_ones(layer_logits.shape[-1])
        weight[-1] = self.no_object_weight
        loss = F.cross_entropy(layer_logits.flatten(0, 2), classes.flatten(), weight, reduction="none")
        weights = weight[classes].flatten(1).sum(1)
        whole = _whole_batch.get()
        if whole is not None:  # how many queries are matched is known before they are
            queries = layer_logits.shape[2]
            matched = sum(min(count, queries) for count in whole.box_counts)
            unmatched = len(whole.box_counts) * queries - matched
            weights = torch.full_like(weights, (matched + unmatched * self.no_object_weight) / whole.parts)
        return loss.view(len(layer_logits), -1).sum(1) / mean_over_ranks(weights)


@dataclass(frozen=True)
class FocalClassLoss:
    """Sigmoid focal loss over K classes; a query without a box is a negative of all (arXiv 1708.02002).

    Attributes:
        alpha: weight of positives.
        gamma: exponent of what is not yet right.
    """

    alpha: float
    gamma: float

    def __call__(self, layer_logits: Tensor, classes: Tensor, num_boxes: Tensor | float) -> Tensor:
        """Loss of every layer, summed over queries and divided by the number of boxes.

        Args:
            layer_logits: (N, B, Q, K).
            classes: (N, B, Q) int64, K where nothing is matched.
            num_boxes: a number, or 0-d.

        Returns:
            (N,).
        """
        truth = F.one_hot(classes, layer_logits.shape[-1] + 1)[..., :-1].to(layer_logits.dtype)
        loss = sigmoid_focal_loss(layer_logits, truth, alpha=self.alpha, gamma=self.gamma)
        return loss.flatten(1).sum(1) / num_boxes


class SetCriterion:
    """Class, L1 and GIoU losses of all decoder layers at once, in float32 whatever the autocast state.

    Args:
        class_loss: (layer_logits (N, B, Q, K), classes (N, B, Q), num_boxes) -> (N,).
        background: the value of `classes` where nothing is matched.
        weight_class: weight of `loss_ce`.
        weight_l1: weight of `loss_bbox`, the L1 distance of normalised cxcywh boxes.
        weight_giou: weight of `loss_giou`, 1 - GIoU.
    """

    def __init__(
        self,
        *,
        class_loss: ClassLoss,
        background: int,
        weight_class: float,
        weight_l1: float,
        weight_giou: float,
    ) -> None:
        self.class_loss = class_loss
        self.background = background
        self.weight_class = weight_class
        self.weight_l1 = weight_l1
        self.weight_giou = weight_giou

    def __call__(
        self,
        prediction: SetPrediction,
        targets: Targets,
        assignment: Assignment,
        *,
        num_boxes: Tensor | float | None = None,
        suffix: str = "",
    ) -> dict[str, Tensor]:
        """Weighted losses, the last layer's without and the earlier ones' with `_0`, `_1`, ... after their names.

        A term of weight 0 stays in the dict as a zero that has a graph: no parameter goes without a gradient.

        Args:
            prediction: of N layers.
            targets: ground truth.
            assignment: the M pairs of each layer.
            num_boxes: what L1 and GIoU, and the focal loss, are divided by. None: `mean_num_boxes(targets)`.
            suffix: of the losses' names, before the layer's number: "_dn", "_interm".

        Returns:
            0-d tensors named `loss_ce`, `loss_bbox`, `loss_giou`, whose sum is to be minimised.
        """
        with torch.autocast(prediction.layer_logits.device.type, enabled=False):
            logits = prediction.layer_logits.float()  # N x B x Q x K
            num_layers = len(logits)
            if num_boxes is None:
                num_boxes = mean_num_boxes(targets)

            layer = torch.arange(num_layers, device=logits.device)[:, None]
            image = targets.image[assignment.target]  # N x M
            classes = torch.full(logits.shape[:3], self.background, device=logits.device)
            classes[layer, image, assignment.query] = targets.labels[assignment.target]
            boxes = prediction.layer_boxes.float()[layer, image, assignment.query]  # N x M x 4
            truth = targets.boxes_cxcywh[assignment.target]  # N x M x 4

            giou = generalized_iou(box_convert(boxes, "cxcywh", "xyxy"), box_convert(truth, "cxcywh", "xyxy"))
            terms = {
                "loss_ce": self.weight_class * self.class_loss(logits, classes, num_boxes),
                "loss_bbox": self.weight_l1 * (boxes - truth).abs().sum((1, 2)) / num_boxes,
                "loss_giou": self.weight_giou * (1 - giou).sum(1) / num_boxes,
            }
        suffixes = [f"{suffix}_{i}" for i in range(num_layers - 1)] + [suffix]
        return {name + suffixes[i]: term[i] for name, term in terms.items() for i in reversed(range(num_layers))}
