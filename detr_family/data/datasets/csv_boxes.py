"""CSV files of boxes: one row for each box, columns by their names.

Case, spaces, hyphens and underscores in the names do not count. The image is `filename` (or image, image_path, path,
image_id ...), the class `class` (or label, class_name, name, category ...), the box xmin, ymin, xmax, ymax (or x1, y1,
x2, y2; or left, top, right, bottom), x, y, width, height, or x_center, y_center, width, height, in pixels, or all in
fractions of the image. An optional column `split` (or set) says train, val or test. Without a line of names, the six
columns are path, x1, y1, x2, y2, class. A row whose box and class are empty stands for an image without objects. Where
the columns are corners, `width` and `height` are the image's and not needed.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from detr_family.data.datasets.labelled import FolderDataset, LabelledBox, LabelledImage, Split, coco_split, read_lines
from detr_family.data.datasets.tree import Tree, some, split_of, split_of_path

FORMAT = "CSV"
_IMAGE = (
    *("filename", "file", "filepath", "image", "imagename", "imagepath", "imagefile", "imagefilename", "path", "img"),
    *("imgname", "imgpath", "imagefilepath", "imageid", "imgid"),
)
_CLASS = (
    *("class", "label", "classname", "name", "category", "labelname", "categoryname", "object", "classlabel"),
    *("species", "classid", "categoryid", "labelid"),
)
_SPLIT = ("split", "set", "subset")
_CORNERS = (
    ("xmin", "ymin", "xmax", "ymax"),
    ("x0", "y0", "x1", "y1"),
    ("x1", "y1", "x2", "y2"),
    ("left", "top", "right", "bottom"),
    ("xtl", "ytl", "xbr", "ybr"),
    ("minx", "miny", "maxx", "maxy"),
    ("bboxxmin", "bboxymin", "bboxxmax", "bboxymax"),
    ("bboxx1", "bboxy1", "bboxx2", "bboxy2"),
)
_SIDES = (("width", "height"), ("w", "h"), ("bboxwidth", "bboxheight"), ("bboxw", "bboxh"), ("boxwidth", "boxheight"))
_STARTS = (("x", "y"), ("left", "top"), ("xmin", "ymin"), ("bboxx", "bboxy"))
_CENTRES = (
    *(("xcenter", "ycenter"), ("xcentre", "ycentre"), ("centerx", "centery"), ("centrex", "centrey"), ("cx", "cy")),
    *(("xc", "yc"), ("bboxxcenter", "bboxycenter")),
)
_PLAIN = ("path", "x1", "y1", "x2", "y2", "class")
_NOTHING = {"", "nan", "none", "null"}  # as an empty cell is written
_ONLY_CLASS = "object"  # where no column has the class
_MOST_OF_FRACTIONS = 1.01  # no box of a dataset reaches farther


@dataclass(frozen=True)
class _Columns:
    """Where a file has what; `line` is that of the columns' names, 0 where there is none."""

    names: tuple[str, ...]
    line: int
    delimiter: str
    image: int
    label: int | None
    split: int | None
    box: tuple[int, int, int, int]
    kind: str  # of the box: "corners", "start" or "centre"


def find(tree: Tree) -> list[Path] | None:
    """The CSV files that have boxes."""
    files = [path for path in tree.with_suffix(".csv", depth=1) if _columns(path) is not None]
    return files or None


def read(tree: Tree, files: Sequence[Path]) -> FolderDataset:
    """Reads CSV files of boxes.

    Raises:
        ValueError: columns that are not known, a row of another number of columns, a box that is no four numbers, an
            image that is not here; with file and line.
    """
    boxes: dict[str, dict[Path, list[LabelledBox]]] = {}
    notes = []
    for file in files:
        columns = _columns(file)
        if columns is None:
            raise ValueError(unknown_columns(file))
        if columns.label is None:
            notes.append(f"{file.name} has no column for the class: all boxes are of the class {_ONLY_CLASS!r}")
        own = split_of(file.stem) or split_of_path(file.relative_to(tree.folder).parent)
        for split, image, box in _rows(tree, file, columns, own):
            found = boxes.setdefault(split or "train", {}).setdefault(image, [])
            if box is not None:
                found.append(box)
    every = [box for images in boxes.values() for found in images.values() for box in found]
    if not every:
        raise ValueError(f"{some(files)}: there is no box")
    classes = {str(box.label) for box in every}
    names = sorted(classes, key=lambda name: (int(name), name) if name.isdecimal() else (10**9, name))
    listed = {image for images in boxes.values() for image in images}
    fractions = max(max(box.corners) for box in every) <= _MOST_OF_FRACTIONS
    if fractions:
        notes.append("no number of a box is above 1: they are taken as fractions of the image's width and height")
    others = [image for image in tree.images if image not in listed]
    notes += [f"{len(others)} images are in no row and are left out: {some(others)}"] if others else []
    splits: dict[str, Split] = {}
    for split in ("train", "val", "test"):
        if split in boxes:
            images = [LabelledImage(path, found, fractions) for path, found in boxes[split].items()]
            splits[split] = coco_split(tree.folder, images, names)
    return FolderDataset(f"{FORMAT} ({some(file.name for file in files)})", tree.folder, splits, notes)


def unknown_columns(file: Path) -> str:
    """What to say of a CSV file that is none of boxes."""
    _, names, _ = _first(file)
    return (
        f"{file}:1: the columns are {some(names, 12) or 'none'}. Needed are one for the image (filename, image, path "
        "...), four for the box (xmin, ymin, xmax, ymax; x1, y1, x2, y2; x, y, width, height; x_center, y_center, "
        "width, height) and one for the class (class, label, name ...): rename them"
    )


def _first(file: Path) -> tuple[int, list[str], str]:
    """The first line that has something, with its number, cells and delimiter; Excel's "sep=;" is nothing."""
    with open(file, encoding="utf-8-sig", errors="replace", newline="") as stream:
        for number, line in enumerate(islice(stream, 1000), start=1):
            if line.strip(" \t\r\n,;") and not line.lower().startswith("sep="):
                delimiter = max(",;\t", key=line.count)
                return number, [cell.strip() for cell in next(csv.reader([line], delimiter=delimiter))], delimiter
    return 1, [], ","


def _columns(file: Path) -> _Columns | None:
    """Where the file has what; None where it has no boxes."""
    line, first, delimiter = _first(file)
    names = [re.sub(r"[\W_]+", "", name.lower()) for name in first]
    image, label, split = (_one(names, wanted) for wanted in (_IMAGE, _CLASS, _SPLIT))
    kinds = [("corners", corners) for corners in _CORNERS]
    kinds += [("centre", (*centre, *sides)) for centre in _CENTRES for sides in _SIDES]
    kinds += [("start", (*start, *sides)) for start in _STARTS for sides in _SIDES]
    for kind, columns in kinds:
        if image is not None and set(columns) <= set(names):
            x1, y1, x2, y2 = (names.index(column) for column in columns)
            return _Columns(tuple(first), line, delimiter, image, label, split, (x1, y1, x2, y2), kind)
    if len(first) == len(_PLAIN) and all(_number(cell, delimiter) or cell.lower() in _NOTHING for cell in first[1:5]):
        return _Columns(_PLAIN, 0, delimiter, 0, 5, None, (1, 2, 3, 4), "corners")
    return None


def _number(cell: str, delimiter: str) -> float | None:
    """A number, with a comma for its point where that does not part columns; None where it is none."""
    try:
        return float(cell if delimiter == "," else cell.replace(",", "."))
    except ValueError:
        return None


def _one(names: Sequence[str], wanted: Sequence[str]) -> int | None:
    return next((names.index(name) for name in wanted if name in names), None)


def _rows(
    tree: Tree, file: Path, columns: _Columns, own: str | None
) -> Iterator[tuple[str | None, Path, LabelledBox | None]]:
    """Split, image and box of each row; `own` is the split that the file's name speaks of."""
    found: dict[tuple[str | None, str], Path] = {}
    near: dict[str | None, list[Path]] = {None: []}
    for folder in sorted({image.parent for image in tree.images}):
        near.setdefault(split_of_path(folder.relative_to(tree.folder)), []).append(folder)
    lines = (f"{line}\n" for _, line in read_lines(file, strip=False))
    rows = csv.reader(lines, delimiter=columns.delimiter)
    for cells in rows:
        if not any(cell.strip() for cell in cells) or rows.line_num <= columns.line or cells[0].startswith("sep="):
            continue
        place = f"{file}:{rows.line_num}"
        while len(cells) > len(columns.names) and not cells[-1].strip():
            cells.pop()  # Excel's
        if len(cells) != len(columns.names):
            raise ValueError(f"{place}: {len(cells)} columns, not {len(columns.names)} ({', '.join(columns.names)})")
        row = [cell.strip() for cell in cells]
        name, said = row[columns.image], "" if columns.split is None else row[columns.split]
        split = split_of(said) or own
        if said and split_of(said) is None:
            raise ValueError(f"{place}: the split is {said!r}. It must be train, val or test, or empty.")
        if (split, name) not in found:
            found[split, name] = _image(tree, file, name, place, near.get(split, []) if split else [])
        yield split, found[split, name], _box(row, columns, place)


def _image(tree: Tree, file: Path, name: str, place: str, of_split: Sequence[Path]) -> Path:
    near = [file.parent, file.parent / "images", *of_split, tree.folder, tree.folder / "images"]
    try:
        image = tree.find(name, near) or (tree.find_stem(name, near) if name else None)
    except ValueError as error:
        raise ValueError(f"{place}: {error}") from error
    if image is None:
        raise ValueError(f"{place}: the image {name!r} is not here. Restore it or remove the row.")
    return image


def _box(row: Sequence[str], columns: _Columns, place: str) -> LabelledBox | None:
    cells = [row[column] for column in columns.box]
    label = _ONLY_CLASS if columns.label is None else row[columns.label]
    nothing = all(cell.lower() in _NOTHING for cell in cells)
    if nothing and (columns.label is None or label.lower() in _NOTHING):
        return None
    numbers = [_number(cell, columns.delimiter) for cell in cells]
    if None in numbers:
        named = ", ".join(columns.names[column] for column in columns.box)
        raise ValueError(f"{place}: {named} are {', '.join(map(repr, cells))}. They must be numbers of pixels.")
    if not label:
        raise ValueError(f"{place}: the box has no class")
    a, b, c, d = (float(number) for number in numbers if number is not None)
    if columns.kind == "start":
        return LabelledBox(label, (a, b, a + c, b + d))
    if columns.kind == "centre":
        return LabelledBox(label, (a - c / 2, b - d / 2, a + c / 2, b + d / 2))
    return LabelledBox(label, (a, b, c, d))
