"""YOLO's folders: what is recognised, and what a fault in one is called."""

from __future__ import annotations

import os
import unicodedata
from pathlib import Path

import pytest
from folders import expected, fault, found, image, yolo
from PIL import Image

from detr_family.data.datasets.folder import read_folder


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


def roboflow(folder: Path, splits: str, yaml: str = "") -> Path:
    """Roboflow's export for YOLO: data.yaml names all three splits as ../train/images, whichever there are."""
    yolo(folder, "split", {split: {"train": "ab", "valid": "c", "test": "a"}[split] for split in splits.split()})
    keys = "train: ../train/images\nval: ../valid/images\ntest: ../test/images\n\nnc: 2\nnames: ['cat', 'dog']\n"
    (folder / "data.yaml").write_text(yaml or keys + "roboflow:\n  license: CC BY 4.0\n")
    return folder


def test_roboflow_s_yaml_names_splits_that_may_not_be_there(tmp_path: Path) -> None:
    assert found(roboflow(tmp_path / "all", "train valid test"), "test") == expected("a")
    read = read_folder(roboflow(tmp_path / "untested", "train valid"))
    assert list(read.splits) == ["train", "val"] and "data.yaml:3: test is '../test/images'" in read.notes[0]
    (tmp_path / "untested" / "test" / "images").mkdir(parents=True)
    assert "where there is no image: there is no test split" in read_folder(tmp_path / "untested").notes[0]
    read = read_folder(roboflow(tmp_path / "only", "train"))
    assert list(read.splits) == ["train"] and "data.yaml:2: val is '../valid/images'" in read.notes[0]
    assert "there is no validation split" in read.notes[0] and "there is no test split" in read.notes[1]
    image(tmp_path / "only" / "validation" / "images" / "c.jpg")  # there is one, called otherwise
    assert "data.yaml:2: val is '../valid/images'" in fault(tmp_path / "only")


def test_yolo_folders_of_another_computer(tmp_path: Path) -> None:
    yaml = "train: /content/Cells-1/train/images\nval: C:\\data\\Cells-1\\valid\\images\nnames: [cat, dog]\n"
    roboflow(tmp_path, "train valid", yaml)
    assert found(tmp_path) == expected("ab") and found(tmp_path, "val") == {"c": []}
    assert f"'/content/Cells-1/train/images', which is not here; {tmp_path}" in read_folder(tmp_path).notes[0]


def test_yolo_files_with_byte_order_mark_and_windows_line_ends(tmp_path: Path) -> None:
    yolo(tmp_path)
    for path in (tmp_path / "data.yaml", *(tmp_path / "labels").rglob("*.txt")):
        path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n"))
    assert found(tmp_path) == expected("ab")


def test_yolo_names_are_taken_as_they_are_written(tmp_path: Path) -> None:
    for names, classes in {"[no, 1.10]": ["no", "1.10"], '{"1": dog, 0: "007"}': ["007", "dog"]}.items():
        yolo(tmp_path, yaml=f"names: {names}\n")
        content = read_folder(tmp_path).splits["train"].content
        assert [entry["name"] for entry in content["categories"]] == classes


def test_yolo_lists_of_names_in_several_folders_must_agree(tmp_path: Path) -> None:
    (yolo(tmp_path) / "data.yaml").unlink()
    for split in ("train", "val"):
        (tmp_path / "labels" / split / "classes.txt").write_text("cat\ndog\n")
    assert found(tmp_path) == expected("ab")
    (tmp_path / "labels" / "val" / "classes.txt").write_text("dog\ncat\n")
    assert "lists cat, dog, but" in fault(tmp_path)
    for path in tmp_path.rglob("classes.txt"):
        path.unlink()
    assert "may be YOLO's labels: write the names" in fault(tmp_path)


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
        ("names: [cat, dog]\nval: [images/train, images/vl]\n", ":2: val is 'images/vl'"),
        ("names: [cat, dog]\nnc: 3\ntrain: images/train\n", ":2: nc is 3"),
        ("names: {0: cat, 2: dog}\ntrain: images/train\n", ":1: the class numbers are 0, 2"),
        ("train: images/train\nnames: cat\n", ":2: names is 'cat'"),
        ("names: [cat, cat]\ntrain: images/train\n", ":1: a class name is there twice"),
        ("names:\n\t- cat\n\t- dog\n", ":2: the file is no YAML"),
        ("names: [cat, dog\n", ":1: the file is no YAML"),
    ],
)
def test_faults_of_data_yaml_name_the_line(tmp_path: Path, yaml: str, said: str) -> None:
    assert f"{tmp_path / 'data.yaml'}{said}" in fault(yolo(tmp_path, yaml=yaml))
    assert f"{tmp_path / 'data.yaml'}{said}" in fault(tmp_path / "data.yaml")


def test_a_yaml_that_is_no_mapping(tmp_path: Path) -> None:
    yolo(tmp_path, yaml="- cat\n- dog\n")
    assert "data.yaml:1: the file is no mapping" in fault(tmp_path / "data.yaml")


def test_images_of_16_bits_are_told_before_a_training(tmp_path: Path) -> None:
    Image.new("I;16", (20, 20)).save(yolo(tmp_path, splits={"train": "abd"}) / "images" / "train" / "d.png")
    (tmp_path / "images" / "train" / "d.jpg").unlink()
    assert "d.png has more than 8 bits a channel" in fault(tmp_path)


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
