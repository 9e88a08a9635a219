"""Denoising groups: ground truth with noise as additional decoder queries (DN-DETR, arXiv 2203.01305, section 4).

Each group holds every box of an image once, its label and box changed a little; the decoder learns to undo that,
and no matching is needed to know which query belongs to which box. Groups do not see each other, and the matching
part sees none of them, so that it cannot peek at the ground truth (section 4.3).

Nothing here waits for the device: what shapes depend on, the boxes of each image, is known on the host.

Letters: B images, T boxes of the batch, G groups, R denoising queries of an image, Q matching queries, M boxes in
all groups of all images.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import box_convert

from detr_family.layers.boxes import inverse_sigmoid
from detr_family.modeling.structures import Assignment, SetPrediction, Targets


@dataclass
class DenoisingGroups:
    """The denoising queries of a batch, one group after another, and what is known of them.

    Attributes:
        labels: (B, R) int64, noised labels; 0 where there is no box.
        padding: (B, R) bool, True where an image has fewer boxes than its slots in a group.
        anchors: (B, R, 4) noised boxes before the sigmoid, x, y, w, h; 0 where there is no box.
        blocked: (R + Q, R + Q) bool, True = this query does not see that one. Denoising queries come first.
        known: the query of each noised box and the box it comes from, (1, M) each: one for all decoder layers.
        num_groups: G.
    """

    labels: Tensor
    padding: Tensor
    anchors: Tensor
    blocked: Tensor
    known: Assignment
    num_groups: int

    def __len__(self) -> int:
        """R, denoising queries of each image, padding included."""
        return self.labels.shape[1]

    def known_alone(self, prediction: SetPrediction, targets: Targets) -> tuple[SetPrediction, Targets, Assignment]:
        """Prediction and truth of the M noised boxes without the padding, as if one image had them all.

        Args:
            prediction: of the denoising queries, (N, B, R, ...).
            targets: that the groups were made from.

        Returns:
            (N, 1, M, ...) predictions, M targets, and the pairing of each with its own.
        """
        query, target = self.known.query[0], self.known.target[0]
        image = targets.image[target]
        logits, boxes = prediction.layer_logits, prediction.layer_boxes
        each = torch.arange(len(target), device=target.device).expand(len(logits), -1)
        return (
            SetPrediction(logits[:, None, image, query], boxes[:, None, image, query]),
            Targets(targets.labels[target], targets.boxes_cxcywh[target], torch.zeros_like(image), [len(target)]),
            Assignment(each, each),
        )


@dataclass
class DenoisingPrediction(SetPrediction):
    """What the matching queries predict, and beside it what became of the denoising queries.

    Attributes:
        denoised: the denoising queries' predictions, (N, B, R, ...).
        groups: the queries themselves.
    """

    denoised: SetPrediction
    groups: DenoisingGroups


def split_prediction(prediction: SetPrediction, groups: DenoisingGroups | None) -> SetPrediction:
    """Take the R denoising queries, which come first, from what the decoder predicted for R + Q."""
    if groups is None:
        return prediction
    count = len(groups)
    logits, boxes = prediction.layer_logits, prediction.layer_boxes
    return DenoisingPrediction(
        logits[:, :, count:], boxes[:, :, count:], SetPrediction(logits[:, :, :count], boxes[:, :, :count]), groups
    )


def flip_labels(
    labels: Tensor, num_classes: int, probability: float, generator: torch.Generator | None = None
) -> Tensor:
    """Label noise: with `probability` a label becomes one drawn from all classes, the true one included.

    Args:
        labels: int64, any shape.
        num_classes: K.
        probability: gamma of section 4.2.
        generator: of the labels' device; None is torch's global one.

    Returns:
        as `labels`.
    """
    if probability == 0:
        return labels
    flip = torch.rand(labels.shape, device=labels.device, generator=generator) < probability
    other = torch.randint(num_classes, labels.shape, device=labels.device, generator=generator)
    return torch.where(flip, other, labels)


def noise_boxes(boxes_cxcywh: Tensor, scale: float, generator: torch.Generator | None = None) -> Tensor:
    """Box noise (section 4.2): the centre moves uniformly by less than `scale` times half of width and height, and
    width and height change uniformly by less than `scale` times themselves. With a scale below 1 the noised centre
    stays inside of the box.

    Args:
        boxes_cxcywh: (..., 4) in [0, 1].
        scale: lambda_1 = lambda_2 of the paper.
        generator: of the boxes' device; None is torch's global one.

    Returns:
        as `boxes_cxcywh`, clamped to [0, 1].
    """
    if scale == 0:
        return boxes_cxcywh
    size = boxes_cxcywh[..., 2:]
    most = torch.cat([size / 2, size], -1)
    noise = torch.rand(boxes_cxcywh.shape, device=boxes_cxcywh.device, generator=generator) * 2 - 1
    return (boxes_cxcywh + noise * most * scale).clamp(0, 1)


def denoising_groups(
    targets: Targets,
    *,
    num_classes: int,
    num_queries: int,
    num_groups: int,
    max_queries: int,
    label_noise: float,
    box_noise: float,
    eps: float,
    generator: torch.Generator | None = None,
) -> DenoisingGroups:
    """DN-DETR's groups (section 4.2): every group holds every box of an image, with noise of its own.

    Args:
        targets: ground truth of the batch, possibly without any box.
        num_classes: K.
        num_queries: Q, matching queries that stand behind the denoising ones.
        num_groups: G.
        max_queries: the most denoising queries of an image. Where boxes times groups are more, a group holds a
            random choice of the boxes, and the log says so once.
        label_noise: probability of a flipped label.
        box_noise: lambda of the box noise.
        eps: of the inverse sigmoid.
        generator: of the targets' device; None is torch's global one.

    Returns:
        R = G * min(largest number of boxes in an image, max_queries // G) queries.
    """
    target, slot, num_slots = box_slots(targets, num_groups, max_queries // num_groups, generator)
    group = torch.arange(num_groups, device=slot.device)[:, None]
    query = (group * num_slots + slot).flatten()
    target = target.flatten()
    return fill_groups(
        targets,
        target=target,
        query=query,
        labels=flip_labels(targets.labels[target], num_classes, label_noise, generator),
        boxes_cxcywh=noise_boxes(targets.boxes_cxcywh[target], box_noise, generator),
        known=Assignment(query[None], target[None]),
        num_groups=num_groups,
        group_size=num_slots,
        num_queries=num_queries,
        eps=eps,
    )


@dataclass(frozen=True)
class GroupNoise:
    """DN-DETR's groups and their noise (section 4.2), as a detector is set to make them.

    Attributes:
        num_groups: G, each with every box of an image; 0 trains without denoising.
        max_queries: the most denoising queries of an image, at least one per group.
        label_noise: probability that a label is flipped.
        box_noise: lambda of the box noise, the largest shift in half boxes and the largest change of size.

    Raises:
        ValueError: counts or noise that cannot be.
    """

    num_groups: int
    max_queries: int
    label_noise: float
    box_noise: float

    def __post_init__(self) -> None:
        if self.num_groups < 0 or self.max_queries < self.num_groups:
            raise ValueError(
                f"MODEL.DN.GROUPS {self.num_groups} must be at least 0 and MODEL.DN.MAX_QUERIES {self.max_queries} "
                "at least as large"
            )
        if not 0 <= self.label_noise <= 1 or self.box_noise < 0:
            raise ValueError(
                f"MODEL.DN.LABEL_NOISE {self.label_noise} must be in [0, 1], MODEL.DN.BOX_NOISE {self.box_noise} "
                "at least 0"
            )

    def groups(
        self, targets: Targets, *, num_classes: int, num_queries: int, eps: float, generator: torch.Generator | None
    ) -> DenoisingGroups | None:
        """`denoising_groups` with this noise; None where there are no groups."""
        if self.num_groups == 0:
            return None
        return denoising_groups(
            targets, num_classes=num_classes, num_queries=num_queries, eps=eps, generator=generator, **vars(self)
        )


def noise_corners(
    boxes_cxcywh: Tensor, scale: float, farther: Tensor, generator: torch.Generator | None = None
) -> Tensor:
    """Box noise of contrastive denoising (DINO, section 3.3): each corner coordinate moves, either way, by less than
    `scale` times half of the width or height, or where it is to be farther by once to twice as much.

    Args:
        boxes_cxcywh: (..., 4) in [0, 1].
        scale: lambda_1; lambda_2 is twice as much.
        farther: (...) bool, True for negatives.
        generator: of the boxes' device; None is torch's global one.

    Returns:
        as `boxes_cxcywh`, its corners clamped to [0, 1]. Width and height of a negative may have become negative.
    """
    draw = torch.rand(2, *boxes_cxcywh.shape, device=boxes_cxcywh.device, generator=generator)
    distance = draw[0] + farther[..., None].to(draw.dtype)
    sign = (draw[1] < 0.5).to(draw.dtype) * 2 - 1
    most = torch.cat([boxes_cxcywh[..., 2:]] * 2, -1) / 2  # w, h, w, h
    corners = box_convert(boxes_cxcywh, "cxcywh", "xyxy") + sign * distance * most * scale
    return box_convert(corners.clamp(0, 1), "xyxy", "cxcywh")


def contrastive_groups(
    targets: Targets,
    *,
    num_classes: int,
    num_queries: int,
    num_groups: int,
    max_queries: int,
    label_noise: float,
    box_noise: float,
    drop_inverted: bool,
    eps: float,
    generator: torch.Generator | None = None,
) -> DenoisingGroups:
    """DINO's groups (section 3.3): every group holds every box of an image twice, as a positive with little noise
    that is to be restored and as a negative with more of it that is to be rejected. The positives stand first.

    Args:
        targets: ground truth of the batch, possibly without any box.
        num_classes: K.
        num_queries: Q, matching queries that stand behind the denoising ones.
        num_groups: G.
        max_queries: the most denoising queries of an image, at least 2 * G; see `denoising_groups`.
        label_noise: probability of a flipped label.
        box_noise: see `noise_corners`.
        drop_inverted: a negative of negative width or height is left out: it becomes padding. The release keeps it,
            with that width or height as small as `eps` allows.
        eps: of the inverse sigmoid.
        generator: of the targets' device; None is torch's global one.

    Returns:
        R = 2 * G * min(largest number of boxes in an image, max_queries // (2 * G)) queries; only the positives
        are `known`.
    """
    target, slot, num_slots = box_slots(targets, num_groups, max_queries // (2 * num_groups), generator)
    group = torch.arange(num_groups, device=slot.device)[:, None]
    positive = (group * 2 * num_slots + slot).flatten()
    query = torch.cat([positive, positive + num_slots])
    positive_target = target.flatten()
    target = positive_target.repeat(2)
    negative = torch.arange(len(query), device=query.device) >= len(positive)
    boxes = noise_corners(targets.boxes_cxcywh[target], box_noise, negative, generator)
    groups = fill_groups(
        targets,
        target=target,
        query=query,
        labels=flip_labels(targets.labels[target], num_classes, label_noise, generator),
        boxes_cxcywh=boxes,
        known=Assignment(positive[None], positive_target[None]),
        num_groups=num_groups,
        group_size=2 * num_slots,
        num_queries=num_queries,
        eps=eps,
    )
    if drop_inverted:
        inverted = negative & (boxes[:, 2:] < 0).any(1)
        dropped = torch.zeros_like(groups.padding).index_put((targets.image[target], query), inverted)
        groups.labels = groups.labels.masked_fill(dropped, 0)
        groups.anchors = groups.anchors.masked_fill(dropped[..., None], 0.0)
        groups.padding = groups.padding | dropped
    return groups


def box_slots(
    targets: Targets, num_groups: int, max_slots: int, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor, int]:
    """Give every box of an image a place of its own in each group.

    An image with more than `max_slots` boxes has that many of them in a group, drawn anew for each group.

    Args:
        targets: ground truth of the batch.
        num_groups: G.
        max_slots: the most boxes of one image in one group, at least 1.
        generator: of the targets' device.

    Returns:
        target (G, M / G), indices into `targets`; slot, of the same shape, each box's place in its group; and the
        number of places in a group, the same for every image.
    """
    device = targets.labels.device
    kept = [min(count, max_slots) for count in targets.counts]
    slot = torch.cat([torch.arange(count) for count in kept]).to(device, non_blocking=True)
    if kept == targets.counts:
        target = torch.arange(len(targets), device=device).expand(num_groups, -1)
    else:
        _say_once(max(targets.counts), max_slots)
        # Images stay in their order, the boxes of each are shuffled; then the first of each image are taken.
        draw = torch.rand(num_groups, len(targets), device=device, dtype=torch.float64, generator=generator)
        shuffled = (targets.image + draw).argsort(1)
        starts = torch.tensor([0, *targets.counts[:-1]]).cumsum(0)
        first = starts.repeat_interleave(torch.tensor(kept)).to(device, non_blocking=True)
        target = shuffled[:, first + slot]
    return target, slot.expand(num_groups, -1), max(kept, default=0)


_said = False


def _say_once(boxes: int, slots: int) -> None:
    global _said
    if not _said:
        _said = True
        logging.getLogger(__name__).warning(
            "An image has %d boxes, but a denoising group holds at most %d: it gets a random choice of them, drawn "
            "anew each time, since the number of denoising queries is bounded. This is said once.",
            boxes,
            slots,
        )


def fill_groups(
    targets: Targets,
    *,
    target: Tensor,
    query: Tensor,
    labels: Tensor,
    boxes_cxcywh: Tensor,
    known: Assignment,
    num_groups: int,
    group_size: int,
    num_queries: int,
    eps: float,
) -> DenoisingGroups:
    """Write noised boxes to their queries.

    Args:
        targets: ground truth of the batch.
        target: (X,) the box that each comes from.
        query: (X,) the denoising query that each becomes, in its image.
        labels: (X,) noised labels.
        boxes_cxcywh: (X, 4) noised boxes in [0, 1].
        known: see `DenoisingGroups`.
        num_groups: G.
        group_size: R / G.
        num_queries: Q.
        eps: of the inverse sigmoid.
    """
    image = targets.image[target]
    shape = (len(targets.counts), num_groups * group_size)
    device = labels.device
    return DenoisingGroups(
        labels=torch.zeros(shape, dtype=torch.long, device=device).index_put((image, query), labels),
        padding=torch.ones(shape, dtype=torch.bool, device=device).index_put(
            (image, query), torch.zeros_like(query, dtype=torch.bool)
        ),
        anchors=torch.zeros(*shape, 4, device=device).index_put((image, query), inverse_sigmoid(boxes_cxcywh, eps)),
        blocked=group_mask(num_groups, group_size, num_queries, device),
        known=known,
        num_groups=num_groups,
    )


def group_mask(num_groups: int, group_size: int, num_queries: int, device: torch.device) -> Tensor:
    """Who does not see whom (section 4.3): a denoising query is seen by its own group alone.

    Returns:
        (R + Q, R + Q) bool, True = the query of this row does not see that of this column. Matching queries, which
        come last, are seen by all.
    """
    group = torch.arange(num_groups, device=device).repeat_interleave(group_size)
    group = F.pad(group, (0, num_queries), value=num_groups)  # the matching part is like a group of its own, ...
    return (group[:, None] != group) & (group < num_groups)  # ... which everybody sees
