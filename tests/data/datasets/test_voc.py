"""Pascal VOC's folders: what is recognised, and what a fault in one is called."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from folders import expected, fault, found, image, voc, voc_xml

from detr_family.data.datasets.folder import read_folder


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


def test_voc_of_two_years_with_the_same_names(tmp_path: Path) -> None:
    voc(tmp_path / "VOC2007", {"train": "ab"})
    voc(tmp_path / "VOC2012", {"train": "a", "val": "c"})
    images = [entry["file_name"] for entry in read_folder(tmp_path).splits["train"].content["images"]]
    assert images == [f"VOC2007/JPEGImages/{stem}.jpg" for stem in "ab"] + ["VOC2012/JPEGImages/a.jpg"]


def test_voc_lists_with_spaces_suffixes_and_marks(tmp_path: Path) -> None:
    voc(tmp_path)
    for path in (tmp_path / "JPEGImages" / "a.jpg", tmp_path / "Annotations" / "a.xml"):
        path.rename(path.with_name("scan 1" + path.suffix))
    listing = tmp_path / "ImageSets" / "Main" / "train.txt"
    for lines in ("scan 1\nb.jpg\n", "scan 1  1\nJPEGImages/b.JPG -1\n"):
        listing.write_text(lines)
        assert found(tmp_path) == {"scan 1": expected("a")["a"], "b": expected("b")["b"]}


def test_voc_fractions_of_a_pixel_below_one_are_from_0_on(tmp_path: Path) -> None:
    path = voc(tmp_path) / "Annotations" / "a.xml"
    path.write_text(path.read_text().replace("<xmin>11<", "<xmin>0.25<").replace("<difficult>0", "<difficult>False"))
    assert found(tmp_path)["a"][0] == ("cat", [0.25, 5, 30, 24])


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
        ("<annotation>", '<?xml version="1.0" encoding="GBK"?><annotation>', " cannot be read (multi-byte"),
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
