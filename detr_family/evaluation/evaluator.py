"""Evaluation of boxes by Detectron2's evaluators, also where a user's annotation file is incomplete.

pycocotools needs an id, an area and iscrowd in every annotation, takes an annotation with id 0 for an
unmatched one, and gives wrong figures or none for repeated ids and NaN boxes. Datasets registered through
`DATASETS.COCO_FORMAT` are therefore evaluated on what their file was read as (see datasets/coco_json.py),
with annotations numbered anew. Image and category ids stay the file's own in all results.
"""

import contextlib
import io
import json
import logging
import math
import os
import tempfile
from collections import Counter
from typing import Any

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.evaluation import COCOEvaluator, DatasetEvaluator, LVISEvaluator, PascalVOCDetectionEvaluator
from pycocotools.cocoeval import COCOeval

from detr_family.data.datasets.coco import CocoFormatMetadata
from detr_family.evaluation.coco_protocol import OFFICIAL, find_implementation, used_by_detectron2

_logger = logging.getLogger(__name__)


def build_evaluator(cfg: CfgNode, name: str, output_dir: str | None = None) -> DatasetEvaluator:
    """The evaluator for a dataset: COCO's box AP unless the dataset brings its own protocol (LVIS, VOC).

    Args:
        cfg: the whole config.
        name: a registered dataset's name.
        output_dir: where coco_instances_results.json goes; by default `inference_folder`.

    Raises:
        ValueError: no evaluator for this kind of dataset, its annotation file is at fault, TEST.EVAL_DETECTIONS is
            below 10, or TEST.COCO_EVALUATION is not installed.
    """
    output_dir = output_dir or inference_folder(cfg, name)
    metadata = MetadataCatalog.get(name)
    limit = cfg.TEST.get("EVAL_DETECTIONS", 100)  # a configuration of Detectron2's alone will do
    if limit < 10:
        raise ValueError(f"TEST.EVAL_DETECTIONS is {limit}; it must be at least 10 (COCO's AR1 and AR10 are given too)")
    chosen = cfg.TEST.get("COCO_EVALUATION", "")
    if isinstance(metadata, CocoFormatMetadata):
        return CocoFormatEvaluator(name, output_dir, max_detections=limit, implementation=chosen)
    kind = metadata.get("evaluator_type")
    if kind in (None, "coco", "coco_panoptic_seg"):
        return BoxEvaluator(name, output_dir=output_dir, max_detections=limit, implementation=chosen)
    if kind == "lvis":
        return LVISEvaluator(name, tasks=("bbox",), output_dir=output_dir)
    if kind == "pascal_voc":
        return PascalVOCDetectionEvaluator(name)
    raise ValueError(f"DATASETS.TEST has {name!r} of evaluator type {kind!r}, for which there is no box evaluation.")


def inference_folder(cfg: CfgNode, name: str) -> str:
    """Where the results on a dataset go: OUTPUT_DIR/inference; of several sets, each into a folder below it."""
    folder: str = os.path.join(cfg.OUTPUT_DIR, "inference")
    return os.path.join(folder, name) if len(cfg.DATASETS.TEST) > 1 else folder


class BoxEvaluator(COCOEvaluator):
    """Detectron2's COCOEvaluator for boxes, with the recall that COCO's tools print: AR1, AR10, AR100 and by size.

    Where an image has more objects than detections may count, the results also have the AP without a limit, and the log
    a warning.

    Args:
        dataset_name: a registered name.
        output_dir: where coco_instances_results.json goes; None writes nothing.
        distributed: whether to collect predictions from all processes.
        max_detections: of an image that count, at least 10.
        implementation: see `coco_protocol`; "" takes the fastest. One of other than 100 detections is pycocotools' in
            Detectron2.
    """

    def __init__(
        self,
        dataset_name: str,
        output_dir: str | None,
        distributed: bool = True,
        max_detections: int = 100,
        implementation: str = "",
    ) -> None:
        name, self._implementation = find_implementation(implementation)
        super().__init__(
            dataset_name,
            tasks=("bbox",),
            distributed=distributed,
            output_dir=output_dir,
            max_dets_per_image=max_detections,
            use_fast_impl=False,
        )
        self._limit = max_detections
        self._use_fast_impl = name != OFFICIAL

    def _eval_predictions(self, predictions: Any, img_ids: Any = None) -> None:
        # The others take ids of images for numbers of double precision.
        if any(isinstance(identifier, str) or abs(identifier) > 2**53 for identifier in self._coco_api.imgs):
            self._implementation, self._use_fast_impl = COCOeval, False
        with used_by_detectron2(self._implementation):
            super()._eval_predictions(predictions, img_ids)

    def _derive_coco_results(self, coco_eval: Any, iou_type: str, class_names: Any = None) -> dict[str, float]:
        results: dict[str, float] = super()._derive_coco_results(coco_eval, iou_type, class_names)
        values = [math.nan] * 6 if coco_eval is None else [float(100 * x) for x in coco_eval.stats[6:12]]
        recalls = zip(("AR1", "AR10", f"AR{self._limit}", "ARs", "ARm", "ARl"), values, strict=True)
        results |= {key: math.nan if value < 0 else value for key, value in recalls}
        return results if coco_eval is None else {**results, **self._without_limit(coco_eval)}

    def _without_limit(self, coco_eval: Any) -> dict[str, float]:
        """AP with all detections, where an image has more objects than detections may count; else nothing."""
        objects: Counter[object] = Counter(a["image_id"] for a in coco_eval.cocoGt.anns.values() if not a["iscrowd"])
        crowded = [image for image, count in objects.items() if count > self._limit]
        if not crowded:
            return {}
        detections = Counter(a["image_id"] for a in coco_eval.cocoDt.anns.values())
        most = max(detections.values(), default=0)
        _logger.warning(
            "%d images have more than %d objects, at most %d, but only the best %d detections of an image count "
            "(TEST.EVAL_DETECTIONS): AP@%d counts all that there are",
            len(crowded), self._limit, max(objects.values()), self._limit, most,
        )  # fmt: skip
        if most <= self._limit:
            return {}
        wider = self._implementation(coco_eval.cocoGt, coco_eval.cocoDt, "bbox")
        wider.params.imgIds = coco_eval.params.imgIds
        wider.params.maxDets = [most]
        wider.params.areaRng, wider.params.areaRngLbl = wider.params.areaRng[:1], wider.params.areaRngLbl[:1]
        with contextlib.redirect_stdout(io.StringIO()):
            wider.evaluate()
            wider.accumulate()
        precision = wider.eval["precision"]
        known = precision[precision > -1]
        return {f"AP@{most}": 100 * float(known.mean()) if known.size else math.nan}


class CocoFormatEvaluator(BoxEvaluator):
    """BoxEvaluator on a dataset registered by register_coco_format.

    Without annotations in its file only the predictions are written.
    """

    def __init__(
        self,
        dataset_name: str,
        output_dir: str | None,
        distributed: bool = True,
        max_detections: int = 100,
        implementation: str = "",
    ) -> None:
        """See class.

        Args:
            dataset_name: the registered name.
            output_dir: where coco_instances_results.json goes; None writes nothing.
            distributed: whether to collect predictions from all ranks.
            max_detections: see BoxEvaluator.
            implementation: see BoxEvaluator.
        """
        known = MetadataCatalog.get(dataset_name)
        # The base class takes the annotation file from the catalog: it is shown a passing entry.
        entry = f"{dataset_name} as read"
        with tempfile.TemporaryDirectory() as folder:
            json_file = os.path.join(folder, "annotations.json")
            with open(json_file, "w", encoding="utf-8") as file:
                json.dump(completed_annotations(dataset_name), file)
            MetadataCatalog[entry] = type(known)(**{**known.as_dict(), "json_file": json_file})
            try:
                super().__init__(entry, output_dir, distributed, max_detections, implementation)
            finally:
                MetadataCatalog.pop(entry)
        self._metadata = known


def completed_annotations(dataset_name: str) -> dict[str, Any]:
    """A registered dataset in COCO's format, complete: annotation ids from 1, area and iscrowd in each.

    Args:
        dataset_name: a name registered by register_coco_format.

    Returns:
        What a COCO annotation file holds; without "annotations" where the dataset's file has none.
    """
    records = DatasetCatalog.get(dataset_name)
    metadata = MetadataCatalog.get(dataset_name)
    ids = list(metadata.thing_dataset_id_to_contiguous_id)
    result: dict[str, Any] = {
        "info": {},
        "images": [
            {"id": record["image_id"], **{key: record[key] for key in ("file_name", "height", "width")}}
            for record in records
        ],
        "categories": [
            {"id": identifier, "name": name} for identifier, name in zip(ids, metadata.thing_classes, strict=True)
        ],
    }
    if all("annotations" in record for record in records):
        flat = [(record["image_id"], annotation) for record in records for annotation in record["annotations"]]
        result["annotations"] = [
            {
                "id": number,
                "image_id": image_id,
                "category_id": ids[annotation["category_id"]],
                **{key: annotation[key] for key in ("bbox", "area", "iscrowd")},
            }
            for number, (image_id, annotation) in enumerate(flat, start=1)
        ]
    return result
