"""Images larger than a detector can look at whole: overlapping tiles, and what is found in them merged.

The image as a whole is one more view, for objects larger than a tile. A box that ends at the border of its tile may be
a piece of an object: it goes where half of it lies in a box of the same class that is no piece, or in a better piece.
Of the others the best of those that overlap stays. (The slicer of the package supervision, 0.31, has one overlap filter
for all boxes: it does not tell pieces from whole boxes, nor looks at the image as a whole.)
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from detectron2.structures import Boxes, Instances
from torch import Tensor
from torchvision.ops import batched_nms, box_area

_SAME = 0.5  # IoU from which on two boxes are of one object, and share of a piece that lies in another box
_AT_BORDER = 2.0  # pixels


def merge_tiles(
    found: Sequence[Instances], places: Sequence[tuple[int, int, int, int]], height: int, width: int, detections: int
) -> Instances:
    """What is found in an image, from what is found in its tiles.

    Args:
        found: of each tile, boxes in its own pixels.
        places: of the tiles in the image.
        height: of the image, pixels.
        width: of the image, pixels.
        detections: the most that are returned.
    """
    boxes, cut = [], []
    for instances, (x1, y1, x2, y2) in zip(found, places, strict=True):
        own = instances.pred_boxes.tensor
        inner = [x1 > 0, y1 > 0, x2 < width, y2 < height]
        near = torch.stack(
            [
                own[:, 0] < _AT_BORDER,
                own[:, 1] < _AT_BORDER,
                own[:, 2] > x2 - x1 - _AT_BORDER,
                own[:, 3] > y2 - y1 - _AT_BORDER,
            ],
            1,
        )
        cut.append((near & torch.tensor(inner)).any(1))
        boxes.append(own + own.new_tensor([x1, y1, x1, y1]))
    every, is_cut = torch.cat(boxes), torch.cat(cut)
    scores = torch.cat([instances.scores for instances in found])
    classes = torch.cat([instances.pred_classes for instances in found])
    whole = torch.nonzero(~is_cut).flatten()
    kept = whole[batched_nms(every[whole], scores[whole], classes[whole], _SAME)]
    pieces = torch.nonzero(is_cut).flatten()
    for i in pieces[scores[pieces].argsort(descending=True, stable=True)]:
        others = kept[classes[kept] == classes[i]]
        if not len(others) or float(_share_inside(every[i], every[others]).max()) < _SAME:
            kept = torch.cat([kept, i[None]])
    kept = kept[scores[kept].argsort(descending=True, stable=True)][:detections]
    merged = Instances((height, width))
    merged.pred_boxes, merged.scores, merged.pred_classes = Boxes(every[kept]), scores[kept], classes[kept]
    return merged


def _share_inside(box: Tensor, others: Tensor) -> Tensor:
    """(N,) shares of a box's area that lie in each of the others."""
    corner, opposite = torch.maximum(box[:2], others[:, :2]), torch.minimum(box[2:], others[:, 2:])
    return (opposite - corner).clamp(min=0).prod(1) / box_area(box[None]).clamp(min=1e-9)
