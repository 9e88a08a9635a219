"""Where a detector errs: kinds made on purpose, AP50 against pycocotools, and the page's tables and charts."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from detr_family.evaluation.errors import KINDS, Errors, find_errors, write_images
from detr_family.visualization.error_charts import confusion_svg, error_tables, precision_recall_svg

NAMES = ["cat", "dog", "bird"]
NUMBERS = {1: 0, 2: 1, 3: 2}


def truth(number: int, x: float, side: float = 40, crowd: int = 0) -> dict[str, Any]:
    return {"bbox": [x, 0, side, side], "category_id": number, "iscrowd": crowd, "area": side * side}


def said(category: int, x: float, score: float, side: float = 40, image: int = 0) -> dict[str, Any]:
    return {"image_id": image, "category_id": category, "bbox": [x, 0, side, side], "score": score}


def judged(annotations: list[dict[str, Any]], results: list[dict[str, Any]], threshold: float = 0.3) -> Errors:
    records = [
        {"file_name": "a.jpg", "image_id": 0, "annotations": annotations},
        {"file_name": "b.jpg", "image_id": 1, "annotations": []},
    ]
    return find_errors(records, results, NUMBERS, NAMES, threshold)


EACH = [truth(0, 0), truth(0, 100), truth(1, 200), truth(1, 300), truth(2, 400), truth(2, 600, crowd=1)]
KIND_BY_KIND = [
    said(1, 0, 0.95),  # right
    said(1, 2, 0.9),  # a duplicate
    said(1, 125, 0.85),  # badly placed on the second cat: IoU 15/65
    said(1, 200, 0.8),  # a dog taken for a cat
    said(3, 325, 0.75),  # neither class nor place: IoU 15/65 with a dog
    said(3, 800, 0.7),  # background
    said(3, 600, 0.65),  # in a crowd: neither right nor wrong
    said(2, 900, 0.1),  # below the threshold
]


def test_each_kind_of_error_is_told_from_the_others() -> None:
    found = judged(EACH, KIND_BY_KIND)
    assert {kind.name: kind.count for kind in found.kinds} == {
        "wrong class": 1,
        "badly placed": 1,
        "class and place": 1,
        "duplicate": 1,
        "background": 1,
        "missed": 2,  # the second dog and the bird
    }
    assert found.images == [
        ("a.jpg", 5, 1, 5, pytest.approx(100 * 51 / 101 / 3)),
        ("b.jpg", 0, 0, 0, pytest.approx(math.nan, nan_ok=True)),
    ]
    everything = judged(EACH, KIND_BY_KIND, threshold=0.0)
    assert {kind.name: kind.count for kind in everything.kinds}["background"] == 2


def test_what_a_kind_costs_is_what_mending_it_gains() -> None:
    annotations = [truth(0, 0), truth(1, 200)]
    for wrong, kind in (
        (said(2, 0, 0.9), "wrong class"),
        (said(1, 25, 0.9), "badly placed"),
        (said(1, 900, 0.9), "background"),
    ):
        results = [wrong, said(1, 0, 0.8), said(2, 200, 0.8)] if kind == "background" else [wrong, said(2, 200, 0.8)]
        found = judged(annotations, results)
        costs = {k.name: k.cost for k in found.kinds}
        assert found.ap50 + costs[kind] == pytest.approx(100), kind
        assert [name for name in KINDS if costs[name] > 1e-9] == [kind]
    missed = judged([*annotations, truth(1, 300)], [said(1, 0, 0.9), said(2, 200, 0.8)])
    assert missed.ap50 == pytest.approx(50 + 25 + 50 / 202) and missed.ap50 + missed.kinds[-1].cost == pytest.approx(
        100
    )


def test_confusions_count_every_object_and_every_detection_once() -> None:
    table = judged(EACH, KIND_BY_KIND).confusion
    assert table.tolist() == [
        [1, 0, 0, 1],  # one cat found, one missed
        [1, 0, 0, 1],  # a dog taken for a cat, the other missed
        [0, 0, 0, 1],
        [2, 0, 2, 0],  # duplicate and badly placed cats; a bird nowhere and one beside a dog
    ]


def random_set(seed: int) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    rng = np.random.default_rng(seed)
    records, results = [], []
    for image in range(12):
        annotations = []
        for _ in range(rng.integers(0, 7)):
            x, y, w, h = rng.uniform([0, 0, 5, 5], [300, 300, 250, 250])
            number, crowd = int(rng.integers(0, 3)), int(rng.random() < 0.1)
            annotations.append({"bbox": [x, y, w, h], "category_id": number, "iscrowd": crowd, "area": w * h})
            for _ in range(rng.integers(0, 4)):
                moved = (np.array([x, y, w, h]) + rng.normal(0, 0.12, 4) * [w, h, w, h]).tolist()
                category = number + 1 if rng.random() < 0.8 else int(rng.integers(1, 4))
                results.append(
                    {"image_id": image, "category_id": category, "bbox": moved, "score": float(rng.random())}
                )
        records.append(
            {"file_name": f"{image}.jpg", "image_id": image, "annotations": annotations, "height": 600, "width": 600}
        )
    return records, results


@pytest.mark.parametrize("seed", range(5))
def test_ap50_is_pycocotools_and_the_rest_adds_up(seed: int) -> None:
    records, results = random_set(seed)
    found = find_errors(records, results, NUMBERS, NAMES, 0.5)
    coco = COCO()
    flat = [
        {**a, "image_id": r["image_id"], "category_id": a["category_id"] + 1} for r in records for a in r["annotations"]
    ]
    coco.dataset = {
        "images": [{"id": r["image_id"]} for r in records],
        "annotations": [{**a, "id": i} for i, a in enumerate(flat, start=1)],
        "categories": [{"id": i + 1, "name": name} for i, name in enumerate(NAMES)],
    }
    with contextlib.redirect_stdout(io.StringIO()):
        coco.createIndex()
        evaluated = COCOeval(coco, coco.loadRes([dict(entry) for entry in results]), "bbox")
        evaluated.evaluate()
        evaluated.accumulate()
    for number, score in enumerate(found.classes):
        precision = evaluated.eval["precision"][0, :, number, 0, 2]
        assert score.ap50 == pytest.approx(100 * precision.mean(), abs=1e-9)
    objects = sum(not a["iscrowd"] for r in records for a in r["annotations"])
    assert found.confusion[:-1].sum() == objects == sum(size.objects for size in found.sizes)
    assert sum(row[1] for row in found.images) == objects
    assert all(kind.cost > -1e-9 for kind in found.kinds if kind.name not in ("wrong class", "badly placed"))


def test_costs_are_those_of_the_authors_tool() -> None:
    """An object that nothing found goes to the best detection on it, of either kind; a class may lose all objects."""
    there = [truth(1, 0), truth(0, 100), truth(0, 200), truth(2, 700)]
    results = [
        said(1, 200, 0.95),
        said(1, 0, 0.9),
        said(2, 20, 0.8),
    ]  # right, a dog taken for a cat, badly placed on it
    found = judged(there, results)
    half = 100 * 51 / 101  # of a class with one of two found, first
    assert found.ap50 == pytest.approx(half / 3)
    costs = {kind.name: kind.cost for kind in found.kinds}
    assert costs == pytest.approx(
        {
            "wrong class": 100 / 3,  # the dog has all
            "badly placed": 0,  # the dog is not its to have
            "class and place": 0,
            "duplicate": 0,
            "background": 0,
            "missed": (100 - half) / 3,  # of the cats; the bird, missed too, leaves a class without objects that counts
        },
        abs=1e-9,
    )


def test_thresholds_are_where_f1_is_highest() -> None:
    found = judged(
        [truth(0, 0), truth(0, 100)], [said(1, 0, 0.9), said(1, 300, 0.6), said(1, 100, 0.6), said(1, 500, 0.2)]
    )
    cat = found.classes[0]
    assert (cat.threshold, cat.precision, cat.recall) == (0.6, pytest.approx(2 / 3), 1.0)
    assert found.classes[1].objects == 0 and math.isnan(found.classes[1].ap50)


def test_the_page_has_tables_charts_and_a_file_of_images(tmp_path: Path) -> None:
    found = judged(EACH, KIND_BY_KIND)
    tables = {table.title: table for table in error_tables(found)}
    assert ("dog", "cat", 1) in tables["Most often taken for another"].rows
    assert [row[:2] for row in tables["By kind"].rows] == [(kind.name, kind.count) for kind in found.kinds]
    assert all(len(row) == len(table.head) for table in tables.values() for row in table.rows)
    assert "missed" in confusion_svg(found) and "cat (" in precision_recall_svg(found)
    write_images(found, tmp_path / "images.csv")
    with open(tmp_path / "images.csv", encoding="utf-8") as file:
        assert [row[:4] for row in csv.reader(file)] == [
            ["image", "objects", "found", "wrong"],
            ["a.jpg", "5", "1", "5"],
            ["b.jpg", "0", "0", "0"],
        ]


def test_nothing_found_and_nothing_there() -> None:
    for there, results in (([], []), ([truth(0, 0)], []), ([], [said(1, 0, 0.9)])):
        found = judged(there, results)
        assert error_tables(found) and confusion_svg(found) and precision_recall_svg(found)
        json.dumps([vars(kind) for kind in found.kinds])
