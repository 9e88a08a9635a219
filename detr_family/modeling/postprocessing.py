"""From predicted sets to Detectron2's `Instances`: no NMS, the scores decide."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from detectron2.structures import Boxes, Instances
from torch import Tensor
from torchvision.ops import box_convert

from detr_family.layers.shapes import at_most

Selection = Callable[[Tensor, Tensor, int], tuple[Tensor, Tensor, Tensor]]


def best_class_per_query(logits: Tensor, boxes: Tensor, topk: int) -> tuple[Tensor, Tensor, Tensor]:
    """Each query speaks for its best class other than no-object (DETR, appendix A.4).

    Args:
        logits: (B, Q, K), no-object last.
        boxes: (B, Q, 4).
        topk: detections to keep per image, by score; at most Q come out.

    Returns:
        scores (B, min(topk, Q)) in descending order, classes of the same shape, boxes (B, min(topk, Q), 4).
    """
    scores, classes = logits.float().softmax(-1)[..., :-1].max(-1)
    scores, query = scores.topk(min(topk, scores.shape[1]), dim=1)
    return scores, classes.gather(1, query), boxes.gather(1, query[..., None].expand(-1, -1, 4))


def best_pairs(logits: Tensor, boxes: Tensor, topk: int) -> tuple[Tensor, Tensor, Tensor]:
    """The best pairs of query and class; a query may speak for several classes (Deformable DETR's release).

    Args:
        logits: (B, Q, K) of sigmoid classifiers.
        boxes: (B, Q, 4).
        topk: detections to keep per image, by score; at most Q * K come out.

    Returns:
        as `best_class_per_query`.
    """
    num_classes = logits.shape[-1]
    scores = logits.float().sigmoid().flatten(1)
    scores, pair = scores.topk(at_most(topk, scores.shape[1]), dim=1)
    query = pair // num_classes
    return scores, pair % num_classes, boxes.gather(1, query[..., None].expand(-1, -1, 4))


def boxes_in_pixels(boxes_cxcywh: Tensor, sizes: Tensor) -> Tensor:
    """Boxes in pixels of the image as the detector saw it, clipped to it.

    Args:
        boxes_cxcywh: (B, k, 4) in [0, 1] of the unpadded image.
        sizes: (B, 2) int64, height and width of each unpadded image.

    Returns:
        (B, k, 4) float32 as x1, y1, x2, y2.
    """
    scale = sizes.flip(1).repeat(1, 2)[:, None].float()  # B x 1 x 4: width, height, width, height
    return box_convert(boxes_cxcywh.float(), "cxcywh", "xyxy").clamp(0, 1) * scale


def to_instances(
    scores: Tensor, classes: Tensor, boxes_cxcywh: Tensor, image_sizes: Sequence[tuple[int, int]]
) -> list[Instances]:
    """Boxes in pixels of the image as the detector saw it.

    Args:
        scores: (B, k).
        classes: (B, k).
        boxes_cxcywh: (B, k, 4) in [0, 1] of the unpadded image.
        image_sizes: (height, width) per image.

    Returns:
        one `Instances` per image with `pred_boxes`, `scores` and `pred_classes`.
    """
    results = []
    boxes_xyxy = box_convert(boxes_cxcywh.float(), "cxcywh", "xyxy")
    for i, (height, width) in enumerate(image_sizes):
        pixels = Boxes(boxes_xyxy[i].clone())
        pixels.scale(width, height)
        results.append(Instances((height, width), pred_boxes=pixels, scores=scores[i], pred_classes=classes[i]))
    return results
