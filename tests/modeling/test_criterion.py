"""The set loss, term by term, against the paper's equations written out."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torchvision.ops import box_convert, generalized_box_iou

from detr_family.modeling.criterion import SetCriterion, SoftmaxClassLoss
from detr_family.modeling.structures import Assignment, SetPrediction, Targets

K = 4  # three classes and no-object


def criterion(**weights: float) -> SetCriterion:
    return SetCriterion(
        class_loss=SoftmaxClassLoss(0.1),
        background=K - 1,
        **{"weight_class": 1.0, "weight_l1": 5.0, "weight_giou": 2.0, **weights},
    )


def example() -> tuple[SetPrediction, Targets, Assignment]:
    torch.manual_seed(5)
    prediction = SetPrediction(
        torch.randn(2, 2, 6, K, requires_grad=True), (0.1 + 0.6 * torch.rand(2, 2, 6, 4)).requires_grad_()
    )
    targets = Targets(
        labels=torch.tensor([2, 0, 1]),
        boxes_cxcywh=0.2 + 0.3 * torch.rand(3, 4),
        image=torch.tensor([0, 0, 1]),
        counts=[2, 1],
    )
    assignment = Assignment(query=torch.tensor([[4, 1, 3], [0, 5, 2]]), target=torch.tensor([[1, 0, 2], [0, 1, 2]]))
    return prediction, targets, assignment


def test_terms_are_the_papers() -> None:
    prediction, targets, assignment = example()
    losses = criterion()(prediction, targets, assignment)
    for layer, suffix in ((0, "_0"), (1, "")):
        nll = weight = l1 = giou = 0.0
        matched = {}
        for q, t in zip(assignment.query[layer].tolist(), assignment.target[layer].tolist(), strict=True):
            matched[int(targets.image[t]), q] = t
        for image in range(2):
            for q in range(6):
                t = matched.get((image, q))
                label = K - 1 if t is None else int(targets.labels[t])
                w = 0.1 if t is None else 1.0
                nll += w * -F.log_softmax(prediction.layer_logits[layer, image, q], -1)[label].item()
                weight += w
                if t is not None:
                    a, b = prediction.layer_boxes[layer, image, q], targets.boxes_cxcywh[t]
                    l1 += (a - b).abs().sum().item()
                    pair = (box_convert(x[None], "cxcywh", "xyxy") for x in (a, b))
                    giou += 1 - generalized_box_iou(*pair).item()
        assert losses["loss_ce" + suffix].item() == pytest.approx(nll / weight, rel=1e-5)
        assert losses["loss_bbox" + suffix].item() == pytest.approx(5 * l1 / 3, rel=1e-5)
        assert losses["loss_giou" + suffix].item() == pytest.approx(2 * giou / 3, rel=1e-5)


def test_a_weight_of_zero_switches_a_term_off_but_keeps_its_graph() -> None:
    prediction, targets, assignment = example()
    losses = criterion(weight_l1=0.0, weight_giou=0.0)(prediction, targets, assignment)
    assert losses["loss_bbox"].item() == losses["loss_giou_0"].item() == 0
    sum(losses.values()).backward()
    assert prediction.layer_boxes.grad is not None and not prediction.layer_boxes.grad.any()
    assert prediction.layer_logits.grad.any()


def test_float16_predictions_are_judged_in_float32() -> None:
    prediction, targets, assignment = example()
    half = SetPrediction(prediction.layer_logits.half(), prediction.layer_boxes.half())
    for name, loss in criterion()(half, targets, assignment).items():
        assert loss.dtype == torch.float32 and math.isfinite(loss.item()), name


def test_boxes_without_area_have_finite_losses_and_gradients() -> None:
    prediction, targets, assignment = example()
    boxes = prediction.layer_boxes.detach().clone()
    boxes[..., 2:] = 0
    boxes[:, 0, :, :2] = targets.boxes_cxcywh[0, :2]
    targets.boxes_cxcywh[:, 2:] = 0
    boxes.requires_grad_()
    losses = criterion()(SetPrediction(prediction.layer_logits, boxes), targets, assignment)
    sum(losses.values()).backward()
    assert all(torch.isfinite(x) for x in losses.values()) and torch.isfinite(boxes.grad).all()
