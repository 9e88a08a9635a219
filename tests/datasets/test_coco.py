"""Users' own COCO-format data sets: reading, faults, registration, the training set and evaluation."""

import copy
import json
import logging
import math
import os

import pytest
import torch
from detectron2.config import get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import Boxes, BoxMode, Instances
from PIL import Image

from detr_family.datasets import check_pictures, coco, register_coco_format, register_datasets, training_dicts
from detr_family.datasets.coco_json import read_coco_json
from detr_family.evaluation import CocoFormatEvaluator, build_evaluator

# Ids with holes, not in order; two pictures with objects, one without.
CATEGORIES = [{"id": 7, "name": "red"}, {"id": 3, "name": "white"}, {"id": 100, "name": "platelet"}]
IMAGES = [
    {"id": 21, "file_name": "b.png", "width": 50, "height": 40},
    {"id": 4, "file_name": "a.png", "width": 60, "height": 30},
    {"id": 9, "file_name": "c.png", "width": 20, "height": 20},
]
ANNOTATIONS = [
    {"id": 0, "image_id": 21, "category_id": 100, "bbox": [5, 6, 20, 10], "area": 150, "iscrowd": 0},
    {"id": 1, "image_id": 4, "category_id": 3, "bbox": [1.5, 2, 8, 9], "area": 72, "iscrowd": 0},
    {"id": 2, "image_id": 4, "category_id": 7, "bbox": [30, 10, 12, 13], "area": 156, "iscrowd": 0},
]


@pytest.fixture
def folder(tmp_path):
    for image in IMAGES:
        Image.new("RGB", (image["width"], image["height"])).save(tmp_path / image["file_name"])
    known = set(DatasetCatalog.list())
    yield tmp_path
    for name in set(DatasetCatalog.list()) - known:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)


def write(folder, changes=None, name="train.json", without=()):
    data = {"images": IMAGES, "annotations": ANNOTATIONS, "categories": CATEGORIES, **(changes or {})}
    data = {key: value for key, value in data.items() if key not in without}
    (folder / name).write_text(json.dumps(data))
    return str(folder / name)


def with_boxes(*boxes):
    return {
        "annotations": [
            {"id": 50 + i, "image_id": 4, "category_id": 7, "bbox": box} for i, box in enumerate(boxes)
        ]
    }


def config(train=(), test=(), entries=()):
    cfg = get_cfg()
    cfg.DATASETS.COCO_FORMAT = [list(entry) for entry in entries]
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = tuple(train), tuple(test)
    cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS = False
    register_datasets(cfg)
    return cfg


def changed(entries, index, **changes):
    entries = copy.deepcopy(entries)
    entries[index].update(changes)
    return entries


def test_reads_pictures_in_order_with_class_numbers_by_ascending_id(folder):
    records = read_coco_json(write(folder), str(folder))
    assert [record["image_id"] for record in records] == [4, 9, 21]
    assert records[0]["file_name"] == str(folder / "a.png")
    assert (records[0]["width"], records[0]["height"]) == (60, 30)
    assert [a["category_id"] for a in records[0]["annotations"]] == [0, 1]
    assert records[1]["annotations"] == []
    assert records[2]["annotations"] == [
        {"bbox": [5, 6, 20, 10], "bbox_mode": BoxMode.XYWH_ABS, "category_id": 2, "iscrowd": 0, "area": 150}
    ]


def test_agrees_with_detectron2s_own_loader(folder):
    from detectron2.data.datasets import load_coco_json

    json_file = write(folder)
    theirs = load_coco_json(json_file, str(folder), "coco_as_detectron2_reads_it")
    ours = read_coco_json(json_file, str(folder))
    for record in ours:
        for annotation in record["annotations"]:
            del annotation["area"]
    assert ours == theirs
    MetadataCatalog.remove("coco_as_detectron2_reads_it")


FILE_FAULTS = {
    "json": ("{", "not JSON", "Export it again"),
    "list": ("[]", "holds a list", "must be an object"),
    "latin-1": ('{"images": "\xe9"}'.encode("latin-1"), "not JSON", "Export it again"),
}


@pytest.mark.parametrize("fault", FILE_FAULTS)
def test_file_that_is_no_coco_file(folder, fault):
    content, problem, remedy = FILE_FAULTS[fault]
    path = folder / "broken.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=f"(?s)broken.json.*DATASETS.COCO_FORMAT.*{problem}.*{remedy}"):
        read_coco_json(str(path), str(folder))


@pytest.mark.parametrize("path", ["nowhere.json", "."])
def test_missing_file(folder, path):
    with pytest.raises(ValueError, match="cannot be read .*Correct its path in DATASETS.COCO_FORMAT"):
        read_coco_json(str(folder / path), str(folder))


def test_byte_order_mark_is_fine(folder):
    path = write(folder)
    content = open(path, encoding="utf-8").read()
    open(path, "w", encoding="utf-8-sig").write(content)
    assert len(read_coco_json(path, str(folder))) == 3


STRUCTURAL_FAULTS = {
    "no images key": ({"images": None}, '"images" is missing'),
    "no categories key": ({"categories": None}, '"categories" is missing'),
    "images no list": ({"images": {}}, '"images" is {}'),
    "image no object": ({"images": ["a.png"]}, r"images\[0\] is 'a.png'"),
    "no pictures": ({"images": [], "annotations": []}, '"images" is empty'),
    "no categories": ({"categories": [], "annotations": []}, '"categories" is empty'),
    "image id twice": ({"images": changed(IMAGES, 2, id=21)}, r"images\[2\] repeats the id 21"),
    "category id twice": ({"categories": changed(CATEGORIES, 1, id=7)}, r"categories\[1\] repeats the id 7"),
    "image id a string": ({"images": changed(IMAGES, 0, id="21")}, r"images\[0\] has the id '21'.*integers"),
    "category without id": ({"categories": [{"name": "red"}]}, r"categories\[0\] has the id None"),
    "category without name": ({"categories": changed(CATEGORIES, 1, name=None)}, r"\(id 3\) has no name"),
    "no file name": ({"images": changed(IMAGES, 0, file_name=None)}, r"\(id 21\) has the file_name None"),
    "annotations no list": ({"annotations": {}}, '"annotations" is {}'),
    "annotation no object": ({"annotations": [3]}, r"annotations\[0\] is 3"),
    "category not declared": (
        {"annotations": changed(ANNOTATIONS, 1, category_id=1)},
        r"annotation id 1 has category_id 1.*\[3, 7, 100\]",
    ),
    "image not declared": (
        {"annotations": changed(ANNOTATIONS, 2, image_id=5)},
        "annotation id 2 has image_id 5",
    ),
    "image id unhashable": (
        {"annotations": changed(ANNOTATIONS, 2, image_id=[5])},
        r"annotation id 2 has image_id \[5\]",
    ),
}


@pytest.mark.parametrize("fault", STRUCTURAL_FAULTS)
def test_structural_fault_is_one_error_naming_file_and_entry(folder, fault):
    changes, message = STRUCTURAL_FAULTS[fault]
    with pytest.raises(ValueError, match=f"(?s)train.json.*DATASETS.COCO_FORMAT.*{message}"):
        read_coco_json(write(folder, changes), str(folder))


BOX_FAULTS = {
    "nan": ([1, math.nan, 5, 5], "1 not finite"),
    "infinite": ([1, 1, math.inf, 5], "1 not finite"),
    "overflow": ([1, 1, 10**400, 5], "1 not finite"),
    "no width": ([1, 1, 0, 5], "1 zero or negative width or height"),
    "negative height": ([1, 1, 5, -5], "1 zero or negative width or height"),
    "right of the picture": ([60, 1, 5, 5], "1 outside the picture"),
    "above the picture": ([5, -9, 5, 9], "1 outside the picture"),
    "three numbers": ([1, 1, 5], "1 missing or not four numbers"),
    "strings": (["1", "1", "5", "5"], "1 missing or not four numbers"),
    "missing": (None, "1 missing or not four numbers"),
}


@pytest.mark.parametrize("fault", BOX_FAULTS)
def test_unusable_box_is_left_out_and_counted(folder, caplog, fault):
    box, message = BOX_FAULTS[fault]
    with caplog.at_level(logging.WARNING):
        records = read_coco_json(write(folder, with_boxes(box, [1, 2, 3, 4])), str(folder))
    assert [annotation["bbox"] for annotation in records[0]["annotations"]] == [[1, 2, 3, 4]]
    (warning,) = caplog.messages
    assert "train.json" in warning and "of 2 annotations" in warning and f"{message}: id 50" in warning


def test_box_partly_outside_is_clipped_but_rounding_is_left(folder, caplog):
    boxes = ([-10, -5, 30, 20], [50, 20, 40, 40], [40, 20, 20.4, 10])
    with caplog.at_level(logging.WARNING):
        records = read_coco_json(write(folder, with_boxes(*boxes)), str(folder))
    annotations = records[0]["annotations"]
    assert [annotation["bbox"] for annotation in annotations] == [
        [0, 0, 20, 15],
        [50, 20, 10, 10],
        [40, 20, 20.4, 10],
    ]
    assert [annotation["area"] for annotation in annotations] == pytest.approx([300, 100, 204])
    assert "2 partly outside the picture (kept, clipped to it): id 50, id 51" in caplog.messages[0]


def test_good_file_gives_no_warning(folder, caplog):
    with caplog.at_level(logging.WARNING):
        read_coco_json(write(folder), str(folder))
    assert not caplog.messages


def test_many_faults_name_the_first_few_and_say_it_once(folder, caplog):
    json_file = write(folder, with_boxes(*[[0, 0, 0, 0]] * 9))
    with caplog.at_level(logging.WARNING):
        read_coco_json(json_file, str(folder))
        read_coco_json(json_file, str(folder))
    (warning,) = caplog.messages
    assert "9 zero or negative" in warning and "id 54, ..." in warning and "id 55" not in warning


def test_size_is_read_from_the_picture_where_the_entry_has_none(folder):
    exif = Image.Exif()
    exif[0x0112] = 6  # shown turned by a quarter
    Image.new("RGB", (50, 40)).save(folder / "b.png", exif=exif)
    images = [{"id": 21, "file_name": "b.png"}, {"id": 4, "file_name": "a.png", "width": 0, "height": "30"}]
    records = read_coco_json(write(folder, {"images": images}), str(folder))
    assert [(record["width"], record["height"]) for record in records] == [(60, 30), (40, 50)]
    (folder / "b.png").write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"b\.png has no width and height, and the picture cannot be read"):
        read_coco_json(write(folder, {"images": images}), str(folder))


def test_ignore_counts_as_crowd_and_missing_iscrowd_as_none(folder):
    annotations = [{**ANNOTATIONS[1], "ignore": 1}, {**ANNOTATIONS[2], "iscrowd": 1}, {**ANNOTATIONS[1]}]
    del annotations[2]["iscrowd"]
    records = read_coco_json(write(folder, {"annotations": annotations}), str(folder))
    assert [annotation["iscrowd"] for annotation in records[0]["annotations"]] == [1, 1, 0]


def test_registration_from_config_and_command_line(folder):
    train, images = write(folder), str(folder)
    cfg = config()
    cfg.merge_from_list(["DATASETS.COCO_FORMAT", f"[('cells_a', '{train}', '{images}')]"])
    register_datasets(cfg)
    (folder / "c.yaml").write_text(f"DATASETS:\n  COCO_FORMAT:\n  - [cells_b, {train}, {images}]\n")
    cfg.merge_from_file(str(folder / "c.yaml"))
    register_datasets(cfg)
    for name in ("cells_a", "cells_b"):
        metadata = MetadataCatalog.get(name)
        assert metadata.thing_classes == ["white", "red", "platelet"]
        assert metadata.thing_dataset_id_to_contiguous_id == {3: 0, 7: 1, 100: 2}
        assert (metadata.json_file, metadata.image_root, metadata.evaluator_type) == (train, images, "coco")
        assert len(DatasetCatalog.get(name)) == 3
        register_coco_format(name, train, images)  # the same again is fine
        with pytest.raises(ValueError, match=f"'{name}' in DATASETS.COCO_FORMAT is already taken by .*train.json"):
            register_coco_format(name, train, images + "/other")


def test_built_in_name_is_not_overwritten():
    with pytest.raises(ValueError, match="coco_2017_val.*already taken"):
        register_coco_format("coco_2017_val", "mine.json", "images")
    assert MetadataCatalog.get("coco_2017_val").json_file.endswith("instances_val2017.json")


def test_home_is_expanded(folder, monkeypatch):
    write(folder)
    monkeypatch.setenv("HOME", str(folder))
    register_coco_format("cells_home", "~/train.json", "~")
    assert DatasetCatalog.get("cells_home")[0]["file_name"] == str(folder / "a.png")


@pytest.mark.parametrize("entry", ["cells", ["cells", "train.json"], ["cells", "train.json", None]])
def test_malformed_entry(entry):
    cfg = get_cfg()
    cfg.DATASETS.COCO_FORMAT = [entry]
    with pytest.raises(ValueError, match=r"DATASETS.COCO_FORMAT has the entry .*cells.*\[name, annotation file"):
        register_datasets(cfg)


def test_missing_file_is_told_when_class_names_are_asked_for(folder):
    register_coco_format("cells_gone", str(folder / "gone.json"), str(folder))
    with pytest.raises(ValueError, match=r"gone.json \(given in DATASETS.COCO_FORMAT\).*cannot be read"):
        MetadataCatalog.get("cells_gone").get("thing_classes")


def test_equal_names_are_kept_apart(folder):
    categories = [{"id": 0, "name": "fish"}, {"id": 1, "name": "fish"}, {"id": 2, "name": 5}]
    json_file = write(folder, {"categories": categories, "annotations": []})
    register_coco_format("fish", json_file, str(folder))
    assert MetadataCatalog.get("fish").thing_classes == ["fish (id 0)", "fish (id 1)", "5"]


def test_training_set_keeps_empty_pictures_unless_told_otherwise(folder):
    cfg = config(["t"], [], [("t", write(folder), folder.as_posix())])
    assert [record["image_id"] for record in training_dicts(cfg)] == [4, 9, 21]
    cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS = True
    assert [record["image_id"] for record in training_dicts(cfg)] == [4, 21]


def test_several_training_sets_are_joined(folder):
    entries = [(name, write(folder, name=f"{name}.json"), str(folder)) for name in ("one", "two")]
    assert len(training_dicts(config(["one", "two"], [], entries))) == 6


def test_training_needs_a_name():
    with pytest.raises(ValueError, match="DATASETS.TRAIN is empty"):
        training_dicts(config())


def test_training_on_an_unknown_name():
    with pytest.raises(ValueError, match="DATASETS.TRAIN names 'nobody'.*DATASETS.COCO_FORMAT"):
        training_dicts(config(["nobody"]))


def test_training_on_a_built_in_set_that_is_not_here(monkeypatch, folder):
    monkeypatch.chdir(folder)
    with pytest.raises(ValueError, match=r"'coco_2017_train' in DATASETS.TRAIN is not here.*DETECTRON2_DATASETS"):
        training_dicts(config(["coco_2017_train"]))


def test_training_without_annotations(folder):
    cfg = config(["t"], [], [("t", write(folder, without=["annotations"]), str(folder))])
    with pytest.raises(ValueError, match=r"'t' in DATASETS.TRAIN has no annotations .*train.json"):
        training_dicts(cfg)


@pytest.mark.parametrize("changes", [{"annotations": []}, with_boxes([0, 0, 0, 0], [1, 1, math.nan, 1])])
def test_training_without_one_usable_box(folder, changes):
    cfg = config(["t"], [], [("t", write(folder, changes), str(folder))])
    with pytest.raises(ValueError, match="has 3 pictures but not one usable box.*DATASETS.COCO_FORMAT"):
        training_dicts(cfg)


def test_training_with_missing_pictures(folder):
    cfg = config(["t"], [], [("t", write(folder), str(folder))])
    (folder / "a.png").unlink()
    (folder / "c.png").unlink()
    with pytest.raises(ValueError, match=r"2 of 3 pictures .*missing.*a\.png.*c\.png.*DATASETS.COCO_FORMAT") as error:
        training_dicts(cfg)
    assert f"picture folder {folder}:" in str(error.value)


def test_many_pictures_are_sampled(folder, caplog, monkeypatch):
    monkeypatch.setattr(coco, "_CHECKED_PICTURES", 10)
    records = [{"file_name": str(folder / f"none{i}.png")} for i in range(25)]
    with caplog.at_level(logging.INFO), pytest.raises(ValueError, match="10 of 10 pictures looked for"):
        check_pictures(records)
    assert "Looking for 10 of 25 pictures" in caplog.text


OTHER_NAMES = [{"id": 3, "name": "red"}, {"id": 7, "name": "white"}, {"id": 100, "name": "platelet"}]


@pytest.mark.parametrize("place", ["train", "test"])
def test_class_names_that_differ(folder, place):
    entries = [
        ("one", write(folder), str(folder)),
        ("two", write(folder, {"categories": OTHER_NAMES}, "two.json"), str(folder)),
    ]
    cfg = config(["one", "two"] if place == "train" else ["one"], ["two"], entries)
    message = r"'one' in DATASETS.TRAIN has \['white', 'red', 'platelet'\], 'two' in DATASETS.{} has \['red', 'white'"
    with pytest.raises(ValueError, match=message.format(place.upper())):
        training_dicts(cfg)


def test_test_set_with_fewer_classes_would_not_fit(folder):
    fewer = write(folder, {"categories": [{"id": 3, "name": "white"}], "annotations": []}, "two.json")
    cfg = config(["one"], ["two"], [("one", write(folder), str(folder)), ("two", fewer, str(folder))])
    with pytest.raises(ValueError, match=r"'two' in DATASETS.TEST has \['white'\]"):
        training_dicts(cfg)


def test_test_set_with_other_ids_or_more_classes_is_fine(folder):
    names = ["white", "red", "platelet", "parasite"]
    categories = [{"id": 10 + i, "name": name} for i, name in enumerate(names)]
    more = write(folder, {"categories": categories, "annotations": []}, "two.json")
    cfg = config(["one"], ["two"], [("one", write(folder), str(folder)), ("two", more, str(folder))])
    assert len(training_dicts(cfg)) == 3


def test_test_set_that_is_not_here_does_not_stop_training(folder, caplog):
    entries = [("one", write(folder), str(folder)), ("two", str(folder / "gone.json"), str(folder))]
    with caplog.at_level(logging.WARNING):
        assert len(training_dicts(config(["one"], ["two", "three"], entries))) == 3
    assert "Evaluation on 'two' will fail" in caplog.text and "gone.json" in caplog.text
    assert "Evaluation on 'three' will fail" in caplog.text


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


def evaluator_for(name, folder):
    cfg = get_cfg()
    cfg.OUTPUT_DIR = str(folder / "out")
    return build_evaluator(cfg, name)


def test_perfect_predictions_have_full_ap_and_the_files_own_ids(folder):
    register_coco_format("perfect", write(folder), str(folder))
    results = predict_truth("perfect", evaluator_for("perfect", folder))["bbox"]
    assert results["AP"] == pytest.approx(100) and results["AP50"] == pytest.approx(100)
    assert {key: results[f"AP-{key}"] for key in ("red", "white", "platelet")} == pytest.approx(
        {"red": 100, "white": 100, "platelet": 100}
    )
    written = json.loads((folder / "out" / "inference" / "coco_instances_results.json").read_text())
    assert sorted((entry["image_id"], entry["category_id"]) for entry in written) == [(4, 3), (4, 7), (21, 100)]
    assert not any("as read" in name for name in MetadataCatalog.list())


def test_ap_belongs_to_the_class_it_is_named_after(folder):
    register_coco_format("only_red", write(folder), str(folder))
    red = MetadataCatalog.get("only_red").thing_classes.index("red")
    evaluator = evaluator_for("only_red", folder)
    results = predict_truth("only_red", evaluator, lambda record, annotation: annotation["category_id"] == red)
    assert results["bbox"]["AP-red"] == pytest.approx(100)
    assert results["bbox"]["AP-white"] == results["bbox"]["AP-platelet"] == 0


def test_evaluation_of_an_incomplete_file(folder):
    """No ids, no area, no iscrowd, a NaN box, a box without width, an id used twice."""
    annotations = [
        {key: annotation[key] for key in ("image_id", "category_id", "bbox")} for annotation in ANNOTATIONS
    ]
    annotations += [
        {"id": 5, "image_id": 9, "category_id": 3, "bbox": [1, math.nan, 2, 2]},
        {"id": 5, "image_id": 9, "category_id": 3, "bbox": [1, 1, 0, 2]},
        {"id": 5, "image_id": 9, "category_id": 3, "bbox": [1, 1, 6, 7]},
    ]
    register_coco_format("sloppy", write(folder, {"annotations": annotations}), str(folder))
    assert predict_truth("sloppy", evaluator_for("sloppy", folder))["bbox"]["AP"] == pytest.approx(100)


def test_evaluation_equals_detectron2s_on_a_complete_file(folder):
    from detectron2.evaluation import COCOEvaluator

    annotations = [{**annotation, "id": annotation["id"] + 1} for annotation in ANNOTATIONS]
    register_coco_format("whole", write(folder, {"annotations": annotations}), str(folder))

    def keep(record, annotation):
        return record["image_id"] == 4

    theirs = predict_truth("whole", COCOEvaluator("whole", tasks=("bbox",), output_dir=str(folder)), keep)
    ours = predict_truth("whole", CocoFormatEvaluator("whole", None), keep)
    assert 0 < ours["bbox"]["AP"] < 100
    assert ours["bbox"] == pytest.approx(theirs["bbox"], nan_ok=True)


def test_evaluation_without_annotations_writes_predictions_only(folder):
    register_coco_format("blind", write(folder, without=["annotations"]), str(folder))
    evaluator = evaluator_for("blind", folder)
    evaluator.reset()
    record = DatasetCatalog.get("blind")[0]
    instances = Instances((record["height"], record["width"]))
    instances.pred_boxes = Boxes(torch.tensor([[1.0, 2.0, 3.0, 4.0]]))
    instances.scores, instances.pred_classes = torch.tensor([0.5]), torch.tensor([2])
    evaluator.process([record], [{"instances": instances}])
    assert evaluator.evaluate() == {}
    written = json.loads((folder / "out" / "inference" / "coco_instances_results.json").read_text())
    assert [(entry["image_id"], entry["category_id"]) for entry in written] == [(4, 100)]


def test_evaluation_without_one_box(folder):
    register_coco_format("none", write(folder, {"annotations": []}), str(folder))
    assert math.isnan(predict_truth("none", evaluator_for("none", folder))["bbox"]["AP"])


def test_unknown_protocol_is_refused():
    with pytest.raises(ValueError, match="cityscapes_fine_sem_seg_val.*cityscapes_sem_seg"):
        build_evaluator(get_cfg(), "cityscapes_fine_sem_seg_val", os.curdir)
