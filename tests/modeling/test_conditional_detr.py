"""What is Conditional DETR's own: reference points, attention by concatenation, focal loss."""

from __future__ import annotations

import math

import pytest
import tiny
import torch
from torchvision.ops import sigmoid_focal_loss

from detr_family.layers.attention import ProjectedAttention
from detr_family.layers.boxes import inverse_sigmoid
from detr_family.layers.position_encoding import sine_of_coordinates
from detr_family.modeling.criterion import FocalClassLoss
from detr_family.modeling.matcher import FocalClassCost
from detr_family.modeling.postprocessing import best_pairs


def test_concatenation_adds_the_products_of_content_and_position() -> None:
    """Equation 1: within a head, (c_q, p_q) . (c_k, p_k) = c_q . c_k + p_q . p_k."""
    layer = tiny.build("ConditionalDETR").transformer.decoder.layers[0]
    c_q, p_q, c_k, p_k = torch.randn(4, 2, 5, 16).unbind(0)
    q, k = (x.unflatten(-1, (2, -1)) for x in (layer.beside(c_q, p_q), layer.beside(c_k, p_k)))
    heads = [x.unflatten(-1, (2, -1)) for x in (c_q, p_q, c_k, p_k)]
    expected = (heads[0] * heads[2]).sum(-1) + (heads[1] * heads[3]).sum(-1)
    torch.testing.assert_close((q * k).sum(-1), expected)


def test_attention_equals_its_definition_with_masks() -> None:
    torch.manual_seed(0)
    attention = ProjectedAttention(16, 2, dropout=0.0).eval()
    q, k, v = torch.randn(2, 5, 24), torch.randn(2, 7, 24), torch.randn(2, 7, 16)
    padding = torch.zeros(2, 7, dtype=torch.bool)
    padding[1, 4:] = True
    blocked = torch.rand(5, 7) < 0.3
    blocked[:, 0] = False
    expected = torch.zeros(2, 5, 16)
    for b in range(2):
        for m in range(2):
            a, c = slice(12 * m, 12 * m + 12), slice(8 * m, 8 * m + 8)
            weight = q[b, :, a] @ k[b, :, a].T / math.sqrt(12)
            weight = weight.masked_fill(padding[b] | blocked, -math.inf).softmax(-1)
            expected[b, :, c] = weight @ v[b, :, c]
    result = attention(q, k, v, padding=padding, blocked=blocked)
    torch.testing.assert_close(result, attention.out_proj(expected))


def test_reference_points_are_the_same_for_every_layer_and_boxes_start_there() -> None:
    model = tiny.build("ConditionalDETR").eval()  # the box head starts from zeros
    with torch.no_grad():
        prediction = model.predict(model.preprocess_image(tiny.batch()))
        reference = model.transformer.decoder.ref_point_head(model.query_embed.weight).sigmoid()
    for boxes in prediction.layer_boxes.unbind(0):
        torch.testing.assert_close(boxes[..., :2], reference.expand(2, -1, -1))
        torch.testing.assert_close(boxes[..., 2:], torch.full((2, 7, 2), 0.5))


def test_only_the_first_layer_has_ca_qpos_proj() -> None:
    names = [k for k in tiny.build("ConditionalDETR").state_dict() if "ca_qpos_proj" in k]
    assert names and all(".layers.0." in k for k in names)


def test_classes_start_at_one_percent() -> None:
    model = tiny.build("ConditionalDETR").eval()
    assert model.class_embed.bias.sigmoid().allclose(torch.tensor(0.01))


def test_focal_loss_and_cost_are_the_papers() -> None:
    torch.manual_seed(0)
    logits = torch.randn(2, 2, 5, 3)
    classes = torch.full((2, 2, 5), 3)
    classes[1, 0, 4], classes[0, 1, 2] = 1, 2
    truth = torch.zeros(2, 2, 5, 3)
    truth[1, 0, 4, 1] = truth[0, 1, 2, 2] = 1
    p = logits.sigmoid()
    p_true = truth * p + (1 - truth) * (1 - p)
    alpha = truth * 0.25 + (1 - truth) * 0.75
    expected = (-alpha * (1 - p_true) ** 2 * p_true.log()).sum((1, 2, 3)) / 4
    torch.testing.assert_close(FocalClassLoss(0.25, 2.0)(logits, classes, torch.tensor(4.0)), expected)

    cost = FocalClassCost(0.25, 2.0)(logits, torch.tensor([0, 1, 1]), torch.tensor([2, 0, 1]))
    assert cost.shape == (2, 3, 5)
    x = logits[1, 1, 4, 0]
    gain = sigmoid_focal_loss(x, torch.tensor(1.0), 0.25, 2.0) - sigmoid_focal_loss(x, torch.tensor(0.0), 0.25, 2.0)
    assert cost[1, 1, 4].item() == pytest.approx(gain.item(), abs=1e-5)


def test_best_pairs_may_take_two_classes_of_a_query() -> None:
    logits = torch.tensor([[[2.0, 1.0], [-3.0, 0.5]]])
    boxes = torch.arange(8.0).view(1, 2, 4)
    scores, classes, chosen = best_pairs(logits, boxes, topk=3)
    assert classes.tolist() == [[0, 1, 1]] and chosen[0, :, 0].tolist() == [0, 0, 4]
    torch.testing.assert_close(scores, torch.tensor([[2.0, 1.0, 0.5]]).sigmoid())
    assert best_pairs(logits, boxes, topk=100)[0].shape == (1, 4)


def test_sine_of_coordinates_is_in_the_order_of_the_releases() -> None:
    point = torch.tensor([[0.25, 0.75]])
    value = sine_of_coordinates(point, 4, temperature=100.0)
    expected = []
    for angle in (2 * math.pi * 0.75, 2 * math.pi * 0.25):  # y first
        expected += [f(angle / 100.0**power) for power in (0, 0.5) for f in (math.sin, math.cos)]
    torch.testing.assert_close(value, torch.tensor([expected]), atol=1e-5, rtol=1e-5)
    box = torch.tensor([[0.25, 0.75, 0.1, 0.3]])
    assert sine_of_coordinates(box, 4, 100.0)[..., :8].equal(value)


@pytest.mark.parametrize("eps", [1e-5, 1e-3])
def test_inverse_sigmoid_is_finite_and_exact_inside(eps: float) -> None:
    x = torch.tensor([-1.0, 0.0, 0.3, 1.0, 2.0])
    value = inverse_sigmoid(x, eps)
    assert value[2].item() == pytest.approx(math.log(0.3 / 0.7), rel=1e-5)
    assert value[0] == value[1] == pytest.approx(math.log(eps), rel=1e-4) and torch.isfinite(value).all()
