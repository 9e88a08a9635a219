"""How well single images are predicted, and which score threshold suits a detector."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from pycocotools import mask as coco_mask

IOU = 0.5


@dataclass(frozen=True)
class ImageScore:
    """One image at the threshold that is best for all together.

    Attributes:
        record: its dataset dict.
        detections: results of COCO's format, best first, category_id as class number.
        f1: 2 TP / (detections + objects), in [0, 1].
        found: objects found.
        objects: objects there are, without crowd regions.
        wrong: detections that match no object.
    """

    record: dict[str, Any]
    detections: list[dict[str, Any]]
    f1: float
    found: int
    objects: int
    wrong: int


@dataclass(frozen=True)
class SetScore:
    """A test set at the score threshold with the highest F1 of all images together.

    Attributes:
        threshold: least score.
        precision: share of detections that are right, in [0, 1].
        recall: share of objects that are found, in [0, 1].
        f1: their harmonic mean.
        images: each image at this threshold.
    """

    threshold: float
    precision: float
    recall: float
    f1: float
    images: list[ImageScore]


def match(boxes: np.ndarray, truth: np.ndarray, crowd: np.ndarray, scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Which detections of one class find an object: the best score first, each object once, IoU 0.5 or more.

    Whether a detection counts does not depend on those that score less, so any threshold can be taken later.

    Args:
        boxes: (N, 4) as x, y, width, height.
        truth: (M, 4), likewise.
        crowd: (M,) bool; what lies in a crowd region is neither right nor wrong.
        scores: (N,).

    Returns:
        right (N,) and ignored (N,), bool.
    """
    right, ignored = np.zeros(len(boxes), bool), np.zeros(len(boxes), bool)
    if not len(boxes) or not len(truth):
        return right, ignored
    overlap = np.asarray(coco_mask.iou(boxes.astype(np.float64), truth.astype(np.float64), crowd.astype(np.uint8)))
    free = ~crowd
    for i in np.argsort(-scores, kind="stable"):
        candidates = np.where(free & (overlap[i] >= IOU))[0]
        if len(candidates):
            right[i] = True
            free[candidates[overlap[i, candidates].argmax()]] = False
        elif (crowd & (overlap[i] >= IOU)).any():
            ignored[i] = True
    return right, ignored


def score_images(
    records: Sequence[dict[str, Any]],
    results: Sequence[dict[str, Any]],
    class_of: dict[int, int],
    limit: int = 100,
) -> SetScore:
    """Scores a test set's images.

    Args:
        records: Detectron2's dataset dicts with annotations whose boxes are x, y, width, height.
        results: entries of COCO's result format.
        class_of: the class number of each category id in the results.
        limit: the most detections of an image, as in COCO's evaluation.
    """
    by_image: dict[Any, list[dict[str, Any]]] = defaultdict(list)
    for entry in results:
        by_image[entry["image_id"]].append(entry)
    judged = []
    for record in records:
        found = sorted(by_image[record["image_id"]], key=lambda entry: -entry["score"])[:limit]
        judged.append((record, found, *_judge(record, found, class_of)))
    scores = np.concatenate([np.asarray([d["score"] for d in found]) for _, found, _, _ in judged] or [np.zeros(0)])
    right = np.concatenate([right for _, _, right, _ in judged] or [np.zeros(0, bool)])
    counted = ~np.concatenate([ignored for _, _, _, ignored in judged] or [np.zeros(0, bool)])
    objects = sum(_objects(record) for record in records)
    threshold, precision, recall, f1 = _best_threshold(scores[counted], right[counted], objects)
    images = []
    for record, found, is_right, ignored in judged:
        kept = np.asarray([d["score"] >= threshold for d in found], bool)
        hits, misses = int((kept & is_right).sum()), int((kept & ~is_right & ~ignored).sum())
        total = hits + misses + _objects(record)
        shown = [
            {**entry, "category_id": class_of[entry["category_id"]]}
            for entry, keep in zip(found, kept, strict=True)
            if keep
        ]
        image_f1 = 2 * hits / total if total else 1.0
        images.append(ImageScore(record, shown, image_f1, hits, _objects(record), misses))
    return SetScore(threshold, precision, recall, f1, images)


def _objects(record: dict[str, Any]) -> int:
    return sum(not a.get("iscrowd", 0) for a in record["annotations"])


def _judge(
    record: dict[str, Any], found: Sequence[dict[str, Any]], class_of: dict[int, int]
) -> tuple[np.ndarray, np.ndarray]:
    right, ignored = np.zeros(len(found), bool), np.zeros(len(found), bool)
    classes = np.asarray([class_of[entry["category_id"]] for entry in found], int)
    for number in set(classes.tolist()):
        places = np.where(classes == number)[0]
        truth = [a for a in record["annotations"] if a["category_id"] == number]
        right[places], ignored[places] = match(
            np.asarray([found[i]["bbox"] for i in places], float).reshape(-1, 4),
            np.asarray([a["bbox"] for a in truth], float).reshape(-1, 4),
            np.asarray([bool(a.get("iscrowd", 0)) for a in truth], bool),
            np.asarray([found[i]["score"] for i in places], float),
        )
    return right, ignored


def _best_threshold(scores: np.ndarray, right: np.ndarray, objects: int) -> tuple[float, float, float, float]:
    """Threshold, precision, recall and F1 where F1 is highest; 0.5 where nothing is ever right."""
    if not right.any():
        return 0.5, 0.0, 0.0, 0.0
    order = np.argsort(-scores, kind="stable")
    hits = right[order].cumsum()
    counts = np.arange(1, len(order) + 1)
    f1 = 2 * hits / (counts + objects)
    # Detections of one score come and go together.
    last = np.append(np.diff(scores[order]) != 0, True)
    best = int(np.where(last, f1, -1.0).argmax())
    return float(scores[order][best]), float(hits[best] / counts[best]), float(hits[best] / objects), float(f1[best])
