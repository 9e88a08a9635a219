"""Single images: what counts as found, and the threshold that is best for all."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from detr_family.evaluation.image_scores import match, score_images


def record(image_id: int, *boxes: tuple[int, list[float]], crowd: tuple[int, ...] = ()) -> dict[str, Any]:
    annotations = [
        {"category_id": number, "bbox": box, "iscrowd": int(i in crowd)} for i, (number, box) in enumerate(boxes)
    ]
    return {"image_id": image_id, "file_name": f"{image_id}.png", "annotations": annotations}


def result(image_id: int, category: int, box: list[float], score: float) -> dict[str, Any]:
    return {"image_id": image_id, "category_id": category, "bbox": box, "score": score}


CLASSES = {3: 0, 9: 1}


def test_an_object_is_found_once_by_the_best_score() -> None:
    boxes = np.array([[0, 0, 10, 10], [1, 0, 10, 10], [50, 50, 10, 10.0]])
    right, ignored = match(boxes, np.array([[0, 0, 10, 10.0]]), np.array([False]), np.array([0.5, 0.9, 0.8]))
    assert right.tolist() == [False, True, False] and not ignored.any()


def test_what_lies_in_a_crowd_is_neither_right_nor_wrong() -> None:
    truth = np.array([[0, 0, 10, 10], [0, 0, 100, 100.0]])
    boxes = np.array([[0, 0, 10, 10], [20, 20, 10, 10], [200, 0, 10, 10.0]])
    right, ignored = match(boxes, truth, np.array([False, True]), np.array([0.9, 0.8, 0.7]))
    assert right.tolist() == [True, False, False] and ignored.tolist() == [False, True, False]


def test_threshold_and_counts() -> None:
    records = [record(1, (0, [0, 0, 10, 10]), (1, [50, 0, 10, 10])), record(2, (0, [0, 0, 10, 10])), record(5)]
    results = [
        result(1, 3, [0, 0, 10, 10], 0.9),
        result(1, 9, [50, 0, 10, 10], 0.8),
        result(2, 9, [0, 0, 10, 10], 0.7),  # the right place, the wrong class
        result(2, 3, [0, 0, 10, 9], 0.6),
        result(5, 3, [0, 0, 9, 9], 0.5),
        result(5, 3, [0, 0, 9, 9], 0.4),
    ]
    scored = score_images(records, results, CLASSES)
    assert scored.threshold == 0.6
    assert (scored.precision, scored.recall) == (0.75, 1.0) and scored.f1 == pytest.approx(6 / 7)
    assert [(p.found, p.objects, p.wrong) for p in scored.images] == [(2, 2, 0), (1, 1, 1), (0, 0, 0)]
    assert [p.f1 for p in scored.images] == pytest.approx([1.0, 2 / 3, 1.0])
    assert [len(p.detections) for p in scored.images] == [2, 2, 0]
    assert scored.images[1].detections[0]["category_id"] == 1


def test_detections_of_one_score_come_and_go_together() -> None:
    records = [record(1, (0, [0, 0, 10, 10]))]
    wrong = [result(1, 3, [50, 50, 10, 10], 0.5)] * 3
    scored = score_images(records, [result(1, 3, [0, 0, 10, 10], 0.5), *wrong], CLASSES)
    assert scored.threshold == 0.5 and scored.precision == 0.25


@pytest.mark.parametrize("records", [[], [record(1)], [record(1, (0, [0, 0, 9, 9]))]])
@pytest.mark.parametrize("results", [[], [result(1, 3, [50, 50, 9, 9], 0.9)]])
def test_nothing_there_or_nothing_found(records: list[dict[str, Any]], results: list[dict[str, Any]]) -> None:
    scored = score_images(records, results, CLASSES)
    assert (scored.threshold, scored.f1) == (0.5, 0.0) and len(scored.images) == len(records)
