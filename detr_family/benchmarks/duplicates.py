"""Near-duplicates of a trained detector: python -m detr_family.benchmarks.duplicates --config-file FILE KEY VALUE ...

DINO's contrastive denoising is to keep queries near an object, but not the nearest, from predicting it once more
(arXiv 2203.03605, section 3.3). The measure: detections of DATASETS.TEST with a score of at least --score count as
near-duplicates where a detection of the same class, but with a higher score, overlaps them by an IoU of at least --iou.
Their number is divided by that of the ground-truth boxes. What a detector does not find has no duplicates either: the
share of objects found is printed beside it.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable

import torch
from detectron2.data import DatasetCatalog
from detectron2.data.detection_utils import annotations_to_instances
from detectron2.modeling import build_model
from detectron2.structures import Instances, pairwise_iou

from detr_family.checkpoint import DETRCheckpointer
from detr_family.config import load_config
from detr_family.dataset_mapper import DETRDatasetMapper
from detr_family.datasets.coco import register_datasets


def near_duplicates(found: Instances, score: float, iou: float) -> int:
    """Detections that one of the same class with a higher score overlaps.

    Args:
        found: of one picture, with `pred_boxes`, `scores`, `pred_classes`.
        score: what scores less does not count, on either side.
        iou: the least overlap.
    """
    found = found[found.scores >= score]
    found = found[found.scores.argsort(descending=True)]
    near = pairwise_iou(found.pred_boxes, found.pred_boxes) >= iou
    near &= found.pred_classes[:, None] == found.pred_classes
    return int(near.tril(-1).any(1).sum())


def objects_found(found: Instances, truth: Instances, score: float, iou: float) -> int:
    """True boxes that a detection of their class overlaps."""
    found = found[found.scores >= score]
    hit = pairwise_iou(truth.gt_boxes, found.pred_boxes) >= iou
    return int((hit & (truth.gt_classes[:, None] == found.pred_classes)).any(1).sum())


def measure(pairs: Iterable[tuple[Instances, Instances]], score: float, iou: float) -> tuple[float, float]:
    """Near-duplicates per object, and the share of objects found, of (detections, ground truth) per picture."""
    duplicates = hits = objects = 0
    for found, truth in pairs:
        objects += len(truth)
        duplicates += near_duplicates(found, score, iou)
        hits += objects_found(found, truth, score, iou)
    return duplicates / max(objects, 1), hits / max(objects, 1)


def main() -> None:
    """Parse the command line and print one line per threshold."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--config-file", required=True)
    parser.add_argument("--score", type=float, nargs="+", default=[0.1, 0.3], help="least score of a detection")
    parser.add_argument("--iou", type=float, default=0.7, help="least overlap of a near-duplicate")
    parser.add_argument("opts", nargs="*", help="KEY VALUE pairs: MODEL.WEIGHTS, DATASETS.TEST ...")
    args = parser.parse_args()
    cfg = load_config(args.config_file, args.opts)
    register_datasets(cfg)
    model = build_model(cfg)
    DETRCheckpointer(model, whole=True).load(cfg.MODEL.WEIGHTS)
    model.eval()
    mapper = DETRDatasetMapper(cfg, is_train=False)
    pairs = []
    with torch.no_grad():
        for record in DatasetCatalog.get(cfg.DATASETS.TEST[0]):
            truth = annotations_to_instances(record.get("annotations", []), (record["height"], record["width"]))
            pairs.append((model([mapper(record)])[0]["instances"].to("cpu"), truth))
    for score in args.score:
        duplicates, found = measure(pairs, score, args.iou)
        print(
            f"score >= {score:g}: {duplicates:.3f} near-duplicates per object (IoU >= {args.iou:g}), "
            f"{found:.1%} of {sum(len(truth) for _, truth in pairs)} objects found"
        )


if __name__ == "__main__":
    main()
