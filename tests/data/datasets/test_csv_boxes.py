"""CSV files of boxes: what is recognised, and what a fault in one is called."""

from __future__ import annotations

from pathlib import Path

import pytest
from folders import csv_file, expected, fault, found, image

from detr_family.data.datasets.folder import read_folder


@pytest.mark.parametrize(
    "header",
    [
        *(
            "filename,xmin,ymin,xmax,ymax,class",
            "Image_Path,x1,y1,x2,y2,Label",
            "image_id,x_min,y_min,x_max,y_max,name",
        ),
        *("\n\nImage Name,X Min,Y-Min,XMAX,y max,Class Name", "img,left,top,right,bottom,category"),
    ],
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
    text = (tmp_path / "sized" / "boxes.csv").read_text().replace("valid", "one")
    (tmp_path / "sized" / "boxes.csv").write_text(text)
    assert "boxes.csv:4: the split is 'one'" in fault(tmp_path / "sized")
    # As Roboflow exports it: width and height are the image's.
    for split in ("train", "valid"):
        csv_file(tmp_path / "roboflow" / split, name="_annotations.csv")
        rows = "filename,width,height,class,xmin,ymin,xmax,ymax\nb.jpg,40,60,dog,5,6,25,46\n"
        (tmp_path / "roboflow" / split / "_annotations.csv").write_text(rows)
    assert found(tmp_path / "roboflow") == found(tmp_path / "roboflow", "val") == expected("b")


def csv_of(folder: Path, text: str, encoding: str = "utf-8") -> Path:
    csv_file(folder)
    (folder / "boxes.csv").write_bytes(text.encode(encoding))
    return folder


def test_csv_of_centres_of_fractions_and_without_a_class(tmp_path: Path) -> None:
    for sides in ("width,height", "w,h"):
        text = f"label,image,x_center,y_center,{sides}\ncat,a.jpg,20,14,20,20\ndog,a,45.5,20,10,20\n"
        assert found(csv_of(tmp_path, text)) == expected("a")
    text = "label;image;xmin;ymin;xmax;ymax\ncat;a.jpg;0,5;0,25;1;0,75\n"
    assert found(csv_of(tmp_path, "sep=;\n" + text, "utf-8-sig")) == {"a": [("cat", [30, 10, 60, 30])]}
    assert "they are taken as fractions" in read_folder(tmp_path).notes[0]
    assert found(csv_of(tmp_path, ",image,x,y,w,h\n0,b,1,2,3,4\n1,c,nan,nan,nan,nan\n")) == {
        "b": [("object", [1, 2, 4, 6])], "c": []
    }  # fmt: skip
    rows = "c.jpg,,,,,\nD:\\me\\a.jpg,10,4,30,24,cat\n/home/me/a.JPG,40.5,10,50.5,30,dog,,\n"
    assert found(csv_of(tmp_path, rows)) == expected("ca")


def test_csv_of_two_splits_with_the_same_names_of_images(tmp_path: Path) -> None:
    for split in ("train", "test"):
        image(tmp_path / split / "a.jpg", "a")
        (tmp_path / f"{split}_labels.csv").write_text("filename,xmin,ymin,xmax,ymax,class\na.jpg,1,2,3,4,cat\n")
    read = read_folder(tmp_path)
    assert {s: [e["file_name"] for e in part.content["images"]] for s, part in read.splits.items()} == {
        "train": ["train/a.jpg"], "test": ["test/a.jpg"]
    }  # fmt: skip
    (tmp_path / "test_labels.csv").unlink()
    (tmp_path / "train_labels.csv").rename(tmp_path / "labels.csv")
    assert "labels.csv:2: 'a.jpg' may mean any of 2 images" in fault(tmp_path)


def test_csv_files_that_cannot_be_read_say_why(tmp_path: Path) -> None:
    csv_of(tmp_path, "bild,links,oben,rechts,unten\na.jpg,1,2,3,4\n")
    for given in (tmp_path, tmp_path / "boxes.csv"):
        assert "boxes.csv:1: the columns are bild, links, oben, rechts, unten. Needed are" in fault(given)
    csv_of(tmp_path, "")
    assert "boxes.csv:1: the columns are none" in fault(tmp_path / "boxes.csv")
    for encoding in ("cp1252", "utf-16"):
        csv_of(tmp_path, "filename,xmin,ymin,xmax,ymax,class\na.jpg,1,2,3,4,B\u00e4r\n", encoding)
        assert "boxes.csv is not UTF-8 text" in fault(tmp_path / "boxes.csv")


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ("a.jpg,1,2,3,cat", ":7: 5 columns, not 6"),
        ("a.jpg,1,2,x,4,cat", ":7: xmin, ymin, xmax, ymax are '1', '2', 'x', '4'"),
        ("none.jpg,1,2,3,4,cat", ":7: the image 'none.jpg' is not here"),
        ("a.jpg,1,2,3,4,", ":7: the box has no class"),
        ("a.jpg,,,,,cat", ":7: xmin, ymin, xmax, ymax are '', '', '', ''"),
    ],
)
def test_faults_of_csv_rows_name_file_and_line(tmp_path: Path, row: str, said: str) -> None:
    path = csv_file(tmp_path) / "boxes.csv"
    path.write_text(path.read_text().rstrip() + "\n\n" + row + "\n")
    assert f"{path}{said}" in fault(tmp_path)
