"""CSV files of boxes: one row for each box, columns by their names.

The image is `filename` (or image, image_path, path, file_name, image_id), the class `class` (or label, class_name,
name), the box xmin, ymin, xmax, ymax (or x1, y1, x2, y2; or x, y, width, height) in pixels; an optional column `split`
(or set) says train, val or test. Without a line of names, the six columns are path, x1, y1, x2, y2, class. A row whose
box and class are empty stands for an image without objects. Where the columns are corners, `width` and `height` are the
image's and not needed.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator, Sequence
from pathlib import Path

from detr_family.data.datasets.labelled import FolderDataset, LabelledBox, LabelledImage, Split, coco_split, read_lines
from detr_family.data.datasets.tree import Tree, some, split_of, split_of_path

FORMAT = "CSV"
_IMAGE = ("filename", "file_name", "image", "image_path", "path", "file", "image_id", "image_name")
_CLASS = ("class", "label", "class_name", "name", "category", "label_name")
_SPLIT = ("split", "set", "subset")
_BOXES = (
    ("xmin", "ymin", "xmax", "ymax"),
    ("x_min", "y_min", "x_max", "y_max"),
    ("x1", "y1", "x2", "y2"),
    ("x", "y", "width", "height"),
    ("x", "y", "w", "h"),
    ("bbox_x", "bbox_y", "bbox_width", "bbox_height"),
)
_PLAIN = ["path", "x1", "y1", "x2", "y2", "class"]


def find(tree: Tree) -> list[Path] | None:
    """The CSV files that have boxes."""
    files = [path for path in tree.with_suffix(".csv", depth=1) if _columns(path) is not None]
    return files or None


def read(tree: Tree, files: Sequence[Path]) -> FolderDataset:
    """Reads CSV files of boxes.

    Raises:
        ValueError: a row of another number of columns, a box that is no four numbers, an image that is not here; with
            file and line.
    """
    boxes: dict[str, dict[Path, list[LabelledBox]]] = {}
    for file in files:
        own = split_of(file.stem) or split_of_path(file.relative_to(tree.folder).parent)
        for split, image, box in _rows(tree, file):
            found = boxes.setdefault(split or own or "train", {}).setdefault(image, [])
            if box is not None:
                found.append(box)
    classes = {str(box.label) for images in boxes.values() for found in images.values() for box in found}
    if not classes:
        raise ValueError(f"{some(files)}: there is no box")
    names = sorted(classes, key=lambda name: (int(name), name) if name.isdigit() else (10**9, name))
    listed = {image for images in boxes.values() for image in images}
    others = [image for image in tree.images if image not in listed]
    notes = [f"{len(others)} images are in no row and are left out: {some(others)}"] if others else []
    splits: dict[str, Split] = {
        split: coco_split(tree.folder, [LabelledImage(path, found) for path, found in boxes[split].items()], names)
        for split in ("train", "val", "test")
        if split in boxes
    }
    return FolderDataset(f"{FORMAT} ({some(file.name for file in files)})", tree.folder, splits, notes)


def _columns(file: Path) -> tuple[list[str], bool] | None:
    """Names of the columns and whether the file has them in its first line; None where it has no boxes."""
    try:
        lines = read_lines(file)
    except ValueError:
        return None
    if not lines:
        return None
    first = next(csv.reader([lines[0][1]], delimiter=_delimiter(lines[0][1])))
    names = [name.strip().lower() for name in first]
    if _one(names, _IMAGE) and _one(names, _CLASS) and any(set(box) <= set(names) for box in _BOXES):
        return names, True
    if len(first) == 6 and all(text.strip().lstrip("-").replace(".", "", 1).isdigit() for text in first[1:5]):
        return _PLAIN, False
    return None


def _delimiter(line: str) -> str:
    return max(",;\t", key=line.count)


def _one(names: Sequence[str], wanted: Sequence[str]) -> str | None:
    return next((name for name in wanted if name in names), None)


def _rows(tree: Tree, file: Path) -> Iterator[tuple[str | None, Path, LabelledBox | None]]:
    """Split, image and box of each row."""
    known = _columns(file)
    assert known is not None
    names, headed = known
    image_column, class_column, split_column = (_one(names, wanted) for wanted in (_IMAGE, _CLASS, _SPLIT))
    box_columns = next(box for box in _BOXES if set(box) <= set(names))
    assert image_column and class_column
    found: dict[str, Path] = {}
    with open(file, encoding="utf-8-sig", newline="") as stream:
        delimiter = _delimiter(stream.readline())
        stream.seek(0)
        rows = csv.reader(stream, delimiter=delimiter)
        for cells in rows:
            if not any(cell.strip() for cell in cells) or (headed and rows.line_num == 1):
                continue
            place = f"{file}:{rows.line_num}"
            if len(cells) != len(names):
                raise ValueError(f"{place}: {len(cells)} columns, not {len(names)} ({', '.join(names)})")
            row = {name: cell.strip() for name, cell in zip(names, cells, strict=True)}
            name = row[image_column]
            if name not in found:
                found[name] = _image(tree, file, name, place)
            split = split_of(row[split_column]) if split_column else None
            numbers = [row[column] for column in box_columns]
            yield split, found[name], _box(numbers, row[class_column], box_columns, place)


def _image(tree: Tree, file: Path, name: str, place: str) -> Path:
    near = [file.parent, file.parent / "images", tree.folder, tree.folder / "images"]
    try:
        image = tree.find(name, near) or (tree.find_stem(name, near) if name else None)
    except ValueError as error:
        raise ValueError(f"{place}: {error}") from error
    if image is None:
        raise ValueError(f"{place}: the image {name!r} is not here. Restore it or remove the row.")
    return image


def _box(cells: Sequence[str], label: str, columns: Sequence[str], place: str) -> LabelledBox | None:
    if not any(cells) and not label:
        return None
    try:
        x1, y1, x2, y2 = (float(cell) for cell in cells)
    except ValueError as error:
        raise ValueError(
            f"{place}: {', '.join(columns)} are {', '.join(map(repr, cells))}. They must be numbers of pixels."
        ) from error
    if not label:
        raise ValueError(f"{place}: the box has no class")
    if columns[2] in ("width", "w", "bbox_width"):
        x2, y2 = x1 + x2, y1 + y2
    return LabelledBox(label, (x1, y1, x2, y2))
