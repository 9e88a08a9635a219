"""Users' own COCO-format datasets: reading, faults, registration and the training set."""

import copy
import logging
import math
from pathlib import Path

import pytest
from detectron2.config import get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import BoxMode
from own_data import ANNOTATIONS, CATEGORIES, IMAGES, write
from PIL import Image

from detr_family import add_detr_family_config
from detr_family.data import check_images, register_coco_format, register_datasets, training_dicts
from detr_family.data.datasets import coco
from detr_family.data.datasets.coco_json import read_coco_json


def with_boxes(*boxes):
    return {
        "annotations": [{"id": 50 + i, "image_id": 4, "category_id": 7, "bbox": box} for i, box in enumerate(boxes)]
    }


def config(train=(), test=(), entries=()):
    cfg = get_cfg()
    add_detr_family_config(cfg)
    cfg.DATASETS.COCO_FORMAT = [list(entry) for entry in entries]
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = tuple(train), tuple(test)
    cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS = False
    register_datasets(cfg)
    return cfg


def changed(entries, index, **changes):
    entries = copy.deepcopy(entries)
    entries[index].update(changes)
    return entries


def test_reads_images_in_order_with_class_numbers_by_ascending_id(coco_folder):
    records = read_coco_json(write(coco_folder), str(coco_folder))
    assert [record["image_id"] for record in records] == [4, 9, 21]
    assert records[0]["file_name"] == str(coco_folder / "a.png")
    assert (records[0]["width"], records[0]["height"]) == (60, 30)
    assert [a["category_id"] for a in records[0]["annotations"]] == [0, 1]
    assert records[1]["annotations"] == []
    assert records[2]["annotations"] == [
        {"bbox": [5, 6, 20, 10], "bbox_mode": BoxMode.XYWH_ABS, "category_id": 2, "iscrowd": 0, "area": 150}
    ]


def test_agrees_with_detectron2s_own_loader(coco_folder):
    from detectron2.data.datasets import load_coco_json

    json_file = write(coco_folder)
    theirs = load_coco_json(json_file, str(coco_folder), "coco_as_detectron2_reads_it")
    ours = read_coco_json(json_file, str(coco_folder))
    for record in ours:
        for annotation in record["annotations"]:
            del annotation["area"]
    assert ours == theirs
    MetadataCatalog.remove("coco_as_detectron2_reads_it")


FILE_FAULTS = {
    "json": ("{", "not JSON", "Export it again"),
    "list": ("[]", "holds a list", "must be an object"),
    "latin-1": ('{"images": "\xe9"}'.encode("latin-1"), "not JSON", "Save it as UTF-8"),
}


@pytest.mark.parametrize("fault", FILE_FAULTS)
def test_file_that_is_no_coco_file(coco_folder, fault):
    content, problem, remedy = FILE_FAULTS[fault]
    path = coco_folder / "broken.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=f"(?s)broken.json.*DATASETS.COCO_FORMAT.*{problem}.*{remedy}"):
        read_coco_json(str(path), str(coco_folder))


@pytest.mark.parametrize("path", ["nowhere.json", "."])
def test_missing_file(coco_folder, path):
    with pytest.raises(ValueError, match=r"cannot be read .*Correct its path in DATASETS.COCO_FORMAT"):
        read_coco_json(str(coco_folder / path), str(coco_folder))


def test_byte_order_mark_is_fine(coco_folder):
    path = write(coco_folder)
    Path(path).write_text(Path(path).read_text(encoding="utf-8"), encoding="utf-8-sig")
    assert len(read_coco_json(path, str(coco_folder))) == 3


STRUCTURAL_FAULTS = {
    "no images key": ({"images": None}, '"images" is missing'),
    "no categories key": ({"categories": None}, '"categories" is missing'),
    "images no list": ({"images": {}}, '"images" is {}'),
    "image no object": ({"images": ["a.png"]}, r"images\[0\] is 'a.png'"),
    "no images": ({"images": [], "annotations": []}, '"images" is empty'),
    "no categories": ({"categories": [], "annotations": []}, '"categories" is empty'),
    "image id twice": ({"images": changed(IMAGES, 2, id=21)}, r"images\[2\] repeats the id 21"),
    "category id twice": ({"categories": changed(CATEGORIES, 1, id=7)}, r"categories\[1\] repeats the id 7"),
    "image id a string": ({"images": changed(IMAGES, 0, id="a21")}, r"images\[0\] has the id 'a21'.*integers"),
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
def test_structural_fault_is_one_error_naming_file_and_entry(coco_folder, fault):
    changes, message = STRUCTURAL_FAULTS[fault]
    with pytest.raises(ValueError, match=f"(?s)train.json.*DATASETS.COCO_FORMAT.*{message}"):
        read_coco_json(write(coco_folder, changes), str(coco_folder))


BOX_FAULTS = {
    "nan": ([1, math.nan, 5, 5], "1 not finite"),
    "infinite": ([1, 1, math.inf, 5], "1 not finite"),
    "overflow": ([1, 1, 10**400, 5], "1 not finite"),
    "no width": ([1, 1, 0, 5], "1 zero or negative width or height"),
    "negative height": ([1, 1, 5, -5], "1 zero or negative width or height"),
    "right of the image": ([60, 1, 5, 5], "1 outside the image"),
    "above the image": ([5, -9, 5, 9], "1 outside the image"),
    "three numbers": ([1, 1, 5], "1 missing or not four numbers"),
    "strings": (["1", "one", "5", "5"], "1 missing or not four numbers"),
    "missing": (None, "1 missing or not four numbers"),
}


@pytest.mark.parametrize("fault", BOX_FAULTS)
def test_unusable_box_is_left_out_and_counted(coco_folder, caplog, fault):
    box, message = BOX_FAULTS[fault]
    with caplog.at_level(logging.WARNING):
        records = read_coco_json(write(coco_folder, with_boxes(box, [1, 2, 3, 4])), str(coco_folder))
    assert [annotation["bbox"] for annotation in records[0]["annotations"]] == [[1, 2, 3, 4]]
    (warning,) = caplog.messages
    assert "train.json" in warning and "of 2 annotations" in warning and f"{message}: id 50" in warning


def test_box_partly_outside_is_clipped_but_rounding_is_left(coco_folder, caplog):
    boxes = ([-10, -5, 30, 20], [50, 20, 40, 40], [40, 20, 20.4, 10])
    with caplog.at_level(logging.WARNING):
        records = read_coco_json(write(coco_folder, with_boxes(*boxes)), str(coco_folder))
    annotations = records[0]["annotations"]
    assert [annotation["bbox"] for annotation in annotations] == [
        [0, 0, 20, 15],
        [50, 20, 10, 10],
        [40, 20, 20.4, 10],
    ]
    assert [annotation["area"] for annotation in annotations] == pytest.approx([300, 100, 204])
    assert "2 partly outside the image (kept, clipped to it): id 50, id 51" in caplog.messages[0]


def test_good_file_gives_no_warning(coco_folder, caplog):
    with caplog.at_level(logging.WARNING):
        read_coco_json(write(coco_folder), str(coco_folder))
    assert not caplog.messages


def test_many_faults_name_the_first_few_and_say_it_once(coco_folder, caplog):
    json_file = write(coco_folder, with_boxes(*[[0, 0, 0, 0]] * 9))
    with caplog.at_level(logging.WARNING):
        read_coco_json(json_file, str(coco_folder))
        read_coco_json(json_file, str(coco_folder))
    (warning,) = caplog.messages
    assert "9 zero or negative" in warning and "id 54, ..." in warning and "id 55" not in warning


def test_size_is_read_from_the_image_where_the_entry_has_none(coco_folder):
    exif = Image.Exif()
    exif[0x0112] = 6  # shown turned by a quarter
    Image.new("RGB", (50, 40)).save(coco_folder / "b.png", exif=exif)
    images = [{"id": 21, "file_name": "b.png"}, {"id": 4, "file_name": "a.png", "width": 0, "height": "30"}]
    records = read_coco_json(write(coco_folder, {"images": images}), str(coco_folder))
    assert [(record["width"], record["height"]) for record in records] == [(60, 30), (40, 50)]
    (coco_folder / "b.png").write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"b\.png has no width and height, and the image cannot be read"):
        read_coco_json(write(coco_folder, {"images": images}), str(coco_folder))


def test_ignore_counts_as_crowd_and_missing_iscrowd_as_none(coco_folder):
    annotations = [{**ANNOTATIONS[1], "ignore": 1}, {**ANNOTATIONS[2], "iscrowd": 1}, {**ANNOTATIONS[1]}]
    del annotations[2]["iscrowd"]
    records = read_coco_json(write(coco_folder, {"annotations": annotations}), str(coco_folder))
    assert [annotation["iscrowd"] for annotation in records[0]["annotations"]] == [1, 1, 0]


def test_registration_from_config_and_command_line(coco_folder):
    train, images = write(coco_folder), str(coco_folder)
    cfg = config()
    cfg.merge_from_list(["DATASETS.COCO_FORMAT", f"[('cells_a', '{train}', '{images}')]"])
    register_datasets(cfg)
    (coco_folder / "c.yaml").write_text(f"DATASETS:\n  COCO_FORMAT:\n  - [cells_b, {train}, {images}]\n")
    cfg.merge_from_file(str(coco_folder / "c.yaml"))
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
    with pytest.raises(ValueError, match=r"coco_2017_val.*already taken"):
        register_coco_format("coco_2017_val", "mine.json", "images")
    assert MetadataCatalog.get("coco_2017_val").json_file.endswith("instances_val2017.json")


def test_home_is_expanded(coco_folder, monkeypatch):
    write(coco_folder)
    monkeypatch.setenv("HOME", str(coco_folder))
    register_coco_format("cells_home", "~/train.json", "~")
    assert DatasetCatalog.get("cells_home")[0]["file_name"] == str(coco_folder / "a.png")


@pytest.mark.parametrize("entry", ["cells", ["cells", "train.json"], ["cells", "train.json", None]])
def test_malformed_entry(entry):
    cfg = get_cfg()
    add_detr_family_config(cfg)
    cfg.DATASETS.COCO_FORMAT = [entry]
    with pytest.raises(ValueError, match=r"DATASETS.COCO_FORMAT has the entry .*cells.*\[name, annotation file"):
        register_datasets(cfg)


def test_missing_file_is_told_when_class_names_are_asked_for(coco_folder):
    register_coco_format("cells_gone", str(coco_folder / "gone.json"), str(coco_folder))
    with pytest.raises(ValueError, match=r"gone.json \(given in DATASETS.COCO_FORMAT\).*cannot be read"):
        MetadataCatalog.get("cells_gone").get("thing_classes")


def test_equal_names_are_kept_apart(coco_folder):
    categories = [{"id": 0, "name": "fish"}, {"id": 1, "name": "fish"}, {"id": 2, "name": 5}]
    json_file = write(coco_folder, {"categories": categories, "annotations": []})
    register_coco_format("fish", json_file, str(coco_folder))
    assert MetadataCatalog.get("fish").thing_classes == ["fish (id 0)", "fish (id 1)", "5"]


def test_training_set_keeps_empty_images_unless_told_otherwise(coco_folder):
    cfg = config(["t"], [], [("t", write(coco_folder), str(coco_folder))])
    assert [record["image_id"] for record in training_dicts(cfg)] == [4, 9, 21]
    cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS = True
    assert [record["image_id"] for record in training_dicts(cfg)] == [4, 21]


def test_several_training_sets_are_joined(coco_folder):
    entries = [(name, write(coco_folder, name=f"{name}.json"), str(coco_folder)) for name in ("one", "two")]
    assert len(training_dicts(config(["one", "two"], [], entries))) == 6


def test_training_needs_a_name():
    with pytest.raises(ValueError, match=r"DATASETS.TRAIN is empty"):
        training_dicts(config())


def test_training_on_an_unknown_name():
    with pytest.raises(ValueError, match=r"DATASETS.TRAIN names 'nobody'.*DATASETS.COCO_FORMAT"):
        training_dicts(config(["nobody"]))


def test_training_on_a_built_in_set_that_is_not_here(monkeypatch, coco_folder):
    monkeypatch.chdir(coco_folder)
    with pytest.raises(ValueError, match=r"'coco_2017_train' in DATASETS.TRAIN is not here.*DETECTRON2_DATASETS"):
        training_dicts(config(["coco_2017_train"]))


def test_training_without_annotations(coco_folder):
    cfg = config(["t"], [], [("t", write(coco_folder, without=["annotations"]), str(coco_folder))])
    with pytest.raises(ValueError, match=r"'t' in DATASETS.TRAIN has no annotations .*train.json"):
        training_dicts(cfg)


@pytest.mark.parametrize("changes", [{"annotations": []}, with_boxes([0, 0, 0, 0], [1, 1, math.nan, 1])])
def test_training_without_one_usable_box(coco_folder, changes):
    cfg = config(["t"], [], [("t", write(coco_folder, changes), str(coco_folder))])
    with pytest.raises(ValueError, match=r"has 3 images but not one usable box.*DATASETS.COCO_FORMAT"):
        training_dicts(cfg)


def test_training_with_missing_images(coco_folder):
    cfg = config(["t"], [], [("t", write(coco_folder), str(coco_folder))])
    (coco_folder / "a.png").unlink()
    (coco_folder / "c.png").unlink()
    with pytest.raises(ValueError, match=r"2 of 3 images .*missing.*a\.png.*c\.png.*DATASETS.COCO_FORMAT") as error:
        training_dicts(cfg)
    assert f"image folder {coco_folder}:" in str(error.value)


def test_many_images_are_sampled(coco_folder, caplog, monkeypatch):
    monkeypatch.setattr(coco, "_CHECKED_IMAGES", 10)
    records = [{"file_name": str(coco_folder / f"none{i}.png")} for i in range(25)]
    with caplog.at_level(logging.INFO), pytest.raises(ValueError, match="10 of 10 images looked for"):
        check_images(records)
    assert "Looking for 10 of 25 images" in caplog.text


OTHER_NAMES = [{"id": 3, "name": "red"}, {"id": 7, "name": "white"}, {"id": 100, "name": "platelet"}]


@pytest.mark.parametrize("place", ["train", "test"])
def test_class_names_that_differ(coco_folder, place):
    entries = [
        ("one", write(coco_folder), str(coco_folder)),
        ("two", write(coco_folder, {"categories": OTHER_NAMES}, "two.json"), str(coco_folder)),
    ]
    cfg = config(["one", "two"] if place == "train" else ["one"], ["two"], entries)
    message = r"'one' in DATASETS.TRAIN has \['white', 'red', 'platelet'\], 'two' in DATASETS.{} has \['red', 'white'"
    with pytest.raises(ValueError, match=message.format(place.upper())):
        training_dicts(cfg)


def test_sets_registered_through_detectron2_are_compared_once_loaded(coco_folder):
    from detectron2.data.datasets import register_coco_instances

    for name, categories in (("same", CATEGORIES), ("other", OTHER_NAMES)):
        json_file = write(coco_folder, {"categories": categories}, f"{name}.json")
        register_coco_instances(name, {}, json_file, str(coco_folder))
    entries = [("one", write(coco_folder), str(coco_folder))]
    assert len(training_dicts(config(["one", "same"], ["same"], entries))) == 6
    with pytest.raises(ValueError, match=r"Class names differ.*'other' in DATASETS.TRAIN"):
        training_dicts(config(["one", "other"], [], entries))


def test_test_set_with_fewer_classes_would_not_fit(coco_folder):
    fewer = write(coco_folder, {"categories": [{"id": 3, "name": "white"}], "annotations": []}, "two.json")
    cfg = config(["one"], ["two"], [("one", write(coco_folder), str(coco_folder)), ("two", fewer, str(coco_folder))])
    with pytest.raises(ValueError, match=r"'two' in DATASETS.TEST has \['white'\]"):
        training_dicts(cfg)


def test_test_set_with_other_ids_or_more_classes_is_fine(coco_folder):
    names = ["white", "red", "platelet", "parasite"]
    categories = [{"id": 10 + i, "name": name} for i, name in enumerate(names)]
    more = write(coco_folder, {"categories": categories, "annotations": []}, "two.json")
    cfg = config(["one"], ["two"], [("one", write(coco_folder), str(coco_folder)), ("two", more, str(coco_folder))])
    assert len(training_dicts(cfg)) == 3


def test_test_set_that_is_not_here_does_not_stop_training(coco_folder, caplog):
    entries = [("one", write(coco_folder), str(coco_folder)), ("two", str(coco_folder / "gone.json"), str(coco_folder))]
    with caplog.at_level(logging.WARNING):
        assert len(training_dicts(config(["one"], ["two", "three"], entries))) == 3
    assert "Evaluation on 'two' will fail" in caplog.text and "gone.json" in caplog.text
    assert "Evaluation on 'three' will fail" in caplog.text
