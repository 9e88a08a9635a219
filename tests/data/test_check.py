"""Findings of the data check: each fault is found, counted and named, and a clean set has none."""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from detectron2.config import CfgNode
from own_data import ANNOTATIONS, CATEGORIES, IMAGES, write
from PIL import Image

from detr_family.data import register_coco_format, training_dicts
from detr_family.data.check import Finding, annotation_findings, image_findings, read_part, statistics


@pytest.fixture
def folder(coco_folder: Path) -> Path:
    """Images of noise, each another one."""
    for seed, image in enumerate(IMAGES):
        pixels = np.random.default_rng(seed).integers(0, 256, (image["height"], image["width"], 3), dtype=np.uint8)
        Image.fromarray(pixels).save(coco_folder / image["file_name"])
    return coco_folder


def findings(folder: Path, changes: dict[str, Any] | None = None, queries: int = 100) -> dict[str, Finding]:
    """By kind, of a training set with these changes, images included."""
    name = f"check {time.monotonic_ns()}"
    register_coco_format(name, write(folder, changes, f"{name}.json"), str(folder))
    part = read_part(name, training=True)
    found = annotation_findings([part], queries) + image_findings([part], 2, progress=False)
    kinds = {finding.kind: finding for finding in found}
    assert len(kinds) == len(found)
    return kinds


def many(*boxes: list[float], **more: Any) -> list[dict[str, Any]]:
    return [{"id": 100 + i, "image_id": 21, "category_id": 3, "bbox": box, **more} for i, box in enumerate(boxes)]


def test_a_clean_set_has_notes_alone(folder: Path) -> None:
    found = findings(folder)
    assert {kind: finding.level for kind, finding in found.items()} == {
        "category_ids": "note",
        "classes_with_few_boxes": "note",
    }
    assert found["category_ids"].examples == ["3 is class 0", "7 is class 1", "100 is class 2"]


def test_statistics(folder: Path) -> None:
    crowd = {"id": 9, "image_id": 9, "category_id": 7, "bbox": [0, 0, 10, 10], "iscrowd": 1}
    register_coco_format("counted", write(folder, {"annotations": [*ANNOTATIONS, crowd]}), str(folder))
    known = statistics(read_part("counted", training=True))
    counted = ("pictures", "pictures_without_objects", "boxes", "crowd_regions")
    assert [known[key] for key in counted] == [3, 1, 3, 1]
    assert known["picture_sides"] == {"width": [20, 50, 60], "height": [20, 30, 40]}
    assert known["box_sides"] == {"width": [8, 12, 20], "height": [9, 10, 13]}
    assert known["boxes_by_area"] == {"small": 3, "medium": 0, "large": 0}
    assert known["boxes_per_picture"] == {"mean": 1.0, "most": 2}
    assert known["classes"][2] == {"name": "platelet", "id": 100, "boxes": 1, "pictures": 1}


FAULTS: dict[str, tuple[dict[str, Any], str, str, int, str]] = {
    # changes; kind, level, count and example that are found
    "no width": ({"annotations": [*ANNOTATIONS, *many([1, 1, 0, 5])]}, "bad_boxes", "warning", 1, "id 100"),
    "outside": ({"annotations": [*ANNOTATIONS, *many([90, 1, 5, 5])]}, "bad_boxes", "warning", 1, "id 100"),
    "corners": (
        {"annotations": [*ANNOTATIONS, *many(*[[30, 20, 45 + i, 35] for i in range(6)])]},
        *("corner_boxes", "error", 9, ""),
    ),
    "fractions": ({"annotations": many([0.1, 0.2, 0.3, 0.4])}, "boxes_in_fractions", "error", 1, ""),
    "annotation id": (
        {"annotations": [*ANNOTATIONS, {**ANNOTATIONS[0], "bbox": [1, 1, 5, 5]}]},
        *("repeated_annotation_ids", "warning", 1, "0"),
    ),
    "same box": ({"annotations": [*ANNOTATIONS, {**ANNOTATIONS[0], "id": 7}]}, "repeated_boxes", "warning", 1, "b.png"),
    "same file": (
        {"images": [*IMAGES, {**IMAGES[0], "id": 77}]},
        *("repeated_pictures", "warning", 1, "b.png"),
    ),
    "class names": (
        {"categories": [*CATEGORIES, {"id": 8, "name": "red"}]},
        *("repeated_class_names", "warning", 2, "red (id 7)"),
    ),
    "unused class": (
        {"categories": [*CATEGORIES, {"id": 8, "name": "mite"}]},
        *("classes_without_boxes", "warning", 1, "mite"),
    ),
    "no size": (
        {"images": [{"id": 21, "file_name": "b.png"}, *IMAGES[1:]]},
        *("pictures_without_size", "note", 1, "b.png"),
    ),
    "no box": ({"annotations": []}, "no_boxes", "error", 3, ""),
    "missing": (
        {"images": [*IMAGES, {**IMAGES[0], "id": 77, "file_name": "x.png"}]},
        *("missing_pictures", "error", 1, "x.png"),
    ),
    "size": ({"images": [*IMAGES[:2], {**IMAGES[2], "width": 21}]}, "size_pictures", "error", 1, "20x20, not 21x20"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_each_fault_is_found_counted_and_named(fault: str, folder: Path) -> None:
    changes, kind, level, count, example = FAULTS[fault]
    found = findings(folder, changes)[kind]
    assert (found.level, found.count) == (level, count)
    assert example in " ".join(found.examples)


def test_more_objects_than_queries(folder: Path) -> None:
    assert "more_objects_than_queries" not in findings(folder, queries=2)
    found = findings(folder, queries=1)["more_objects_than_queries"]
    assert found.count == 1 and found.examples[0].endswith("a.png (2)") and "NUM_QUERIES" in found.text


def test_unreadable_images_are_found_and_named(folder: Path) -> None:
    (folder / "a.png").write_bytes((folder / "a.png").read_bytes()[:300])
    (folder / "c.png").write_bytes(b"")
    found = findings(folder)["unreadable_pictures"]
    assert found.level == "error" and found.count == 2
    assert "a.png cannot be read" in found.examples[0] and "c.png cannot be read" in found.examples[1]


def test_equal_images_are_found_whatever_their_file(folder: Path) -> None:
    Image.open(folder / "b.png").save(folder / "copy.bmp")
    images = [*IMAGES, {"id": 30, "file_name": "copy.bmp", "width": 50, "height": 40}]
    found = findings(folder, {"images": images})["duplicate_pictures"]
    assert found.count == 1 and "b.png = " in found.examples[0] and "copy.bmp" in found.examples[0]


def test_images_that_test_and_training_share(folder: Path) -> None:
    Image.open(folder / "b.png").save(folder / "copy.bmp")
    ours = [{"id": 1, "file_name": "copy.bmp", "width": 50, "height": 40}, {**IMAGES[1], "id": 2}]
    register_coco_format("train part", write(folder), str(folder))
    other = write(folder, {"images": ours, "annotations": []}, "val.json")
    register_coco_format("test part", other, str(folder))
    parts = [read_part("train part", True), read_part("test part", False)]
    by_file = [f for f in annotation_findings(parts) if f.kind == "overlap_file"]
    assert [(f.level, f.count, f.dataset) for f in by_file] == [("warning", 1, "train part / test part")]
    by_content = [f for f in image_findings(parts, progress=False) if f.kind == "overlap_content"]
    assert [(f.count, len(f.examples)) for f in by_content] == [(2, 2)]


def test_training_says_what_it_finds_before_the_first_step(
    folder: Path, cfg: CfgNode, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    categories = [*CATEGORIES, {"id": 8, "name": "mite"}]
    for name in ("train", "test"):
        register_coco_format(f"quick {name}", write(folder, {"categories": categories}, f"{name}.json"), str(folder))
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST, cfg.MODEL.DETR.NUM_QUERIES = ("quick train",), ("quick test",), 1

    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("an image was opened")

    monkeypatch.setattr(Image, "open", never)
    with caplog.at_level(logging.WARNING):
        training_dicts(cfg)
    parts = ("1 classes have no box [mite]", "more objects than the detector has queries (1)", "3 of 3 test images")
    for part in parts:
        assert part in caplog.text


def test_a_set_registered_elsewhere_is_checked_too(folder: Path) -> None:
    from detectron2.data import DatasetCatalog, MetadataCatalog
    from detectron2.structures import BoxMode

    record = {"file_name": str(folder / "b.png"), "height": 40, "width": 50, "image_id": 1}
    record["annotations"] = [{"bbox": [5, 6, 25, 26], "bbox_mode": BoxMode.XYXY_ABS, "category_id": 0}]
    DatasetCatalog.register("by code", lambda: [record])
    MetadataCatalog.get("by code").thing_classes = ["red"]
    part = read_part("by code", True)
    assert statistics(part)["box_sides"] == {"width": [20] * 3, "height": [20] * 3}
    assert [f.kind for f in annotation_findings([part], 9)] == ["classes_with_few_boxes"]
