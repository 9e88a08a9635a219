"""Small made-up datasets in the formats that a folder may have: three images, two classes, the same boxes in each.

a (60x40): "cat" 10, 4, 30, 24 and "dog" 40.5, 10, 50.5, 30; b (40x60 as it is shown, turned by EXIF): "dog" 5, 6, 25,
46; c (20x20): no object.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

NAMES = ["cat", "dog"]
SIZES = {"a": (60, 40), "b": (40, 60), "c": (20, 20)}
BOXES = {"a": [(0, 10, 4, 30, 24), (1, 40.5, 10, 50.5, 30)], "b": [(1, 5, 6, 25, 46)], "c": []}


def image(path: Path, stem: str = "c") -> Path:
    """An image file; that of b is stored lying and shown standing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    width, height = SIZES.get(stem, (20, 20))
    exif = Image.Exif()
    if stem == "b":
        exif[0x0112], width, height = 6, height, width
    Image.new("RGB", (width, height), "grey").save(path, exif=exif)
    return path


def yolo_lines(stem: str) -> str:
    width, height = SIZES[stem]
    return "".join(
        f"{n} {(x1 + x2) / 2 / width} {(y1 + y2) / 2 / height} {(x2 - x1) / width} {(y2 - y1) / height}\n"
        for n, x1, y1, x2, y2 in BOXES[stem]
    )


def yolo(folder: Path, outer: str = "images", splits: dict[str, str] | None = None, yaml: str | None = None) -> Path:
    """data.yaml, images and labels; `outer` "images": images/train, else train/images. c's label file is empty."""
    splits = splits or {"train": "ab", "val": "c"}
    for split, stems in splits.items():
        for stem in stems:
            parts = ("images", split) if outer == "images" else (split, "images")
            image(Path(folder, *parts, f"{stem}.jpg"), stem)
            if stem in BOXES:
                label = Path(folder, *("labels" if part == "images" else part for part in parts), f"{stem}.txt")
                label.parent.mkdir(parents=True, exist_ok=True)
                label.write_text(yolo_lines(stem))
    keys = "".join(f"{s}: images/{s}\n" if outer == "images" else f"{s}: {s}/images\n" for s in splits)
    (folder / "data.yaml").write_text((f"names: {NAMES}\nnc: 2\n" + keys) if yaml is None else yaml)
    return folder


def voc_xml(stem: str, first: int = 1, filename: str | None = None, difficult: int = 0) -> str:
    objects = "".join(
        f"  <object>\n    <name>{NAMES[n]}</name>\n    <difficult>{difficult}</difficult>\n    <bndbox>"
        f"<xmin>{x1 + first}</xmin><ymin>{y1 + first}</ymin><xmax>{x2}</xmax><ymax>{y2}</ymax></bndbox>\n"
        "    <part><name>head</name><bndbox><xmin>1</xmin></bndbox></part>\n  </object>\n"
        for n, x1, y1, x2, y2 in BOXES[stem]
    )
    return f"<annotation>\n  <filename>{filename or stem + '.jpg'}</filename>\n{objects}</annotation>\n"


def voc(folder: Path, splits: dict[str, str] | None = None) -> Path:
    """Annotations/, JPEGImages/ and ImageSets/Main."""
    for name in ("Annotations", "ImageSets/Main"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    for split, stems in (splits or {"train": "ab", "val": "c"}).items():
        (folder / "ImageSets" / "Main" / f"{split}.txt").write_text("\n".join(stems) + "\n")
        (folder / "ImageSets" / "Main" / f"cat_{split}.txt").write_text("\n".join(f"{s} -1" for s in stems) + "\n")
        for stem in stems:
            image(folder / "JPEGImages" / f"{stem}.jpg", stem)
            (folder / "Annotations" / f"{stem}.xml").write_text(voc_xml(stem))
    return folder


def csv_file(folder: Path, header: str = "filename,xmin,ymin,xmax,ymax,class", name: str = "boxes.csv") -> Path:
    """boxes.csv beside the images; c has an empty row."""
    rows = [f"{s}.jpg,{x1},{y1},{x2},{y2},{NAMES[n]}" for s in "abc" for n, x1, y1, x2, y2 in BOXES[s]]
    for stem in "abc":
        image(folder / f"{stem}.jpg", stem)
    (folder / name).write_text("\n".join([*([header] if header else []), *rows, "c.jpg,,,,,"]) + "\n")
    return folder


def coco(path: Path, names: dict[str, str], categories: list[dict[str, object]] | None = None, offset: int = 1) -> None:
    """A COCO annotation file of images by stem, with the names that it has for them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    images = [
        {"id": number, "file_name": name, "width": SIZES[stem][0], "height": SIZES[stem][1]}
        for number, (stem, name) in enumerate(names.items())
    ]
    annotations = [
        {"image_id": number, "category_id": n + offset, "bbox": [x1, y1, x2 - x1, y2 - y1], "iscrowd": 0}
        for number, stem in enumerate(names)
        for n, x1, y1, x2, y2 in BOXES[stem]
    ]
    annotations = [{"id": number, **entry} for number, entry in enumerate(annotations, start=1)]
    categories = categories or [{"id": n + offset, "name": name} for n, name in enumerate(NAMES)]
    path.write_text(json.dumps({"images": images, "annotations": annotations, "categories": categories}))


def found(folder: Path, split: str = "train") -> dict[str, list[tuple[str, list[float]]]]:
    """What is read: by image stem, class names and boxes as corners."""
    from detr_family.data.datasets.folder import read_folder

    content = read_folder(folder).splits[split].content
    names = {entry["id"]: entry["name"] for entry in content["categories"]}
    result: dict[str, list[tuple[str, list[float]]]] = {
        Path(str(entry["file_name"])).stem: [] for entry in content["images"]
    }
    stems = {entry["id"]: Path(str(entry["file_name"])).stem for entry in content["images"]}
    for entry in content["annotations"]:
        x, y, w, h = entry["bbox"]
        corners = [round(value, 3) for value in (x, y, x + w, y + h)]
        result[stems[entry["image_id"]]].append((names[entry["category_id"]], corners))
    return result


def expected(stems: str) -> dict[str, list[tuple[str, list[float]]]]:
    """What `found` is to give."""
    return {stem: [(NAMES[n], list(corners)) for n, *corners in BOXES[stem]] for stem in stems}


def fault(folder: Path) -> str:
    """What is said of a folder that cannot be read."""
    from detr_family.data.datasets.folder import read_folder

    with pytest.raises(ValueError) as caught:
        read_folder(folder)
    return str(caught.value)
