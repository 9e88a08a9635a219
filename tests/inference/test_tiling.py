"""Large images in tiles: where the tiles lie, and what becomes of objects that they cut."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from detectron2.structures import Boxes, Instances
from torch import nn

from detr_family.data.tiling import tiles
from detr_family.inference.predictor import Predictor
from detr_family.inference.tiling import merge_tiles


@pytest.mark.parametrize(
    ("height", "width", "tile", "overlap"), [(500, 1000, 300, 0.2), (301, 300, 300, 0.0), (90, 2000, 100, 0.5)]
)
def test_tiles_cover_an_image_and_overlap_enough(height: int, width: int, tile: int, overlap: float) -> None:
    covered = np.zeros((height, width), int)
    places = tiles(height, width, tile, overlap)
    for x1, y1, x2, y2 in places:
        assert x1 >= 0 and y1 >= 0 and x2 <= width and y2 <= height and max(x2 - x1, y2 - y1) <= tile
        covered[y1:y2, x1:x2] += 1
    assert covered.min() >= 1
    starts = sorted({place[0] for place in places})
    assert all(b - a <= tile * (1 - overlap) + 1 for a, b in pairwise(starts))


@pytest.mark.parametrize(("tile", "overlap"), [(-5, 0.2), (100, 1.0), (100, -0.1)])
def test_tiles_that_cannot_be(tile: int, overlap: float) -> None:
    with pytest.raises(ValueError, match=r"tile's side is -5|overlap is"):
        Predictor(nn.Identity(), tile=tile, overlap=overlap)


class Squares(nn.Module):
    """Finds the bright rectangle of an image, if a part of it is there, as a detector would: in pixels of its input."""

    num_classes = 1

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[int, int]] = []

    def forward(self, inputs: list[dict[str, Any]]) -> list[dict[str, Instances]]:
        results = []
        for entry in inputs:
            self.seen.append((entry["height"], entry["width"]))
            found = Instances((entry["height"], entry["width"]))
            scale = entry["height"] / entry["image"].shape[1]
            rows, columns = (torch.nonzero(entry["image"][0].amax(i) > 100).flatten() for i in (1, 0))
            there = len(rows) > 0
            corners = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1] if there else []
            found.pred_boxes = Boxes(torch.tensor(corners, dtype=torch.float32).reshape(-1, 4) * scale)
            # A piece scores higher than the whole: it must go all the same.
            found.scores = torch.full((int(there),), 0.9 if max(entry["height"], entry["width"]) <= 100 else 0.5)
            found.pred_classes = torch.zeros(int(there), dtype=torch.int64)
            results.append({"instances": found})
        return results


def picture(box: tuple[int, int, int, int], height: int = 150, width: int = 260) -> np.ndarray:
    image = np.zeros((height, width, 3), np.uint8)
    x1, y1, x2, y2 = box
    image[y1:y2, x1:x2] = 255
    return image


@pytest.mark.parametrize("box", [(10, 10, 30, 30), (70, 60, 90, 110), (20, 20, 240, 140)])
@pytest.mark.parametrize("batch_size", [1, 4])
def test_an_object_is_found_once_and_whole(box: tuple[int, int, int, int], batch_size: int) -> None:
    model = Squares()
    predictor = Predictor(model, min_size=0, tile=100, overlap=0.3, batch_size=batch_size)
    found = predictor(picture(box))
    assert found.pred_boxes.tensor.tolist() == [list(box)] and found.image_size == (150, 260)
    assert (150, 260) in model.seen and (100, 100) in model.seen


def test_small_images_are_looked_at_whole() -> None:
    model = Squares()
    Predictor(model, min_size=0, tile=300)(picture((10, 10, 30, 30)))
    assert model.seen == [(150, 260)]


def instances(boxes: list[list[float]], scores: list[float], classes: list[int]) -> Instances:
    made = Instances((100, 100))
    made.pred_boxes, made.scores = Boxes(torch.tensor(boxes).reshape(-1, 4)), torch.tensor(scores)
    made.pred_classes = torch.tensor(classes)
    return made


def test_merging_is_by_class_and_keeps_pieces_that_nothing_covers() -> None:
    left = instances([[60.0, 10, 100, 30], [5, 5, 20, 20], [80, 60, 100, 80]], [0.9, 0.8, 0.7], [0, 0, 1])
    right = instances([[0.0, 10, 30, 30], [25, 5, 40, 20]], [0.6, 0.5], [0, 0])
    # The tiles are 0 to 100 and 80 to 180: the first object is cut by both and seen whole by none.
    merged = merge_tiles([left, right], [(0, 0, 100, 100), (80, 0, 180, 100)], 100, 180, 10)
    assert merged.scores.tolist() == pytest.approx([0.9, 0.8, 0.7, 0.5])
    assert merged.pred_classes.tolist() == [0, 0, 1, 0]
    assert merged.pred_boxes.tensor[3].tolist() == [105, 5, 120, 20]
    assert len(merge_tiles([left, right], [(0, 0, 100, 100), (80, 0, 180, 100)], 100, 180, 2)) == 2
