"""Where a detector errs on a test set: kinds of errors, confusions, each class's threshold, sizes of objects, images.

The kinds are those of TIDE (arXiv 2008.08115, section 2.2), at its IoU of 0.5 for an object found and 0.1 for
background. A detection that finds no object is, by the first that fits: `badly placed` (0.1 to 0.5 with an object of
its class), `wrong class` (0.5 or more with an object of another), `duplicate` (0.5 or more with an object that a
better one has found), `background` (0.1 or less with every object), else `class and place`. An object is `missed`
where no detection is badly placed on it or takes it for another class. What a kind costs is the AP50 that would be
gained by mending it alone (section 2.3): an object that nothing found is given to the best of the detections that are
badly placed on it or take it for another class, if that is of the kind; others of the kind go, and so do missed
objects.

This is what the authors' tidecv computes, but for three things, in which this follows COCO's protocol. Classes without
objects do not count in the mean; tidecv counts them with an AP of 0 as long as something was taken for them, and so
gives a lower AP50, and to `wrong class` a higher cost. The recalls are numpy's linspace(0, 1, 101), not n / 100, some
of which are the next number. Detections in crowd regions are no errors of any kind.
"""

from __future__ import annotations

import csv
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from pycocotools import mask as coco_mask

FOUND, BACKGROUND = 0.5, 0.1  # IoU
KINDS = ("wrong class", "badly placed", "class and place", "duplicate", "background", "missed")
# Borders between sizes of objects: the square root of their area, pixels.
SIZES = (0.0, 16.0, 32.0, 64.0, 96.0, 192.0, np.inf)
_RIGHT, _IGNORED = "right", "ignored"


@dataclass(frozen=True)
class Kind:
    """One kind of error.

    Attributes:
        name: one of KINDS.
        count: how many at the threshold.
        cost: AP50 that mending all of them would gain, at any threshold, in percent.
    """

    name: str
    count: int
    cost: float


@dataclass(frozen=True)
class ClassScore:
    """One class at the threshold that is best for it.

    Attributes:
        name: the class.
        objects: without crowd regions.
        ap50: in percent; NaN without objects.
        threshold: the score with the highest F1; NaN where nothing is right.
        precision, recall, f1: at it, in [0, 1].
        curve: (N, 2), recall and precision as the threshold falls.
    """

    name: str
    objects: int
    ap50: float
    threshold: float
    precision: float
    recall: float
    f1: float
    curve: np.ndarray


@dataclass(frozen=True)
class SizeScore:
    """Objects from `low` to below `high`, square roots of areas in pixels; ap50 in percent, recall in [0, 1]."""

    low: float
    high: float
    objects: int
    ap50: float
    recall: float


@dataclass(frozen=True)
class Errors:
    """What `find_errors` finds.

    Attributes:
        threshold: the score that counts, confusions and recall by size are at.
        ap50: in percent, as the mean over classes with objects.
        kinds: by KINDS.
        classes: by class number.
        sizes: those with objects.
        confusion: (K + 1, K + 1) counts; rows are what there is, columns what was said, the last row background and
            the last column missed.
        images: for each image its file name, objects, found, wrong and AP50 (percent; NaN without objects).
    """

    threshold: float
    ap50: float
    kinds: list[Kind]
    classes: list[ClassScore]
    sizes: list[SizeScore]
    confusion: np.ndarray
    images: list[tuple[str, int, int, int, float]]

    def worst_first(self) -> list[tuple[str, int, int, int, float]]:
        """The images, those with most objects missed and wrong detections first."""
        return sorted(self.images, key=lambda row: (row[2] - row[1] - row[3], row[0]))


@dataclass
class _Image:
    """Detections, best first, and objects without crowd regions of one image, matched."""

    name: str
    scores: np.ndarray  # (N,)
    classes: np.ndarray  # (N,)
    areas: np.ndarray  # (N,)
    kinds: list[str]
    targets: np.ndarray  # (N,) the object that a detection found, or would have; -1
    true_classes: np.ndarray  # (M,)
    true_areas: np.ndarray  # (M,)
    overlap: np.ndarray  # (N, M)


def find_errors(
    records: Sequence[dict[str, Any]],
    results: Sequence[dict[str, Any]],
    class_of: dict[int, int],
    class_names: Sequence[str],
    threshold: float,
    limit: int = 100,
) -> Errors:
    """Judges the detections of a test set.

    Args:
        records: Detectron2's dataset dicts with annotations whose boxes are x, y, width, height.
        results: entries of COCO's result format.
        class_of: the class number of each category id in the results.
        class_names: by class number.
        threshold: the score for counts.
        limit: the most detections of an image, as in COCO's evaluation.
    """
    by_image: dict[Any, list[dict[str, Any]]] = defaultdict(list)
    for entry in results:
        by_image[entry["image_id"]].append(entry)
    images = []
    for record in records:
        found = sorted(by_image[record["image_id"]], key=lambda entry: -entry["score"])[:limit]
        images.append(_judge(record, found, class_of))
    count = len(class_names)
    classes = [_class_score(images, number, class_names[number]) for number in range(count)]
    ap50 = _mean([score.ap50 for score in classes])
    return Errors(
        threshold,
        ap50,
        [Kind(k, _count(images, k, threshold), max(_mended(images, count, k) - ap50, 0.0)) for k in KINDS],
        classes,
        [score for score in (_size(images, count, *borders, threshold) for borders in pairwise(SIZES)) if score],
        _confusion(images, count, threshold),
        [_image_row(image, count, threshold) for image in images],
    )


def write_images(errors: Errors, path: Path) -> None:
    """All images as a CSV file, those with most errors first."""
    with open(path, "w", encoding="utf-8", errors="backslashreplace", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("image", "objects", "found", "wrong", "AP50"))
        writer.writerows(errors.worst_first())


def _judge(record: dict[str, Any], found: Sequence[dict[str, Any]], class_of: dict[int, int]) -> _Image:
    """Matches as COCO's evaluation does at an IoU of 0.5, and names the kind of each detection."""
    objects = [a for a in record["annotations"] if not a.get("iscrowd", 0)]
    crowds = [a for a in record["annotations"] if a.get("iscrowd", 0)]
    boxes = np.asarray([entry["bbox"] for entry in found], np.float64).reshape(-1, 4)
    true = np.asarray([a["bbox"] for a in objects], np.float64).reshape(-1, 4)
    scores = np.asarray([entry["score"] for entry in found], np.float64)
    classes = np.asarray([class_of[entry["category_id"]] for entry in found], np.int64)
    true_classes = np.asarray([a["category_id"] for a in objects], np.int64)
    crowd_classes = np.asarray([a["category_id"] for a in crowds], np.int64)
    overlap = _iou(boxes, true, crowd=False)
    in_crowd = _iou(boxes, np.asarray([a["bbox"] for a in crowds], np.float64).reshape(-1, 4), crowd=True)
    same = classes[:, None] == true_classes[None]
    kinds, targets = [""] * len(found), np.full(len(found), -1)
    free = np.ones(len(objects), bool)
    for i in range(len(found)):
        candidates = np.where(same[i] & free & (overlap[i] >= FOUND))[0]
        if len(candidates):
            targets[i] = candidates[overlap[i, candidates].argmax()]
            kinds[i] = _RIGHT
            free[targets[i]] = False
        elif ((in_crowd[i] >= FOUND) & (crowd_classes == classes[i])).any():
            kinds[i] = _IGNORED
    for i, kind in enumerate(kinds):
        if not kind:
            kinds[i], targets[i] = _kind(overlap[i], same[i])
    areas, true_areas = boxes[:, 2:].prod(1), np.asarray([a.get("area", 0) for a in objects], np.float64)
    true_areas = np.where(true_areas > 0, true_areas, true[:, 2:].prod(1))
    name = str(record["file_name"])
    return _Image(name, scores, classes, areas, kinds, targets, true_classes, true_areas, overlap)


def _iou(boxes: np.ndarray, true: np.ndarray, crowd: bool) -> np.ndarray:
    if not len(boxes) or not len(true):
        return np.zeros((len(boxes), len(true)))
    return np.asarray(coco_mask.iou(boxes, true, np.full(len(true), crowd, np.uint8)))


def _kind(overlap: np.ndarray, same: np.ndarray) -> tuple[str, int]:
    """The kind of a detection that found nothing, and the object that it was meant for or -1."""
    if not len(overlap):
        return "background", -1
    own, other = np.where(same, overlap, 0.0), np.where(same, 0.0, overlap)
    if BACKGROUND <= own.max() <= FOUND:
        return "badly placed", int(own.argmax())
    if other.max() >= FOUND:
        return "wrong class", int(other.argmax())
    if own.max() >= FOUND:
        return "duplicate", -1
    return ("background", -1) if overlap.max() <= BACKGROUND else ("class and place", -1)


def _average_precision(scores: np.ndarray, right: np.ndarray, objects: int) -> float:
    """COCO's AP over 101 recalls, in percent; NaN without objects."""
    if not objects:
        return float("nan")
    order = np.argsort(-scores, kind="mergesort")
    hits = right[order].cumsum()
    recall, precision = hits / objects, hits / np.arange(1, len(hits) + 1)
    precision = np.maximum.accumulate(precision[::-1])[::-1]
    places = np.searchsorted(recall, np.linspace(0, 1, 101), side="left")
    return 100 * float(np.append(precision, 0.0)[places].mean())


def _mean(values: Sequence[float]) -> float:
    known = [value for value in values if value == value]
    return sum(known) / len(known) if known else float("nan")


def _mean_precision(
    scores: list[list[float]], right: list[list[bool]], objects: np.ndarray, before: np.ndarray | None = None
) -> float:
    """The mean of AP50 over classes with objects; scores and right by class.

    One that had objects `before` and has none any more counts as 0.
    """
    parts = zip(scores, right, objects, objects if before is None else before, strict=True)
    return _mean([_average_precision(np.asarray(s), np.asarray(r, bool), int(n)) if n or not b else 0.0
                  for s, r, n, b in parts])  # fmt: skip


def _detections(images: Sequence[_Image], number: int) -> tuple[np.ndarray, np.ndarray]:
    """Scores of a class's detections, and which are right; those in crowd regions left out."""
    scores, right = [], []
    for image in images:
        for i in np.where(image.classes == number)[0]:
            if image.kinds[i] != _IGNORED:
                scores.append(image.scores[i])
                right.append(image.kinds[i] == _RIGHT)
    return np.asarray(scores, np.float64), np.asarray(right, bool)


def _class_score(images: Sequence[_Image], number: int, name: str) -> ClassScore:
    scores, right = _detections(images, number)
    objects = sum(int((image.true_classes == number).sum()) for image in images)
    ap50 = _average_precision(scores, right, objects)
    if not right.any():
        return ClassScore(name, objects, ap50, float("nan"), 0.0, 0.0, 0.0, np.zeros((0, 2)))
    order = np.argsort(-scores, kind="stable")
    hits, counts = right[order].cumsum(), np.arange(1, len(order) + 1)
    last = np.append(np.diff(scores[order]) != 0, True)  # detections of one score come and go together
    f1 = np.where(last, 2 * hits / (counts + objects), -1.0)
    best = int(f1.argmax())
    curve = np.stack([hits / objects, hits / counts], 1)
    threshold, precision, recall = float(scores[order][best]), hits[best] / counts[best], hits[best] / objects
    return ClassScore(name, objects, ap50, threshold, float(precision), float(recall), float(f1[best]), curve)


def _missed(image: _Image, threshold: float | None = None) -> np.ndarray:
    """(M,) bool: objects that no detection found, badly placed or took for another class."""
    missed = np.ones(len(image.true_classes), bool)
    for kind, target, score in zip(image.kinds, image.targets, image.scores, strict=True):
        if target >= 0 and kind != _IGNORED and (threshold is None or score >= threshold):
            missed[target] = False
    return missed


def _count(images: Sequence[_Image], kind: str, threshold: float) -> int:
    if kind == "missed":
        return sum(int(_missed(image, threshold).sum()) for image in images)
    judged = [pair for image in images for pair in zip(image.kinds, image.scores, strict=True)]
    return sum(own == kind and bool(score >= threshold) for own, score in judged)


def _mended(images: Sequence[_Image], count: int, kind: str) -> float:
    """AP50 with one kind of error mended; see the module."""
    scores: list[list[float]] = [[] for _ in range(count)]
    right: list[list[bool]] = [[] for _ in range(count)]
    objects, before = np.zeros(count, np.int64), np.zeros(count, np.int64)
    for image in images:
        before += np.bincount(image.true_classes, minlength=count)[:count]
        there = image.true_classes if kind != "missed" else image.true_classes[~_missed(image)]
        objects += np.bincount(there, minlength=count)[:count]
        taken = {int(t) for k, t in zip(image.kinds, image.targets, strict=True) if k == _RIGHT}
        best: dict[int, int] = {}  # detection for each object that nothing found
        for i, target in enumerate(image.targets.tolist()):
            if target >= 0 and target not in taken:
                best.setdefault(target, i)
        for i, own in enumerate(image.kinds):
            number, target, is_right = int(image.classes[i]), int(image.targets[i]), own == _RIGHT
            if own == _IGNORED or (own == kind and best.get(target) != i):
                continue
            if own == kind:
                number, is_right = int(image.true_classes[target]), True
            scores[number].append(float(image.scores[i]))
            right[number].append(is_right)
    return _mean_precision(scores, right, objects, before)


def _size(images: Sequence[_Image], count: int, low: float, high: float, threshold: float) -> SizeScore | None:
    """AP50 of objects of one size: detections of other sizes count where they find one, and are not wrong else."""
    scores: list[list[float]] = [[] for _ in range(count)]
    right: list[list[bool]] = [[] for _ in range(count)]
    objects, found = np.zeros(count, np.int64), 0
    for image in images:
        inside = (np.sqrt(image.true_areas) >= low) & (np.sqrt(image.true_areas) < high)
        objects += np.bincount(image.true_classes[inside], minlength=count)[:count]
        for i, kind in enumerate(image.kinds):
            if kind == _RIGHT and inside[image.targets[i]]:
                found += bool(image.scores[i] >= threshold)
            elif kind in (_RIGHT, _IGNORED) or not low <= np.sqrt(image.areas[i]) < high:
                continue
            scores[image.classes[i]].append(float(image.scores[i]))
            right[image.classes[i]].append(kind == _RIGHT)
    if not objects.sum():
        return None
    ap50 = _mean_precision(scores, right, objects)
    return SizeScore(low, high, int(objects.sum()), ap50, found / int(objects.sum()))


def _confusion(images: Sequence[_Image], count: int, threshold: float) -> np.ndarray:
    """See `Errors.confusion`: each detection, best first, takes the free object that it overlaps most, 0.5 or more."""
    table = np.zeros((count + 1, count + 1), np.int64)
    for image in images:
        free = np.ones(len(image.true_classes), bool)
        for i, kind in enumerate(image.kinds):
            if image.scores[i] < threshold or kind == _IGNORED:
                continue
            if kind == _RIGHT and free[image.targets[i]]:
                target = int(image.targets[i])
            else:
                fitting = np.where(free & (image.overlap[i] >= FOUND))[0]
                target = int(fitting[image.overlap[i, fitting].argmax()]) if len(fitting) else -1
            row = count if target < 0 else int(image.true_classes[target])
            table[row, image.classes[i]] += 1
            if target >= 0:
                free[target] = False
        for number in image.true_classes[free]:
            table[number, count] += 1
    return table


def _image_row(image: _Image, count: int, threshold: float) -> tuple[str, int, int, int, float]:
    kept = image.scores >= threshold
    found = sum(bool(k) and kind == _RIGHT for k, kind in zip(kept, image.kinds, strict=True))
    wrong = sum(bool(k) and kind not in (_RIGHT, _IGNORED) for k, kind in zip(kept, image.kinds, strict=True))
    ap50 = _mean(
        [
            _average_precision(*_detections([image], number), int((image.true_classes == number).sum()))
            for number in set(image.true_classes.tolist())
        ]
    )
    return image.name, len(image.true_classes), found, wrong, ap50
