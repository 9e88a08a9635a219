"""YOLO's text files: data.yaml or classes.txt for the names, a line for each object, `labels/` beside `images/`.

As ultralytics reads them: `names` a list or a dict, `path:` in front of `train:`, `val:` and `test:`, each a folder, a
text file that lists images, or several of these; the label file of .../images/.../a.jpg is .../labels/.../a.txt, an
image without one has no objects. A line is `class x-centre y-centre width height`, or the class and a polygon, whose
bounding box is taken, or, with `kpt_shape:`, a box and its keypoints; all numbers are fractions of the image as shown.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from detr_family.data.datasets.labelled import FolderDataset, LabelledBox, LabelledImage, coco_split, read_lines
from detr_family.data.datasets.tree import Tree, plain, some, split_of_path

FORMAT = "YOLO"
_SPLITS = ("train", "val", "test")
_WORDS = {"val": "validation", "test": "test"}
_NAME_FILES = ("classes.txt", "obj.names", "_darknet.labels")
_KEY = re.compile(rb"""^(?:\xef\xbb\xbf)?[{"']*(?:names|nc)["']?[ \t]*:""", re.MULTILINE)
_FARTHEST = 2.0  # of a fraction from the image; beyond it, numbers are pixels
_NO_LABELS = {*_NAME_FILES, "train.txt", "val.txt", "valid.txt", "test.txt", "trainval.txt", "notes.txt"}


@dataclass(frozen=True)
class _Description:
    """What data.yaml or a file of names says: the names by class number, values by key, and the keys' lines."""

    file: Path
    names: list[str]
    values: dict[str, Any]
    lines: dict[str, int]

    def fault(self, key: str, problem: str, remedy: str) -> ValueError:
        return ValueError(f"{self.file}:{self.lines.get(key, 1)}: {problem}. {remedy}")


def find(tree: Tree) -> Path | None:
    """The file that describes a YOLO dataset: a YAML file with `names` or `nc`, else a list of names beside labels."""
    for path in sorted(tree.with_suffix(".yaml", ".yml", depth=1), key=lambda path: len(path.parts)):
        if _KEY.search(path.read_bytes()):  # by its text: where it is no YAML, reading it says what is wrong
            return path
    named = [path for path in tree.files if path.name.lower() in _NAME_FILES]
    return named[0] if named and len(tree.with_suffix(".txt")) > 1 else None


def read(tree: Tree, file: Path) -> FolderDataset:
    """Reads the dataset that `file` describes.

    Raises:
        ValueError: a split that is not there, a label line that cannot be, two images with one label file, no labels
            at all; with file and line. (A test split without labels is left out.)
    """
    described = _describe(file)
    _one_list_of_names(tree, described)
    notes: list[str] = []
    splits = {}
    for split, paths in _images(tree, described, notes).items():
        images: list[LabelledImage] = []
        used: dict[Path, Path] = {}
        labels = _Labels()
        for path in paths:
            label = labels.of(path)
            if label in used:
                raise ValueError(
                    f"{path} and {used[label]} share the label file {label}: rename one of the two, or remove it"
                )
            if label is not None:
                used[label] = path
            images.append(LabelledImage(path, [] if label is None else _boxes(label, described), fractions=True))
        unlabelled = [image.path for image, path in zip(images, paths, strict=True) if labels.of(path) is None]
        if len(unlabelled) == len(images) and split == "test":
            notes.append(f"test: none of the {len(images)} images has a label file: the split is left out")
            continue
        if len(unlabelled) == len(images):
            raise ValueError(
                f"{file}: none of the {len(images)} images of {split} has a label file; looked for "
                f"{labels.expected(images[0].path)} and so on: put the label files there"
            )
        if unlabelled:
            notes.append(
                f"{split}: {len(unlabelled)} images have no label file and count as images without objects: "
                f"{some(path.name for path in unlabelled)}"
            )
        if orphans := labels.unused(set(used)):
            notes.append(f"{split}: {len(orphans)} label files have no image and are left out: {some(orphans)}")
        splits[split] = coco_split(tree.folder, images, described.names)
    return FolderDataset(FORMAT, tree.folder, splits, notes)


def _parsed(file: Path) -> tuple[dict[str, Any], dict[str, Any], dict[str, int]]:
    """A YAML file's values by key, the same as they are written ("no" is a name, no falsehood), and the keys' lines.

    Raises:
        ValueError: it is no YAML, or no mapping.
    """
    text = "\n".join(line for _, line in read_lines(file, strip=False))
    try:
        values, written = (yaml.load(text, Loader=loader) for loader in (yaml.SafeLoader, yaml.BaseLoader))
        node = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f"{file}:{mark.line + 1}" if mark is not None else str(file)
        raise ValueError(f"{place}: the file is no YAML ({getattr(error, 'problem', error)}). Correct it.") from error
    if not isinstance(node, yaml.MappingNode):
        raise ValueError(f"{file}:1: the file is no mapping of keys. It has to have the key names, with the classes.")
    return values, written, {str(key.value): key.start_mark.line + 1 for key, _ in node.value}


def _describe(file: Path) -> _Description:
    if file.suffix.lower() not in (".yaml", ".yml"):
        return _Description(file, [line for _, line in read_lines(file)], {}, {})
    values, written, lines = _parsed(file)
    described = _Description(file, [], values, lines)
    names, count = written.get("names"), values.get("nc")
    if isinstance(names, dict):
        if sorted(names) != sorted(map(str, range(len(names)))):
            raise described.fault(
                "names", f"the class numbers are {some(names, 10)}", f"Number them from 0 to {len(names) - 1}."
            )
        names = [names[str(number)] for number in range(len(names))]
    if not names and isinstance(count, int):
        names = [f"class {number}" for number in range(count)]
    if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
        raise described.fault("names", f"names is {names!r}", "List the classes there.")
    if isinstance(count, int) and count != len(names):
        raise described.fault("nc", f"nc is {count}, but there are {len(names)} names", "Correct one of the two.")
    if len(set(names)) < len(names):
        raise described.fault("names", "a class name is there twice", "Give each class a name of its own.")
    return _Description(file, names, values, lines)


def _one_list_of_names(tree: Tree, described: _Description) -> None:
    """LabelImg writes classes.txt into every folder of labels: numbers must mean the same in all of them."""
    if described.values:
        return
    for path in tree.files:
        if path.name.lower() == described.file.name.lower() and path != described.file:
            names = [line for _, line in read_lines(path)]
            if names != described.names:
                raise ValueError(
                    f"{described.file} lists {some(described.names)}, but {path} lists {some(names)}: class numbers "
                    "must mean the same in all labels. Write a data.yaml with the names, or make the lists alike"
                )


def _images(tree: Tree, described: _Description, notes: list[str]) -> dict[str, list[Path]]:
    """Image files by split, as data.yaml says, else as the folders are called."""
    named: dict[str, list[Path]] = {}
    for path in tree.images:
        named.setdefault(split_of_path(path.relative_to(tree.folder).parent) or "train", []).append(path)
    splits = {}
    for split in _SPLITS:
        key = next((key for key in ((split, "valid") if split == "val" else (split,)) if described.values.get(key)), "")
        value = described.values.get(key)
        found: dict[Path, None] = {}
        try:
            for entry in value if isinstance(value, list) else [value] if value else []:
                found.update(dict.fromkeys(_entry(tree, described, key, str(entry), notes)))
            problem = f"{key} is {value!r}, where there is no image"
        except FileNotFoundError as error:
            problem = str(error)
            if found:  # of several folders one is missing
                raise described.fault(key, problem, "Correct the path.") from error
        if value and not found:
            # Exports name all three splits, also those that were not made; where a folder speaks of it, it was.
            if split == "train" or split in named:
                raise described.fault(key, problem, "Correct the path.")
            notes.append(f"{described.file}:{described.lines[key]}: {problem}: there is no {_WORDS[split]} split")
        if found:
            splits[split] = list(found)
    if splits:
        return splits
    if not named:
        raise ValueError(f"{tree.folder} has the labels of a YOLO dataset ({described.file.name}) but no image")
    return {split: named[split] for split in _SPLITS if split in named}


def _entry(tree: Tree, described: _Description, key: str, entry: str, notes: list[str]) -> list[Path]:
    """The images of one folder or list of a split.

    Raises:
        FileNotFoundError: there is no such folder or list.
        ValueError: the list names an image that is not here.
    """
    own = described.file.parent
    root = Path(str(described.values.get("path") or "").replace("\\", "/")).expanduser()
    entry = entry.replace("\\", "/")
    # Roboflow writes ../train/images and means train/images; `path:` may be that of another computer.
    tried = [own / root / entry, root / entry, own / entry, own / entry.removeprefix("../"), own.parent / root / entry]
    path = next((path for path in tried if path.exists()), None)
    elsewhere = re.match(r"/|[A-Za-z]:/", entry)
    if path is None and elsewhere:  # /content/cells/train/images of another computer, the longest end that is here
        parts = [part for part in entry.split("/") if part]
        path = next((p for i in range(1, len(parts)) if (p := own.joinpath(*parts[i:])).exists()), None)
        note = f"{described.file}: {key} is {entry!r}, which is not here; {path} is taken"
        notes.extend([note] if path is not None else [])
    if path is None:
        places = dict.fromkeys(str(place) for place in (tried[0], tried[2]))
        raise FileNotFoundError(f"{key} is {entry!r}, which is not at {' or '.join(places)}")
    if path == own / entry and path != tried[0] and not elsewhere:
        note = f"{described.file}: there is no {tried[0].parent}; the folders beside the file are taken"
        notes.extend([note] if note not in notes else [])
    if path.is_dir():
        inside = path.resolve()
        below = [image for image in tree.images if inside in image.resolve().parents]
        return below or Tree(path).images
    images = []
    for number, line in read_lines(path):
        image = tree.find(line, [path.parent, own / root, own, tree.folder])
        if image is None:
            raise ValueError(f"{path}:{number}: the image {line!r} is not here. Restore it or remove the line.")
        images.append(image)
    return images


class _Labels:
    """Label files by image, and those that belong to none."""

    def __init__(self) -> None:
        self._known: dict[Path, dict[str, Path]] = {}

    def of(self, image: Path) -> Path | None:
        """The label file of an image, whatever the case of its suffix and the composition of its letters."""
        for folder in self._folders(image):
            if folder not in self._known:
                files = sorted(folder.iterdir()) if folder.is_dir() else []
                texts = [path for path in files if path.suffix.lower() == ".txt"]
                self._known[folder] = {plain(p.stem): p for p in texts if p.name.lower() not in _NO_LABELS}
            if (path := self._known[folder].get(plain(image.stem))) is not None:
                return path
        return None

    def expected(self, image: Path) -> Path:
        """Where the label file of an image would be."""
        return next(self._folders(image)) / f"{image.stem}.txt"

    def unused(self, used: set[Path]) -> list[Path]:
        """Label files in the folders of those that were used, which no image asked for."""
        folders = {path.parent for path in used}
        return [path for folder in self._known if folder in folders for path in self._known[folder].values()
                if path not in used]  # fmt: skip

    @staticmethod
    def _folders(image: Path) -> Iterator[Path]:
        parts = image.parent.parts
        for i in reversed(range(len(parts))):
            if parts[i].lower() == "images":
                for name in ("labels", "Labels", "LABELS"):
                    yield Path(*parts[:i], name, *parts[i + 1 :])
                break
        yield image.parent
        yield image.parent.parent / "labels" / image.parent.name


def _boxes(file: Path, described: _Description) -> list[LabelledBox]:
    return [_box(f"{file}:{number}", line, described) for number, line in read_lines(file)]


def _box(place: str, line: str, described: _Description) -> LabelledBox:
    """One line of a label file."""
    try:
        values = [float(text) for text in line.split()]
    except ValueError as error:
        raise ValueError(f"{place}: {error}. A line has the class number and fractions of the image.") from error
    keypoints = described.values.get("kpt_shape")
    pose = isinstance(keypoints, list) and len(values) == 5 + math.prod(int(n) for n in keypoints)
    polygon = len(values) >= 7 and len(values) % 2 == 1 and not pose
    if len(values) != 5 and not polygon and not pose:
        raise ValueError(
            f"{place}: {len(values)} columns. A line has five (class, x-centre, y-centre, width, height), or the class "
            "and three or more points of a polygon."
        )
    number, rest = values[0], values[1:] if polygon else values[1:5]
    if number != int(number) or not 0 <= number < len(described.names):
        raise ValueError(
            f"{place}: class {number:g}, but {described.file} names {len(described.names)} classes, 0 to "
            f"{len(described.names) - 1}. Correct the number or add the name."
        )
    if not all(math.isfinite(value) for value in values) or max(map(abs, rest)) > _FARTHEST:
        raise ValueError(
            f"{place}: {line!r} is no box in fractions of the image's width and height. Divide pixels by the image's "
            "size."
        )
    if polygon:
        xs, ys = rest[::2], rest[1::2]
        return LabelledBox(int(number), (min(xs), min(ys), max(xs), max(ys)))
    x, y, w, h = rest
    return LabelledBox(int(number), (x - w / 2, y - h / 2, x + w / 2, y + h / 2))
