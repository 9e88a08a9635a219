"""Evaluation of a user's own dataset: their ids, their names, and files that pycocotools stumbles over."""

import contextlib
import io
import json
import math
import os
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from detectron2.config import get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.evaluation import inference_on_dataset
from detectron2.modeling import build_model
from detectron2.structures import Boxes, BoxMode, Instances
from own_data import ANNOTATIONS, write
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from detr_family import add_detr_family_config
from detr_family.data import register_coco_format
from detr_family.data.dataset_mapper import build_test_loader
from detr_family.evaluation import coco_protocol
from detr_family.evaluation.evaluator import CocoFormatEvaluator, build_evaluator, inference_folder

REFERENCE = Path(__file__).resolve().parents[3] / "shared" / "data" / "coco_eval_ref"


def predict_truth(name, evaluator, keep=lambda record, annotation: True):
    """Feeds the evaluator the dataset's own boxes as predictions and evaluates."""
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
    assert {key: ours["bbox"][key] for key in theirs["bbox"]} == pytest.approx(theirs["bbox"], nan_ok=True)


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


@pytest.mark.parametrize("implementation", ["pycocotools", "faster-coco-eval"])
@pytest.mark.parametrize("limit", [10, 100])
def test_more_objects_than_count_are_told_and_counted_beside(coco_folder, limit, implementation, caplog):
    if implementation not in coco_protocol.implementations():
        pytest.skip("needs faster-coco-eval (make setup EXTRAS=loggers)")
    boxes = [[x, y, 4, 4] for x in range(0, 45, 5) for y in range(0, 35, 5)]  # 63
    annotations = [{"id": i, "image_id": 21, "category_id": 7, "bbox": box, "area": 16} for i, box in enumerate(boxes)]
    register_coco_format("crowded", write(coco_folder, {"annotations": annotations}), str(coco_folder))
    cfg = get_cfg()
    add_detr_family_config(cfg)
    cfg.OUTPUT_DIR, cfg.TEST.EVAL_DETECTIONS = str(coco_folder / "out"), limit
    cfg.TEST.COCO_EVALUATION = implementation
    results = predict_truth("crowded", build_evaluator(cfg, "crowded"))["bbox"]
    if limit == 100:
        assert results["AP"] == pytest.approx(100) and "AP@63" not in results and not caplog.records
    else:
        assert results["AP"] == pytest.approx(100 * 16 / 101) and results["AP@63"] == pytest.approx(100)
        assert results["AR10"] == pytest.approx(100 * 10 / 63)
        assert "1 images have more than 10 objects, at most 63" in caplog.text
    cfg.TEST.EVAL_DETECTIONS = 9
    with pytest.raises(ValueError, match="EVAL_DETECTIONS is 9"):
        build_evaluator(cfg, "crowded")


def test_unknown_protocol_is_refused():
    with pytest.raises(ValueError, match=r"cityscapes_fine_sem_seg_val.*cityscapes_sem_seg"):
        build_evaluator(get_cfg(), "cityscapes_fine_sem_seg_val", os.curdir)


def noise_set(folder, name, count=7, **without):
    """A registered set of images of noise in several sizes, with ids that have holes."""
    rng = np.random.default_rng(0)
    images, annotations = [], []
    for i in range(count):
        height, width = ((50, 97), (66, 66), (97, 50))[i % 3]
        Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(folder / f"n{i}.png")
        images.append({"id": 10 * i + 3, "file_name": f"n{i}.png", "width": width, "height": height})
        for category in (3, 7, 100)[: i % 4]:
            box = [*rng.uniform(2, 12, 2), *rng.uniform(15, 30, 2)]
            annotations.append({"id": len(annotations), "image_id": 10 * i + 3, "category_id": category, "bbox": box})
    register_coco_format(name, write(folder, {"images": images, "annotations": annotations}, **without), str(folder))


def evaluate(detector, name, batch, folder):
    """Inference through Detectron2's loop with a real backbone; the results and the detections written."""
    cfg = tiny.cfg_of(detector)
    cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST, cfg.DATALOADER.NUM_WORKERS = 66, 123, 0
    cfg.TEST.IMS_PER_BATCH, cfg.OUTPUT_DIR = batch, str(folder / f"out{batch}")
    cfg.MODEL.BACKBONE.NAME, cfg.MODEL.BACKBONE.FREEZE_AT = "build_torchvision_resnet_backbone", 0
    cfg.MODEL.RESNETS.DEPTH, cfg.MODEL.RESNETS.RES2_OUT_CHANNELS, cfg.MODEL.RESNETS.NORM = 18, 64, "BN"
    torch.manual_seed(11)
    model = build_model(cfg).eval()
    model.matcher = model.criterion = None  # an evaluation needs neither
    loader = build_test_loader(cfg, name)
    assert [len(inputs) for inputs in loader] == ([1] * 7 if batch == 1 else [3, 2, 2])
    results = inference_on_dataset(model, loader, build_evaluator(cfg, name))
    written = json.loads((folder / f"out{batch}" / "inference" / "coco_instances_results.json").read_text())
    return results, written


def place(entry):
    return entry["image_id"], -entry["score"]


@pytest.mark.parametrize("detector", tiny.DETECTORS)
def test_evaluation_in_batches_of_three_equals_one_by_one_without_a_criterion(detector, coco_folder):
    noise_set(coco_folder, "noise")
    single, first = evaluate(detector, "noise", 1, coco_folder)
    batched, second = evaluate(detector, "noise", 3, coco_folder)
    assert len(first) == len(second) > 20
    for a, b in zip(sorted(first, key=place), sorted(second, key=place), strict=True):
        assert (a["image_id"], a["category_id"]) == (b["image_id"], b["category_id"])
        assert a["score"] == pytest.approx(b["score"], abs=1e-5) and a["bbox"] == pytest.approx(b["bbox"], abs=1e-2)
    assert batched["bbox"] == pytest.approx(single["bbox"], nan_ok=True, abs=1e-3)


def test_predictions_without_annotations_are_what_pycocotools_takes(coco_folder):
    noise_set(coco_folder, "blind noise", without=["annotations"])
    results, written = evaluate("DETR", "blind noise", 3, coco_folder)
    assert results == {}
    assert {entry["category_id"] for entry in written} <= {3, 7, 100}
    assert {entry["image_id"] for entry in written} == {10 * i + 3 for i in range(7)}
    noise_set(coco_folder, "seen noise")  # the same images, annotated
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(MetadataCatalog.get("seen noise").json_file)
        for annotation in truth.dataset["annotations"]:
            annotation.update(area=annotation["bbox"][2] * annotation["bbox"][3], iscrowd=0)
        path = coco_folder / "out3" / "inference" / "coco_instances_results.json"
        judged = COCOeval(truth, truth.loadRes(str(path)), "bbox")
        judged.evaluate()
        judged.accumulate()
        judged.summarize()
    assert judged.stats[0] >= 0
    results, _ = evaluate("DETR", "seen noise", 3, coco_folder)
    assert results["bbox"]["AR100"] == pytest.approx(100 * judged.stats[8], abs=1e-3)


def test_several_test_sets_do_not_overwrite_each_other(cfg):
    cfg.DATASETS.TEST = ("one",)
    assert inference_folder(cfg, "one") == os.path.join(cfg.OUTPUT_DIR, "inference")
    cfg.DATASETS.TEST = ("one", "two")
    assert inference_folder(cfg, "two") == os.path.join(cfg.OUTPUT_DIR, "inference", "two")


def test_a_batch_of_no_images_is_refused(cfg):
    cfg.TEST.IMS_PER_BATCH = 0
    with pytest.raises(ValueError, match=r"TEST\.IMS_PER_BATCH is 0"):
        build_test_loader(cfg, "any")


@pytest.mark.golden
@pytest.mark.skipif(not REFERENCE.is_dir(), reason="the results with COCO's published figures are not there")
def test_published_figures_of_cocos_own_example(coco_folder):
    register_coco_format("reference", str(REFERENCE / "instances_val2014_100.json"), str(coco_folder))
    numbers = MetadataCatalog.get("reference").thing_dataset_id_to_contiguous_id
    found = defaultdict(list)
    for entry in json.loads((REFERENCE / "instances_val2014_fakebbox100_results.json").read_text()):
        found[entry["image_id"]].append({**entry, "category_id": numbers[entry["category_id"]]})
    evaluator = evaluator_for("reference", coco_folder)
    evaluator.reset()
    # What `process` makes of Instances; their float32 corners would move boxes that overlap by exactly a threshold.
    evaluator._predictions = [{"image_id": image_id, "instances": entries} for image_id, entries in found.items()]
    results = evaluator.evaluate()["bbox"]
    keys = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl")
    published = (50.5, 69.7, 57.3, 58.6, 51.9, 50.1, 38.7, 59.4, 59.5, 64.0, 56.6, 56.4)
    assert {key: results[key] for key in keys} == pytest.approx(dict(zip(keys, published, strict=True)), abs=0.051)


def test_ids_beyond_double_precision_and_areas_of_another_unit(tmp_path):
    """Hashes as ids are told apart, and an area that no box can hold is the box's: else all objects were ignored."""
    content = {"images": [], "annotations": [], "categories": [{"id": 1, "name": "x"}]}
    for i, count in enumerate((1, 3)):
        image = {"id": 2**53 + i, "file_name": f"{i}.png", "width": 90, "height": 90}
        content["images"].append(image)
        for j in range(count):
            entry = {"image_id": image["id"], "category_id": 1, "bbox": [20 * j, 9, 10, 10 + j], "iscrowd": 0}
            content["annotations"].append({**entry, "id": len(content["annotations"]) + 1, "area": 1e11})
    (tmp_path / "a.json").write_text(json.dumps(content))
    name = f"large {tmp_path}"
    register_coco_format(name, str(tmp_path / "a.json"), str(tmp_path))
    evaluator = CocoFormatEvaluator(name, None)
    evaluator.reset()
    for record in DatasetCatalog.get(name)[:1]:  # the second image's three objects are not found
        found = Instances((90, 90))
        found.pred_boxes = Boxes(torch.tensor([[0.0, 9, 10, 19]]))
        found.scores, found.pred_classes = torch.ones(1), torch.zeros(1, dtype=torch.int64)
        evaluator.process([record], [{"instances": found}])
    results = evaluator.evaluate()["bbox"]
    assert results["AR100"] == results["ARs"] == 25
