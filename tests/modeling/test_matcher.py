"""The assignment is the cheapest one, per image, with one copy to the host."""

from __future__ import annotations

import itertools

import pytest
import tiny
import torch
from torchvision.ops import box_convert, generalized_box_iou

from detr_family.modeling.matcher import HungarianMatcher, softmax_class_cost
from detr_family.modeling.structures import SetPrediction, Targets


def matcher(**weights: float) -> HungarianMatcher:
    return HungarianMatcher(
        class_cost=softmax_class_cost, **{"cost_class": 1.0, "cost_l1": 5.0, "cost_giou": 2.0, **weights}
    )


def problem(counts: tuple[int, ...], layers: int = 3, queries: int = 5) -> tuple[SetPrediction, Targets]:
    torch.manual_seed(3)
    prediction = SetPrediction(
        torch.randn(layers, len(counts), queries, tiny.NUM_CLASSES + 1),
        0.1 + 0.5 * torch.rand(layers, len(counts), queries, 4),
    )
    instances = [x["instances"] for x in tiny.batch(counts)]
    return prediction, Targets.from_instances(instances, torch.device("cpu"))


def pair_cost(prediction: SetPrediction, targets: Targets, layer: int, query: int, target: int) -> float:
    """Equation 1, one pair at a time, with torchvision's GIoU."""
    image = int(targets.image[target])
    p = prediction.layer_logits[layer, image, query].softmax(-1)[targets.labels[target]]
    a, b = prediction.layer_boxes[layer, image, query], targets.boxes_cxcywh[target]
    giou = generalized_box_iou(*(box_convert(x[None], "cxcywh", "xyxy") for x in (a, b)))
    return float(-p + 5 * (a - b).abs().sum() - 2 * giou)


def test_cost_is_the_papers() -> None:
    prediction, targets = problem((3, 2))
    cost = matcher().cost(prediction, targets)
    assert cost.shape == (3, 5, 5)  # layers, boxes of the batch, queries: never images x images
    for layer, target, query in itertools.product(range(3), range(5), range(5)):
        expected = pair_cost(prediction, targets, layer, query, target)
        assert cost[layer, target, query].item() == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("counts", [(3, 2), (0, 4), (1, 0), (2,)])
def test_assignment_is_the_cheapest_of_all(counts: tuple[int, ...]) -> None:
    prediction, targets = problem(counts)
    result = matcher()(prediction, targets)
    cost = matcher().cost(prediction, targets)
    assert result.query.shape == result.target.shape == (3, sum(counts))
    for layer in range(3):
        assert sorted(result.target[layer].tolist()) == list(range(sum(counts)))
        start = 0
        for count in counts:
            mine = [
                (t, q)
                for t, q in zip(result.target[layer].tolist(), result.query[layer].tolist(), strict=True)
                if start <= t < start + count
            ]
            assert len({q for _, q in mine}) == count
            total = sum(cost[layer, t, q].item() for t, q in mine)
            best = min(
                sum(cost[layer, start + i, q].item() for i, q in enumerate(slots))
                for slots in itertools.permutations(range(5), count)
            )
            assert total == pytest.approx(best, abs=1e-5)
            start += count


def test_no_boxes_at_all() -> None:
    result = matcher()(*problem((0, 0)))
    assert result.query.shape == result.target.shape == (3, 0)


def test_more_boxes_than_queries_gives_every_query_a_box() -> None:
    prediction, targets = problem((8, 1))
    result = matcher()(prediction, targets)
    assert result.query.shape == (3, 6)
    assert (result.target == 8).sum() == 3


def test_one_copy_to_the_host_for_all_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    copies = []
    original = torch.Tensor.cpu
    monkeypatch.setattr(torch.Tensor, "cpu", lambda x: copies.append(x.shape) or original(x))
    for waits in ("item", "tolist", "__bool__", "nonzero"):
        monkeypatch.setattr(torch.Tensor, waits, lambda *_: pytest.fail("waits for the device"))
    matcher()(*problem((3, 2)))
    assert copies == [(3, 5, 5)]


def test_nan_does_not_stop_it() -> None:
    prediction, targets = problem((3, 2))
    prediction.layer_boxes[1, 0] = float("nan")
    result = matcher()(prediction, targets)
    assert result.query.shape == (3, 5)


def test_float16_predictions_are_compared_in_float32() -> None:
    prediction, targets = problem((3, 2))
    half = SetPrediction(prediction.layer_logits.half(), prediction.layer_boxes.half())
    assert matcher().cost(half, targets).dtype == torch.float32


def test_no_cost_is_refused() -> None:
    with pytest.raises(ValueError, match=r"MODEL\.DETR\.COST"):
        matcher(cost_class=0, cost_l1=0, cost_giou=0)
