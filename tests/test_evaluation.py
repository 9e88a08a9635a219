"""Evaluation of a user's own data set: their ids, their names, and files that pycocotools stumbles over."""

import json
import math
import os

import pytest
import torch
from detectron2.config import get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import Boxes, BoxMode, Instances
from own_data import ANNOTATIONS, write

from detr_family.datasets import register_coco_format
from detr_family.evaluation import CocoFormatEvaluator, build_evaluator


def predict_truth(name, evaluator, keep=lambda record, annotation: True):
    """Feeds the evaluator the data set's own boxes as predictions and evaluates."""
    evaluator.reset()
    for record in DatasetCatalog.get(name):
        kept = [a for a in record.get("annotations", []) if keep(record, a)]
        boxes = [BoxMode.convert(a["bbox"], BoxMode.XYWH_ABS, BoxMode.XYXY_ABS) for a in kept]
        instances = Instances((record["height"], record["width"]))
        instances.pred_boxes = Boxes(torch.tensor(boxes).reshape(-1, 4))
        instances.scores = torch.full((len(kept),), 0.9)
        instances.pred_classes = torch.tensor([a["category_id"] for a in kept], dtype=torch.int64)
        evaluator.process([record], [{"instances": instances}])
    return evaluator.evaluate()


def evaluator_for(name, coco_folder):
    cfg = get_cfg()
    cfg.OUTPUT_DIR = str(coco_folder / "out")
    return build_evaluator(cfg, name)


def test_perfect_predictions_have_full_ap_and_the_files_own_ids(coco_folder):
    register_coco_format("perfect", write(coco_folder), str(coco_folder))
    results = predict_truth("perfect", evaluator_for("perfect", coco_folder))["bbox"]
    assert results["AP"] == pytest.approx(100) and results["AP50"] == pytest.approx(100)
    assert {key: results[f"AP-{key}"] for key in ("red", "white", "platelet")} == pytest.approx(
        {"red": 100, "white": 100, "platelet": 100}
    )
    written = json.loads((coco_folder / "out" / "inference" / "coco_instances_results.json").read_text())
    assert sorted((entry["image_id"], entry["category_id"]) for entry in written) == [(4, 3), (4, 7), (21, 100)]
    assert not any("as read" in name for name in MetadataCatalog.list())


def test_ap_belongs_to_the_class_it_is_named_after(coco_folder):
    register_coco_format("only_red", write(coco_folder), str(coco_folder))
    red = MetadataCatalog.get("only_red").thing_classes.index("red")
    evaluator = evaluator_for("only_red", coco_folder)
    results = predict_truth("only_red", evaluator, lambda record, annotation: annotation["category_id"] == red)
    assert results["bbox"]["AP-red"] == pytest.approx(100)
    assert results["bbox"]["AP-white"] == results["bbox"]["AP-platelet"] == 0


def test_evaluation_of_an_incomplete_file(coco_folder):
    """No ids, no area, no iscrowd, a NaN box, a box without width, an id used twice."""
    annotations = [{key: annotation[key] for key in ("image_id", "category_id", "bbox")} for annotation in ANNOTATIONS]
    annotations += [
        {"id": 5, "image_id": 9, "category_id": 3, "bbox": [1, math.nan, 2, 2]},
        {"id": 5, "image_id": 9, "category_id": 3, "bbox": [1, 1, 0, 2]},
        {"id": 5, "image_id": 9, "category_id": 3, "bbox": [1, 1, 6, 7]},
    ]
    register_coco_format("sloppy", write(coco_folder, {"annotations": annotations}), str(coco_folder))
    assert predict_truth("sloppy", evaluator_for("sloppy", coco_folder))["bbox"]["AP"] == pytest.approx(100)


def test_evaluation_equals_detectron2s_on_a_complete_file(coco_folder):
    from detectron2.evaluation import COCOEvaluator

    annotations = [{**annotation, "id": annotation["id"] + 1} for annotation in ANNOTATIONS]
    annotations.append({**annotations[0], "id": 4, "bbox": [30, 20, 15, 15], "area": 100, "iscrowd": 1})
    register_coco_format("whole", write(coco_folder, {"annotations": annotations}), str(coco_folder))

    def keep(record, annotation):
        return record["image_id"] == 4 or annotation["iscrowd"] == 1

    theirs = predict_truth("whole", COCOEvaluator("whole", tasks=("bbox",), output_dir=str(coco_folder)), keep)
    ours = predict_truth("whole", CocoFormatEvaluator("whole", None), keep)
    assert 0 < ours["bbox"]["AP"] < 100
    assert ours["bbox"] == pytest.approx(theirs["bbox"], nan_ok=True)


def test_evaluation_without_annotations_writes_predictions_only(coco_folder):
    register_coco_format("blind", write(coco_folder, without=["annotations"]), str(coco_folder))
    evaluator = evaluator_for("blind", coco_folder)
    evaluator.reset()
    record = DatasetCatalog.get("blind")[0]
    instances = Instances((record["height"], record["width"]))
    instances.pred_boxes = Boxes(torch.tensor([[1.0, 2.0, 3.0, 4.0]]))
    instances.scores, instances.pred_classes = torch.tensor([0.5]), torch.tensor([2])
    evaluator.process([record], [{"instances": instances}])
    assert evaluator.evaluate() == {}
    written = json.loads((coco_folder / "out" / "inference" / "coco_instances_results.json").read_text())
    assert [(entry["image_id"], entry["category_id"]) for entry in written] == [(4, 100)]


def test_evaluation_without_one_box(coco_folder):
    register_coco_format("none", write(coco_folder, {"annotations": []}), str(coco_folder))
    assert math.isnan(predict_truth("none", evaluator_for("none", coco_folder))["bbox"]["AP"])


def test_unknown_protocol_is_refused():
    with pytest.raises(ValueError, match=r"cityscapes_fine_sem_seg_val.*cityscapes_sem_seg"):
        build_evaluator(get_cfg(), "cityscapes_fine_sem_seg_val", os.curdir)
