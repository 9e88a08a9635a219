"""Objects365 in its published layout, made up with a few images."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from PIL import Image

from detr_family.config import class_names
from detr_family.data.datasets import objects365
from detr_family.data.datasets.coco import training_dicts
from detr_family.evaluation.evaluator import build_evaluator

CATEGORIES = [{"id": 2, "name": "Sneakers"}, {"id": 1, "name": "Person"}, {"id": 365, "name": "Table Tennis "}]


def annotations(path: Path, files: list[str]) -> None:
    """An annotation file as it is published: entries out of order, with Objects365's own marks."""
    images = [{"id": 10 * i, "file_name": f, "width": 32, "height": 24, "license": 5} for i, f in enumerate(files)]
    boxes = [
        {"id": i, "image_id": x["id"], "category_id": 365, "bbox": [2, 3, 10, 8], "area": 80, "iscrowd": 0,
         "isfake": 0, "isreflected": 0}
        for i, x in enumerate(images)
    ]  # fmt: skip
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"images": images[::-1], "annotations": boxes, "categories": CATEGORIES}))


@pytest.fixture
def root(tmp_path: Path) -> Iterator[Path]:
    """Objects365 below a root of its own, registered there for the test."""
    before = {name: (DatasetCatalog.pop(name), MetadataCatalog.pop(name)) for name in objects365.SPLITS}
    objects365.register_objects365(str(tmp_path))
    yield tmp_path / "Objects365"
    for name, (load, metadata) in before.items():
        DatasetCatalog.pop(name)
        DatasetCatalog.register(name, load)
        MetadataCatalog[name] = metadata


def second_version(root: Path, packed: bool) -> list[str]:
    files = ["images/v1/patch0/a.jpg", "images/v1/patch6/objects365_v1_00320534.jpg", "images/v2/patch16/b.jpg"]
    for split in ("train", "val"):
        annotations(root / f"Obj365_v2/annotations/zhiyuan_objv2_{split}.json", files)
        for file in (files[0], files[2]):
            path = root / "Obj365_v2" / split / (file if packed else "/".join(file.split("/")[-2:]))
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (32, 24)).save(path)
    return files


@pytest.mark.parametrize("packed", [False, True])
def test_the_second_version_is_read_where_it_lies(root: Path, cfg: CfgNode, packed: bool) -> None:
    second_version(root, packed)
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = ("objects365_v2_train",), ("objects365_v2_minival",)
    records = training_dicts(cfg)  # looks for the images
    assert [r["image_id"] for r in records] == [0, 20]  # that of id 10 is in no archive
    assert records[1]["file_name"].endswith("images/v2/patch16/b.jpg" if packed else "train/patch16/b.jpg")
    assert records[0]["annotations"][0]["category_id"] == 2  # of 1, 2 and 365
    assert class_names(cfg) == ["Person", "Sneakers", "Table Tennis "]


def test_the_first_version_is_read(root: Path, cfg: CfgNode) -> None:
    annotations(root / "Obj365_v1/annotations/objects365_train.json", ["obj365_train_1.jpg"])
    (root / "Obj365_v1/train").mkdir()
    Image.new("RGB", (32, 24)).save(root / "Obj365_v1/train/obj365_train_1.jpg")
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = ("objects365_v1_train",), ()
    assert len(training_dicts(cfg)) == 1


def test_the_validation_set_is_parted_as_in_the_paper(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert objects365.SPLITS["objects365_v2_minival"][2] == slice(5000)
    second_version(root, packed=False)
    parts = {"objects365_v2_minival": slice(1), "objects365_v2_valminusminival": slice(1, None)}
    for name, part in parts.items():
        json_file, image_root, _ = objects365.SPLITS[name]
        monkeypatch.setitem(objects365.SPLITS, name, (json_file, image_root, part))
    for name in objects365.SPLITS:
        DatasetCatalog.pop(name)
        MetadataCatalog.pop(name)
    objects365.register_objects365(str(root.parent))
    assert [r["image_id"] for r in DatasetCatalog.get("objects365_v2_minival")] == [0]
    assert [r["image_id"] for r in DatasetCatalog.get("objects365_v2_valminusminival")] == [20]


def test_only_its_own_images_are_evaluated(root: Path, cfg: CfgNode, tmp_path: Path) -> None:
    second_version(root, packed=False)
    evaluator = build_evaluator(cfg, "objects365_v2_minival", str(tmp_path))
    assert sorted(evaluator._coco_api.getImgIds()) == [0, 20]


def test_a_set_that_is_not_here_is_named_with_what_to_do(root: Path, cfg: CfgNode) -> None:
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = ("objects365_v2_train",), ()
    with pytest.raises(ValueError, match=r"zhiyuan_objv2_train\.json is not here.*DETECTRON2_DATASETS"):
        training_dicts(cfg)
    with pytest.raises(ValueError, match=r"zhiyuan_objv2_train\.json is not here.*DETECTRON2_DATASETS"):
        class_names(cfg)


def test_it_is_registered_without_being_read() -> None:
    assert set(objects365.SPLITS) <= set(DatasetCatalog.list())
