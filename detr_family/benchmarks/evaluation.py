"""How long COCO's evaluation takes: python -m detr_family.benchmarks.evaluation [--images 5000] [--detections 300]

A made-up set: images of 640x480 with about 7 objects of 80 classes, as many as COCO's have; detections are those
objects, displaced, and boxes anywhere. Every implementation that is installed evaluates the same results. Seconds are
those of the processor, of evaluation, accumulation and summary, without reading.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
from pycocotools.coco import COCO
from tabulate import tabulate

from detr_family.evaluation.coco_protocol import implementations

CLASSES = 80


def made_up(images: int, detections: int, seed: int = 0) -> tuple[COCO, COCO]:
    """Ground truth and results, `detections` of each image."""
    random = np.random.default_rng(seed)
    annotations: list[dict[str, Any]] = []
    results: list[dict[str, Any]] = []
    for image in range(1, images + 1):
        count = int(random.poisson(7))
        corners, sides = random.uniform(0, (520, 360), (count, 2)), random.uniform(8, 120, (count, 2))
        classes = random.integers(1, CLASSES + 1, count)
        for k, box in enumerate(np.concatenate([corners, sides], 1)):
            entry = {"image_id": image, "category_id": int(classes[k]), "bbox": box.tolist(), "iscrowd": 0}
            annotations.append({**entry, "id": len(annotations) + 1, "area": float(box[2] * box[3])})
        of = random.integers(0, max(count, 1), detections)
        near = random.random(detections) < 0.3 if count else np.zeros(detections, bool)
        anywhere = np.concatenate(
            [random.uniform(0, (520, 360), (detections, 2)), random.uniform(8, 120, (detections, 2))], 1
        )
        boxes = np.where(near[:, None], np.concatenate([corners, sides], 1)[of], anywhere) if count else anywhere
        boxes = boxes + random.normal(0, 4, (detections, 4)) * near[:, None]
        boxes[:, 2:] = boxes[:, 2:].clip(1)
        own = classes[of] if count else random.integers(1, CLASSES + 1, detections)
        labels = np.where(near & (random.random(detections) < 0.8), own, random.integers(1, CLASSES + 1, detections))
        scores = (random.beta(1, 4, detections) + 0.3 * near).round(4)
        for box, label, score in zip(boxes.tolist(), labels.tolist(), scores.tolist(), strict=True):
            results.append({"image_id": image, "category_id": label, "bbox": box, "score": score})
    truth = COCO()
    truth.dataset = {
        "info": {},
        "images": [{"id": image, "width": 640, "height": 480} for image in range(1, images + 1)],
        "categories": [{"id": k, "name": str(k)} for k in range(1, CLASSES + 1)],
        "annotations": annotations,
    }
    truth.createIndex()
    return truth, truth.loadRes(results)


def command(arguments: Sequence[str] | None = None) -> None:
    """Parse the command line, evaluate and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=5000)
    parser.add_argument("--detections", type=int, default=300, help="of each image")
    args = parser.parse_args(arguments)
    with contextlib.redirect_stdout(io.StringIO()):
        truth, found = made_up(args.images, args.detections)
    rows = []
    for name, implementation in implementations().items():
        started = time.process_time()
        with contextlib.redirect_stdout(io.StringIO()):
            evaluation = implementation(truth, found, "bbox")
            evaluation.evaluate()
            evaluation.accumulate()
            evaluation.summarize()
        seconds = time.process_time() - started
        rows.append(
            [name, f"{seconds:.1f}", *(f"{100 * x:.10f}" for x in (*evaluation.stats[:2], evaluation.stats[8]))]
        )
        print(tabulate(rows[-1:], tablefmt="plain"), flush=True)
    print(tabulate(rows, ["implementation", "seconds", "AP", "AP50", "AR100"], disable_numparse=True))


if __name__ == "__main__":
    command()
