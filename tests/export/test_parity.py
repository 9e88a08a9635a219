"""Comparing what two detectors find, as sets."""

from __future__ import annotations

import math

import pytest
import torch
from detectron2.structures import Boxes, Instances

from detr_family.export.parity import Difference, difference, sample_batches


def found(scores: list[float], labels: list[int], boxes: list[list[float]]) -> Instances:
    return Instances(
        (50, 60),
        scores=torch.tensor(scores),
        pred_classes=torch.tensor(labels),
        pred_boxes=Boxes(torch.tensor(boxes).reshape(-1, 4)),
    )


BOXES = [[1.0, 2.0, 11.0, 12.0], [20.0, 20.0, 30.0, 33.0], [1.0, 2.0, 11.0, 12.0]]
EXPECTED = found([0.9, 0.5, 0.4], [1, 1, 0], BOXES)


def test_order_does_not_count() -> None:
    assert difference(EXPECTED, EXPECTED[torch.tensor([2, 0, 1])]) == Difference(0.0, 0.0, 6, 0)


def test_the_largest_differences_are_told() -> None:
    moved = [[1.0, 2.0, 11.0, 12.0], [20.0, 20.5, 30.0, 33.0], [1.0, 2.0, 11.0, 12.0]]
    result = difference(EXPECTED, found([0.9, 0.5, 0.3], [1, 1, 0], moved))
    assert result.score == pytest.approx(0.1) and result.box == pytest.approx(0.5)
    assert result.compared == 6 and not result.within() and result.within(0.2, 0.6)


@pytest.mark.parametrize("fewer", [EXPECTED[:2], EXPECTED[torch.tensor([0, 2])], EXPECTED[:0]])
def test_what_one_of_them_lacks_is_counted(fewer: Instances) -> None:
    for result in (difference(EXPECTED, fewer), difference(fewer, EXPECTED)):
        assert result.missing == 3 - len(fewer) and not result.within()


def test_another_class_is_another_detection() -> None:
    result = difference(EXPECTED, found([0.9, 0.5, 0.4], [1, 1, 2], BOXES))
    assert result.missing == 2


def test_low_scores_count_only_among_the_best_five() -> None:
    many = found([0.9] + [0.05] * 7, [0] * 8, [[float(i), 0.0, i + 9.0, 9.0] for i in range(8)])
    other = found([0.9] + [0.05] * 4 + [0.01] * 3, [0] * 8, [[float(i), 0.0, i + 9.0, 9.0] for i in range(8)])
    assert difference(many, other).within()
    assert not difference(many, other, least_score=0.02).within()


def test_nan_is_no_agreement() -> None:
    result = difference(EXPECTED, found([math.nan, 0.5, 0.4], [1, 1, 0], BOXES))
    assert not (Difference() | result).within() and not (result | Difference(compared=3)).within()
    result = difference(EXPECTED, found([0.9, 0.5, 0.4], [1, 1, 0], [[math.nan] * 4, *BOXES[1:]]))
    assert not result.within()


def test_nothing_compared_is_no_agreement() -> None:
    assert not Difference().within()


def test_batches_have_all_numbers_and_sizes_and_padding() -> None:
    batches = sample_batches([(40, 56), (56, 40)], [1, 3])
    assert [len(x) for x in batches] == [1, 3, 1, 3]
    assert [tuple(x["image"].shape) for x in batches[1]] == [(3, 40, 56), (3, 35, 45), (3, 35, 45)]
    assert batches[0][0]["image"].dtype == torch.uint8
    assert not torch.equal(batches[1][1]["image"], batches[1][2]["image"])
    given = sample_batches([(8, 8)], [2], [torch.full((3, 4, 4), 7, dtype=torch.uint8)])
    assert all((x["image"] == 7).all() for x in given[0])
