"""A folder is a dataset: what is recognised, whatever its format, and what becomes of it."""

from __future__ import annotations

import json
import os
import unicodedata
from collections.abc import Callable, Iterator
from pathlib import Path

import folders
import pytest
from detectron2.config import CfgNode, get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog
from folders import coco, csv_file, expected, fault, found, image, voc, voc_xml, yolo

from detr_family import add_detr_family_config
from detr_family.commands.convert_dataset import command
from detr_family.data.check import read_part
from detr_family.data.datasets.coco import check_class_names, register_datasets, training_dicts
from detr_family.data.datasets.folder import read_folder


@pytest.fixture
def cfg(tmp_path: Path) -> Iterator[CfgNode]:
    known = set(DatasetCatalog.list())
    result = get_cfg()
    add_detr_family_config(result)
    result.OUTPUT_DIR = str(tmp_path / "output")
    yield result
    for name in set(DatasetCatalog.list()) - known:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)


def test_names_of_any_letters_and_case_in_the_other_formats(tmp_path: Path) -> None:
    """Composed in the annotations, decomposed and with a suffix in upper case on the disk, as between two systems."""
    name, stored = "Bär Ж.jpg", unicodedata.normalize("NFD", "Bär Ж.JPG")
    folders = [voc(tmp_path / "voc"), csv_file(tmp_path / "csv"), tmp_path / "coco"]
    image(folders[2] / "images" / "a.jpg", "a")
    coco(folders[2] / "train.json", {"a": name})
    for folder in folders:
        (path,) = folder.rglob("a.jpg")
        path.rename(path.with_name(stored))
    path = folders[0] / "Annotations" / "a.xml"
    path.write_text(path.read_text().replace("a.jpg", name), encoding="utf-8")
    path.rename(path.with_name("Bär Ж.xml"))
    listing = folders[0] / "ImageSets" / "Main" / "train.txt"
    listing.write_text("Bär Ж\nb\n", encoding="utf-8")
    rows = folders[1] / "boxes.csv"
    rows.write_text(rows.read_text().replace("a.jpg", name), encoding="utf-8")
    for folder in folders:
        boxes = {unicodedata.normalize("NFC", stem): objects for stem, objects in found(folder).items()}
        assert boxes["Bär Ж"] == expected("a")["a"], folder


def test_voc_difficult_objects_are_ignored_as_crowd_is(tmp_path: Path, cfg: CfgNode) -> None:
    voc(tmp_path)
    (tmp_path / "Annotations" / "b.xml").write_text(voc_xml("b", difficult=1))
    cfg.DATASETS.FOLDER = str(tmp_path)
    register_datasets(cfg)
    records = {Path(r["file_name"]).stem: r for r in DatasetCatalog.get(cfg.DATASETS.TRAIN[0])}
    assert [a["iscrowd"] for a in records["b"]["annotations"]] == [1]
    assert [a["iscrowd"] for a in records["a"]["annotations"]] == [0, 0]


def test_coco_in_its_own_layout_is_read_where_it_lies(tmp_path: Path, cfg: CfgNode) -> None:
    for split, stems in {"train2017": "ab", "val2017": "c"}.items():
        for stem in stems:
            image(tmp_path / split / f"{stem}.jpg", stem)
        coco(tmp_path / "annotations" / f"instances_{split}.json", {s: f"{s}.jpg" for s in stems})
        (tmp_path / "annotations" / f"captions_{split}.json").write_text('{"images": [], "categories": []}')
    assert found(tmp_path) == expected("ab")
    cfg.DATASETS.FOLDER = str(tmp_path)
    register_datasets(cfg)
    entry = cfg.DATASETS.COCO_FORMAT[0]
    assert entry[1:] == [str(tmp_path / "annotations" / "instances_train2017.json"), str(tmp_path / "train2017")]
    assert not Path(cfg.OUTPUT_DIR).exists()


def test_roboflow_s_root_class_is_left_out(tmp_path: Path, cfg: CfgNode) -> None:
    categories = [
        {"id": 0, "name": "pets", "supercategory": "none"},
        *({"id": n, "name": name, "supercategory": "pets"} for n, name in enumerate(folders.NAMES, start=1)),
    ]
    for split, stems in {"train": "ab", "valid": "c", "test": "a"}.items():
        for stem in stems:
            image(tmp_path / split / f"{stem}.jpg", stem)
        coco(tmp_path / split / "_annotations.coco.json", {s: f"{s}.jpg" for s in stems}, categories)
    assert found(tmp_path) == expected("ab") and found(tmp_path, "test") == expected("a")
    cfg.DATASETS.FOLDER = str(tmp_path)
    register_datasets(cfg)
    name = tmp_path.name.replace("-", "_")
    assert (f"{name}_train",) == cfg.DATASETS.TRAIN and (f"{name}_val",) == cfg.DATASETS.TEST
    assert (f"{name}_test",) == cfg.DATASETS.FINAL_TEST
    assert MetadataCatalog.get(f"{name}_train").thing_classes == folders.NAMES
    check_class_names(cfg)
    used = json.loads((tmp_path / "train" / "_annotations.coco.json").read_text())
    used["annotations"][0]["category_id"] = 0
    (tmp_path / "train" / "_annotations.coco.json").write_text(json.dumps(used))
    assert [c["name"] for c in read_folder(tmp_path).splits["val"].content["categories"]] == ["pets", "cat", "dog"]


def test_coco_files_beside_an_image_folder_with_backslashes_and_another_case(tmp_path: Path) -> None:
    for stem in "ab":
        image(tmp_path / "images" / "day 1" / f"{stem}.JPG", stem)
    coco(tmp_path / "train.json", {"a": "day 1\\a.jpg", "b": "day 1/b.JPG"})
    assert found(tmp_path) == expected("ab")
    names = [entry["file_name"] for entry in read_folder(tmp_path).splits["train"].content["images"]]
    assert names == ["day 1/a.JPG", "day 1/b.JPG"]


def test_faults_of_coco_folders(tmp_path: Path) -> None:
    coco(tmp_path / "train.json", {"a": "a.jpg"})
    assert "its images (a.jpg) are not in" in fault(tmp_path)
    image(tmp_path / "a.jpg", "a")
    coco(tmp_path / "also_train.json", {"a": "a.jpg"})
    assert "are both of the split 'train'" in fault(tmp_path)
    (tmp_path / "also_train.json").unlink()
    (tmp_path / "train.json").write_text('{"images": [],\n "categories": [],\n}')
    assert f"{tmp_path / 'train.json'}:3: the file is not JSON" in fault(tmp_path)


# ---- all of them


def test_a_folder_of_nothing_says_what_was_looked_for(tmp_path: Path) -> None:
    image(tmp_path / "a.jpg")
    assert "Its files by suffix: 1 .jpg" in fault(tmp_path) and "data.yaml" in fault(tmp_path)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        read_folder(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="FOLDER_FORMAT is 'tf'"):
        read_folder(tmp_path, "tf")


def test_an_archive_s_folder_in_the_folder_is_entered(tmp_path: Path) -> None:
    image(tmp_path / "Cells-3" / "export" / "train" / "a.jpg", "a")
    coco(tmp_path / "Cells-3" / "export" / "train" / "_annotations.coco.json", {"a": "a.jpg"})
    (tmp_path / "__MACOSX").mkdir()
    assert found(tmp_path) == expected("a") and read_folder(tmp_path).folder.name == "export"


@pytest.mark.parametrize("key", ["images", "annotations", "categories"])
@pytest.mark.parametrize(
    "value", [None, 5, {}, [], [[1]], [{}], [{"id": [1]}], [{"id": 1, "image_id": [2], "name": 3}]]
)
def test_a_coco_folder_with_a_fault_is_one_clear_error(tmp_path: Path, cfg: CfgNode, key: str, value: object) -> None:
    """In the folder itself, or where the file that is made of it is read."""
    for stem in "ab":
        image(tmp_path / "cells" / "train" / f"{stem}.jpg", stem)
    path = tmp_path / "cells" / "train" / "_annotations.coco.json"
    coco(path, {"a": "a.jpg", "b": "b.jpg"})
    path.write_text(json.dumps({**json.loads(path.read_text()), key: value}))
    cfg.DATASETS.FOLDER = str(tmp_path / "cells")
    with pytest.raises(ValueError, match=r"\.json|usable box|has 0 images"):
        register_datasets(cfg)
        training_dicts(cfg)


def test_a_test_split_without_annotations_is_left_out(tmp_path: Path) -> None:
    for split in ("train", "test"):
        image(tmp_path / split / "a.jpg", "a")
        coco(tmp_path / split / "_annotations.coco.json", {"a": "a.jpg"})
    path = tmp_path / "test" / "_annotations.coco.json"
    path.write_text(json.dumps({key: value for key, value in json.loads(path.read_text()).items() if key[0] != "a"}))
    read = read_folder(tmp_path)
    assert list(read.splits) == ["train"] and "the split is left out" in read.notes[0]
    (tmp_path / "train" / "_annotations.coco.json").unlink()
    assert "nothing of it can be used. test: " in fault(tmp_path)


def test_what_a_training_in_the_folder_wrote_is_no_part_of_it(tmp_path: Path) -> None:
    yolo(tmp_path, yaml="names: [cat, dog]\n")
    for name, marks in {"output": ("config.yaml", "log.txt"), "drawn": ("results.json", "images.json")}.items():
        image(tmp_path / name / "train" / "a.jpg")
        for mark in marks:
            (tmp_path / name / mark).write_text("{}")
    assert found(tmp_path) == expected("ab")


def test_an_archive_is_to_be_unpacked(tmp_path: Path) -> None:
    (tmp_path / "cells.zip").write_bytes(b"PK")
    assert fault(tmp_path / "cells.zip").endswith("Unpack it")


def test_of_two_formats_the_key_chooses(tmp_path: Path) -> None:
    yolo(tmp_path)
    coco(tmp_path / "train.json", {"a": "images/train/a.jpg"})
    assert found(tmp_path) == expected("a") and "it also has YOLO" in read_folder(tmp_path).notes[0]
    assert read_folder(tmp_path, "yolo").format == "YOLO"


def test_a_validation_is_cut_off_by_image_and_saved(tmp_path: Path, cfg: CfgNode) -> None:
    yolo(tmp_path / "pets", splits={"train": "ab"})
    for number in range(18):
        image(tmp_path / "pets" / "images" / "train" / f"{number:02d}.jpg")
    chosen = []
    for seed, share in ((0, 0.2), (0, 0.2), (1, 0.2), (0, 0.5)):
        run_cfg = cfg.clone()
        run_cfg.DATASETS.FOLDER = str(tmp_path / "pets")
        run_cfg.DATASETS.VAL_SHARE, run_cfg.DATASETS.VAL_SEED = share, seed
        run_cfg.OUTPUT_DIR = str(tmp_path / f"output{len(chosen)}")
        register_datasets(run_cfg)
        train, val = (
            {Path(r["file_name"]).stem for r in DatasetCatalog.get(name)}
            for name in (*run_cfg.DATASETS.TRAIN, *run_cfg.DATASETS.TEST)
        )
        assert not train & val and len(train | val) == 20 and len(val) == round(20 * share)
        saved = json.loads((Path(run_cfg.OUTPUT_DIR) / "datasets" / "val.json").read_text())
        assert {Path(entry["file_name"]).stem for entry in saved["images"]} == val
        chosen.append(val)
    assert chosen[0] == chosen[1] != chosen[2] and chosen[0] < chosen[3]
    again = cfg.clone()  # what a training leaves names the same files, and the folder is not read again
    again.DATASETS.COCO_FORMAT, again.DATASETS.TRAIN = run_cfg.DATASETS.COCO_FORMAT, run_cfg.DATASETS.TRAIN
    assert run_cfg.DATASETS.FOLDER == ""
    register_datasets(again)


def test_a_share_that_is_none_and_a_single_image(tmp_path: Path, cfg: CfgNode) -> None:
    cfg.DATASETS.FOLDER, cfg.DATASETS.VAL_SHARE = str(yolo(tmp_path / "two", splits={"train": "ab"})), 1.0
    with pytest.raises(ValueError, match="VAL_SHARE is 1"):
        register_datasets(cfg)
    cfg.DATASETS.FOLDER, cfg.DATASETS.VAL_SHARE = str(yolo(tmp_path / "one", splits={"train": "a"})), 0.2
    with pytest.raises(ValueError, match="has 1 images"):
        register_datasets(cfg)


def test_without_a_training_split_it_can_be_evaluated_on_alone(tmp_path: Path, cfg: CfgNode) -> None:
    cfg.DATASETS.FOLDER = str(yolo(tmp_path, splits={"val": "ab"}))
    register_datasets(cfg)
    assert cfg.DATASETS.TRAIN == () and len(DatasetCatalog.get(cfg.DATASETS.TEST[0])) == 2
    with pytest.raises(ValueError, match="needs a split for training"):
        training_dicts(cfg)


FORMATS: dict[str, Callable[[Path], Path]] = {"yolo": yolo, "voc": voc, "csv": csv_file}


@pytest.mark.parametrize("name", FORMATS)
def test_converted_it_is_the_same_dataset(
    tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str], cfg: CfgNode
) -> None:
    source = FORMATS[name](tmp_path / "source")
    assert command([str(source), "--output", str(tmp_path / "coco"), "--val-share", "0.4"]) == 0
    assert "DATASETS.COCO_FORMAT" in capsys.readouterr().out
    train, val = found(tmp_path / "coco"), found(tmp_path / "coco", "val")
    assert {**train, **val} == expected("abc") and not train.keys() & val.keys()
    cfg.DATASETS.FOLDER = str(tmp_path / "coco")
    register_datasets(cfg)
    part = read_part(cfg.DATASETS.TRAIN[0], True)
    assert part.scan and not part.scan.faults and all(os.path.isfile(r["file_name"]) for r in part.records)


def test_conversion_of_nothing_fails_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command([str(tmp_path), "--output", str(tmp_path / "coco")]) == 2
    assert capsys.readouterr().err.startswith("convert_dataset: ") and not (tmp_path / "coco").exists()


def test_two_folders_of_one_name_stay_apart(tmp_path: Path, cfg: CfgNode) -> None:
    names = set()
    for number in range(2):
        own = cfg.clone()
        own.DATASETS.FOLDER = str(yolo(tmp_path / str(number) / "pets", splits={"train": "ab", "val": "ab"}))
        own.OUTPUT_DIR = str(tmp_path / f"output{number}")
        register_datasets(own)
        names |= {*own.DATASETS.TRAIN, *own.DATASETS.TEST}
    assert names == {"pets_train", "pets_val", "pets_2_train", "pets_2_val"}
