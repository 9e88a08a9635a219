"""A folder is a dataset: every format, what is recognised, and what a fault in it is called."""

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
from folders import coco, csv_file, expected, found, image, voc, voc_xml, yolo

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


def fault(folder: Path) -> str:
    with pytest.raises(ValueError) as caught:
        read_folder(folder)
    return str(caught.value)


# ---- YOLO


@pytest.mark.parametrize("outer", ["images", "split"])
def test_yolo_in_either_nesting(tmp_path: Path, outer: str) -> None:
    yolo(tmp_path, outer)
    assert found(tmp_path) == expected("ab")
    assert found(tmp_path, "val") == {"c": []}


def test_yolo_names_as_dict_path_lists_and_no_keys(tmp_path: Path) -> None:
    yolo(tmp_path / "data", splits={"train": "ab", "val": "ab"})
    for yaml in (
        "path: data\ntrain: images/train\nval: [images/val]\ntest:  # none\nnames: {1: dog, 0: cat}\n",
        "path: /not/here\ntrain: data/images/train\nval: data/images/val\nnames: [cat, dog]\n",
        "train: ../data/images/train\nval: ../data/images/val\nnames: [cat, dog]\n",
        "names: [cat, dog]\n",
    ):
        (tmp_path / "my.yaml").write_text(yaml)
        assert found(tmp_path) == found(tmp_path, "val") == expected("ab"), yaml
        assert found(tmp_path / "my.yaml") == expected("ab")


def test_yolo_lists_mix_absolute_and_relative_paths_and_backslashes(tmp_path: Path) -> None:
    yolo(tmp_path, yaml="train: train.txt\nnames: [cat, dog]\n")
    lines = ["./images/train/a.jpg", "images\\train\\b.jpg", "", str(tmp_path / "images" / "val" / "c.jpg")]
    (tmp_path / "train.txt").write_text("\n".join(lines))
    assert found(tmp_path) == expected("abc")
    (tmp_path / "train.txt").write_text("images/train/a.jpg\n/home/me/set/images/train/b.jpg\nimages/train/none.jpg\n")
    assert f"{tmp_path / 'train.txt'}:3" in fault(tmp_path) and "none.jpg" in fault(tmp_path)


def test_yolo_polygons_become_boxes_and_keypoints_are_left_out(tmp_path: Path) -> None:
    yolo(tmp_path)
    label = tmp_path / "labels" / "train" / "a.txt"
    label.write_text("1 0.5 0.25 0.75 0.25 0.75 0.5 0.6 0.75\n")
    assert found(tmp_path)["a"] == [("dog", [30, 10, 45, 30])]
    (tmp_path / "data.yaml").write_text((tmp_path / "data.yaml").read_text() + "kpt_shape: [2, 2]\n")
    label.write_text("0 0.5 0.5 0.5 0.5 0.1 0.1 0.9 0.9\n")
    assert found(tmp_path)["a"] == [("cat", [15, 10, 45, 30])]


def test_yolo_without_yaml_takes_its_classes_file(tmp_path: Path) -> None:
    yolo(tmp_path)
    (tmp_path / "data.yaml").unlink()
    (tmp_path / "classes.txt").write_text("cat\ndog\n")
    assert found(tmp_path) == expected("ab")


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("2 0.5 0.5 0.1 0.1", "class 2, but"),
        ("-1 0.5 0.5 0.1 0.1", "class -1, but"),
        ("0.5 0.5 0.5 0.1 0.1", "class 0.5, but"),
        ("0 0.5 0.5 0.1", "4 columns"),
        ("0 0.5 0.5 0.1 0.1 0.9", "6 columns"),
        ("0 0.5 0.5 0.1 0.1 0.9 0.1 0.1", "8 columns"),
        ("cat 0.5 0.5 0.1 0.1", "could not convert"),
        ("0 320 240 50 60", "no box in fractions"),
        ("0 nan 0.5 0.1 0.1", "no box in fractions"),
    ],
)
def test_yolo_lines_that_cannot_be_name_file_and_line(tmp_path: Path, line: str, said: str) -> None:
    yolo(tmp_path)
    label = tmp_path / "labels" / "train" / "b.txt"
    label.write_text(f"\n1 0.5 0.5 0.1 0.1\n{line}\n")
    assert f"{label}:3: " in fault(tmp_path) and said in fault(tmp_path)


@pytest.mark.parametrize(
    ("yaml", "said"),
    [
        ("names: [cat, dog]\ntrain: images/trian\n", ":2: train is 'images/trian'"),
        ("names: [cat, dog]\nnc: 3\ntrain: images/train\n", ":2: nc is 3"),
        ("names: {0: cat, 2: dog}\ntrain: images/train\n", ":1: the class numbers are 0, 2"),
        ("train: images/train\nnames: cat\n", ":2: names is 'cat'"),
        ("names: [cat, cat]\ntrain: images/train\n", ":1: a class name is there twice"),
    ],
)
def test_faults_of_data_yaml_name_the_line(tmp_path: Path, yaml: str, said: str) -> None:
    assert f"{tmp_path / 'data.yaml'}{said}" in fault(yolo(tmp_path, yaml=yaml))


def test_yolo_images_without_labels_labels_without_images_and_no_labels_at_all(tmp_path: Path) -> None:
    yolo(tmp_path, splits={"train": "abcd", "test": "d"})
    (tmp_path / "labels" / "train" / "ghost.txt").write_text("0 0.5 0.5 0.1 0.1\n")
    notes = "\n".join(read_folder(tmp_path).notes)
    assert "1 images have no label file" in notes and "d.jpg" in notes
    assert "test: none of the 1 images has a label file" in notes and "test" not in read_folder(tmp_path).splits
    assert "1 label files have no image" in notes and "ghost.txt" in notes
    assert found(tmp_path) == {**expected("abc"), "d": []}
    for path in (tmp_path / "labels" / "train").iterdir():
        path.unlink()
    assert "none of the 4 images of train has a label file" in fault(tmp_path)
    assert str(tmp_path / "labels" / "train" / "a.txt") in fault(tmp_path)


def test_yolo_images_of_one_stem_are_refused(tmp_path: Path) -> None:
    image(yolo(tmp_path) / "images" / "train" / "a.png")
    assert "share the label file" in fault(tmp_path) and "a.png" in fault(tmp_path)


def test_yolo_names_of_any_letters_and_case(tmp_path: Path) -> None:
    yolo(tmp_path)
    os.rename(tmp_path / "images" / "train" / "a.jpg", tmp_path / "images" / "train" / "Bär Ж.JPG")
    decomposed = unicodedata.normalize("NFD", "Bär Ж.TXT")
    os.rename(tmp_path / "labels" / "train" / "a.txt", tmp_path / "labels" / "train" / decomposed)
    assert found(tmp_path)["Bär Ж"] == expected("a")["a"]


# ---- Pascal VOC


def test_voc_with_lists_and_turned_images(tmp_path: Path) -> None:
    voc(tmp_path)
    read = read_folder(tmp_path)
    assert found(tmp_path) == expected("ab") and found(tmp_path, "val") == {"c": []}
    assert [(e["width"], e["height"]) for e in read.splits["train"].content["images"]] == [(60, 40), (40, 60)]
    assert read.format == "Pascal VOC" and "pixels from 1 on" in read.notes[0]


def test_voc_beside_images_by_split_and_from_0_on(tmp_path: Path) -> None:
    for split, stems in {"train": "ab", "valid": "c"}.items():
        for stem in stems:
            image(tmp_path / split / f"{stem}.jpg", stem)
            (tmp_path / split / f"{stem}.xml").write_text(voc_xml(stem, first=0))
    a = tmp_path / "train" / "a.xml"
    a.write_text(a.read_text().replace("<xmin>10<", "<xmin>0<"))
    assert found(tmp_path)["a"][0] == ("cat", [0, 4, 30, 24]) and found(tmp_path)["b"] == expected("b")["b"]
    assert found(tmp_path, "val") == {"c": []}


def test_voc_difficult_objects_are_ignored_as_crowd_is(tmp_path: Path, cfg: CfgNode) -> None:
    voc(tmp_path)
    (tmp_path / "Annotations" / "b.xml").write_text(voc_xml("b", difficult=1))
    cfg.DATASETS.FOLDER = str(tmp_path)
    register_datasets(cfg)
    records = {Path(r["file_name"]).stem: r for r in DatasetCatalog.get(cfg.DATASETS.TRAIN[0])}
    assert [a["iscrowd"] for a in records["b"]["annotations"]] == [1]
    assert [a["iscrowd"] for a in records["a"]["annotations"]] == [0, 0]


def test_voc_orphans_are_told_and_listed_ones_are_errors(tmp_path: Path) -> None:
    voc(tmp_path)
    (tmp_path / "JPEGImages" / "b.jpg").unlink()
    listing = tmp_path / "ImageSets" / "Main" / "train.txt"
    assert f"{listing}:2: 'b' has no image" in fault(tmp_path)
    listing.write_text("a\n\nghost\n")
    assert f"{listing}:3: 'ghost' has no XML file" in fault(tmp_path)
    for path in (tmp_path / "ImageSets" / "Main").iterdir():
        path.unlink()
    image(tmp_path / "JPEGImages" / "d.jpg")
    notes = "\n".join(read_folder(tmp_path).notes)
    assert "1 XML files have no image" in notes and "b.xml" in notes
    assert "1 images have no XML file" in notes and "d.jpg" in notes


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("<xmin>6<", "<xmin>six<", ":6: xmin is 'six'"),
        ("<xmax>25</xmax>", "", ":3: the object has no xmax"),
        ("<name>dog</name>", "", ":3: the object has no name"),
        ("<difficult>0<", "<difficult>yes<", ":5: difficult is 'yes'"),
        ("</annotation>", "", ":10: the file is no XML"),
    ],
)
def test_faults_of_voc_files_name_file_and_line(tmp_path: Path, old: str, new: str, said: str) -> None:
    path = voc(tmp_path) / "Annotations" / "b.xml"
    path.write_text(path.read_text().replace(old, new, 1))
    assert f"{path}{said}" in fault(tmp_path)


def test_voc_images_called_otherwise(tmp_path: Path) -> None:
    voc(tmp_path)
    os.rename(tmp_path / "JPEGImages" / "a.jpg", tmp_path / "JPEGImages" / "a.JPEG")
    (tmp_path / "Annotations" / "a.xml").write_text(voc_xml("a", filename="C:\\data\\a.jpg"))
    assert found(tmp_path) == expected("ab")
    image(tmp_path / "JPEGImages" / "a.png")
    assert "may mean any of 2 images" in fault(tmp_path)


# ---- CSV


@pytest.mark.parametrize(
    "header",
    ["filename,xmin,ymin,xmax,ymax,class", "Image_Path,x1,y1,x2,y2,Label", "image_id,x_min,y_min,x_max,y_max,name"],
)
def test_csv_by_the_names_of_its_columns(tmp_path: Path, header: str) -> None:
    assert found(csv_file(tmp_path, header)) == expected("abc")


def test_csv_without_names_of_columns_with_sizes_and_with_splits(tmp_path: Path) -> None:
    assert found(csv_file(tmp_path / "plain", "")) == expected("abc")
    rows = "filename;x;y;width;height;label;split\na.JPG;10;4;20;20;cat;train\nA;40.5;10;10;20;dog;train\n"
    csv_file(tmp_path / "sized")
    (tmp_path / "sized" / "boxes.csv").write_text("\ufeff" + rows + "b.jpg;5;6;20;40;dog;valid\n")
    assert found(tmp_path / "sized") == expected("a") and found(tmp_path / "sized", "val") == expected("b")
    assert "1 images are in no row" in read_folder(tmp_path / "sized").notes[0]
    # As Roboflow exports it: width and height are the image's.
    for split in ("train", "valid"):
        csv_file(tmp_path / "roboflow" / split, name="_annotations.csv")
        rows = "filename,width,height,class,xmin,ymin,xmax,ymax\nb.jpg,40,60,dog,5,6,25,46\n"
        (tmp_path / "roboflow" / split / "_annotations.csv").write_text(rows)
    assert found(tmp_path / "roboflow") == found(tmp_path / "roboflow", "val") == expected("b")


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ("a.jpg,1,2,3,cat", ":7: 5 columns, not 6"),
        ("a.jpg,1,2,x,4,cat", ":7: xmin, ymin, xmax, ymax are '1', '2', 'x', '4'"),
        ("none.jpg,1,2,3,4,cat", ":7: the image 'none.jpg' is not here"),
        ("a.jpg,1,2,3,4,", ":7: the box has no class"),
    ],
)
def test_faults_of_csv_rows_name_file_and_line(tmp_path: Path, row: str, said: str) -> None:
    path = csv_file(tmp_path) / "boxes.csv"
    path.write_text(path.read_text().rstrip() + "\n\n" + row + "\n")
    assert f"{path}{said}" in fault(tmp_path)


# ---- COCO


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
