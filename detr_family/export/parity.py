"""Whether an exported detector finds what the detector finds, as sets: the order of near-equal scores is free."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from detectron2.structures import Instances
from scipy.optimize import linear_sum_assignment
from torch import Tensor

Detector = Callable[[list[dict[str, Any]]], list[dict[str, Instances]]]

SCORE_BOUND = 1e-3
BOX_BOUND = 0.1  # pixels
LEAST_SCORE = 0.1
_AT_LEAST = 5  # detections of an image that are compared, however low their scores


@dataclass
class Difference:
    """The largest differences of a comparison.

    Attributes:
        score: of scores.
        box: of a box's coordinates, pixels of the image.
        compared: detections.
        missing: detections of the one that the other has not at all, by class.
    """

    score: float = 0.0
    box: float = 0.0
    compared: int = 0
    missing: int = 0

    def __or__(self, other: Difference) -> Difference:
        return Difference(
            max(self.score, other.score),
            max(self.box, other.box),
            self.compared + other.compared,
            self.missing + other.missing,
        )

    def within(self, score: float = SCORE_BOUND, box: float = BOX_BOUND) -> bool:
        """Whether all of it is within the bounds, and there was something; a NaN counts as infinite."""
        return self.score <= score and self.box <= box and self.missing == 0 and self.compared > 0


def difference(expected: Instances, found: Instances, least_score: float = LEAST_SCORE) -> Difference:
    """Compare what two detectors found in an image, in both directions.

    Each detection that scores `least_score` or more, and at least the best five, is paired with one of the same class
    in the other's whole set, so that differences are least in sum.
    """
    return _one_way(expected, found, least_score) | _one_way(found, expected, least_score)


def _one_way(these: Instances, those: Instances, least_score: float) -> Difference:
    result = Difference()
    scores = these.scores
    if bool(torch.isnan(scores).any()):
        return Difference(score=math.inf, box=math.inf, missing=len(these))
    order = scores.argsort(descending=True)
    count = max(int((scores >= least_score).sum()), min(_AT_LEAST, len(these)))
    chosen = order[:count]
    for label in these.pred_classes[chosen].unique():
        a = chosen[these.pred_classes[chosen] == label]
        b = (those.pred_classes == label).nonzero()[:, 0]
        by_score = (these.scores[a][:, None] - those.scores[b]).abs().nan_to_num(math.inf)
        by_box = (these.pred_boxes.tensor[a][:, None] - those.pred_boxes.tensor[b]).abs().amax(-1).nan_to_num(math.inf)
        cost: np.ndarray = (by_score / SCORE_BOUND + by_box / BOX_BOUND).clamp(max=1e12).numpy()
        rows, columns = linear_sum_assignment(cost)
        result |= Difference(missing=len(a) - len(rows))
        if len(rows):
            score, box = (float(x[rows, columns].max()) for x in (by_score, by_box))
            result |= Difference(score, box, len(rows))
    return result


def compare(model: Detector, exported: Detector, batches: Sequence[list[dict[str, Any]]]) -> Difference:
    """Run both on the same batches."""
    result = Difference()
    for batch in batches:
        with torch.no_grad():
            pairs = zip(model(batch), exported(batch), strict=True)
        for expected, found in pairs:
            result |= difference(expected["instances"].to("cpu"), found["instances"])
    return result


def sample_batches(
    sizes: Sequence[tuple[int, int]], counts: Sequence[int], images: Sequence[Tensor] = (), seed: int = 0
) -> list[list[dict[str, Any]]]:
    """Batches of each number of images and each size; in a batch of several, all but the first are padded.

    Args:
        sizes: height and width.
        counts: images in a batch.
        images: (3, H, W) to resize; by default coloured rectangles on noise are drawn.
        seed: of what is drawn.
    """
    generator = torch.Generator().manual_seed(seed)
    source = itertools.cycle(images)
    batches = []
    for (height, width), count in itertools.product(sizes, counts):
        batch = []
        for i in range(count):
            h, w = (height, width) if i == 0 else (max(height - height // 8, 1), max(width - width // 5, 1))
            image = next(source) if images else _drawn(h, w, generator)
            resized = torch.nn.functional.interpolate(image[None].float(), (h, w), mode="bilinear", antialias=True)
            batch.append({"image": resized[0].round().byte(), "height": h, "width": w})
        batches.append(batch)
    return batches


def _drawn(height: int, width: int, generator: torch.Generator) -> Tensor:
    image = torch.randint(90, 166, (3, height, width), generator=generator).float()
    for _ in range(4):
        share = torch.rand(4, generator=generator)
        y, x = int(share[0] * 0.7 * height), int(share[1] * 0.7 * width)
        bottom, right = y + 1 + int((0.1 + share[2]) * 0.3 * height), x + 1 + int((0.1 + share[3]) * 0.3 * width)
        image[:, y:bottom, x:right] = torch.randint(256, (3, 1, 1), generator=generator).float()
    return image
