"""Pascal VOC's XML files: Annotations/ with JPEGImages/ and lists in ImageSets/Main, or XML beside images.

Corners are pixels from 1 on, as the VOC devkit and Detectron2 have them, unless a file of the dataset has one below 1:
then they are pixels from 0 on, as many tools write them. An object marked difficult is, as in VOC's evaluation, neither
trained on nor counted (`ignore` in COCO's terms). The image's size is taken from the image.
"""

from __future__ import annotations

import xml.sax
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from detr_family.data.datasets.labelled import FolderDataset, LabelledBox, LabelledImage, coco_split, read_lines
from detr_family.data.datasets.tree import IMAGE_SUFFIXES, Tree, plain, some, split_of, split_of_path

FORMAT = "Pascal VOC"
_CORNERS = ("xmin", "ymin", "xmax", "ymax")
_FLAGS = {"": False, "0": False, "false": False, "unspecified": False, "1": True, "true": True}


@dataclass
class _Object:
    line: int
    values: dict[str, tuple[str, int]] = field(default_factory=dict)  # text and line, by tag


@dataclass
class _Annotation:
    file: Path
    filename: str = ""
    objects: list[_Object] = field(default_factory=list)
    is_one: bool = False


class _Handler(xml.sax.ContentHandler):
    """Takes an annotation from XML together with line numbers, which ElementTree does not keep."""

    def __init__(self, file: Path) -> None:
        super().__init__()
        self.found = _Annotation(file)
        self._path: list[str] = []
        self._text = ""
        self._locator: xml.sax.xmlreader.Locator | None = None

    def setDocumentLocator(self, locator: xml.sax.xmlreader.Locator) -> None:
        """The parser's, which knows the line."""
        self._locator = locator

    def startElement(self, name: str, attrs: object) -> None:
        """Opens a tag."""
        self._path.append(name)
        self._text = ""
        self.found.is_one |= self._path == ["annotation"]
        if self._path == ["annotation", "object"]:
            self.found.objects.append(_Object(self._line()))

    def characters(self, content: str) -> None:
        """Collects text."""
        self._text += content

    def endElement(self, name: str) -> None:
        """Closes a tag: keeps the text of those that matter (not those of an object's parts)."""
        if self._path == ["annotation", "filename"]:
            self.found.filename = self._text.strip()
        wanted = (["annotation", "object"], ["annotation", "object", "bndbox"])
        if self._path[:-1] in wanted and self.found.objects:
            self.found.objects[-1].values[name] = self._text.strip(), self._line()
        self._path.pop()

    def _line(self) -> int:
        return int(self._locator.getLineNumber() or 0) if self._locator is not None else 0


def find(tree: Tree) -> list[Path] | None:
    """The XML files of a VOC dataset, where the first few are such."""
    files = tree.with_suffix(".xml")
    return files if files and any(_is_annotation(path) for path in files[:5]) else None


def _is_annotation(path: Path) -> bool:
    try:
        return _parse(path).is_one
    except ValueError:
        return b"<annotation" in path.read_bytes()[:4096]


def read(tree: Tree, files: list[Path]) -> FolderDataset:
    """Reads a VOC dataset.

    Raises:
        ValueError: XML that cannot be read, an object without name or corners, a listed name without image or XML
            file; with file and line.
    """
    notes: list[str] = []
    annotations = {path: _parse(path) for path in files}
    annotations = {path: found for path, found in annotations.items() if found.is_one}
    lists = _lists(tree)
    pairs = dict(_listed(tree, lists, annotations) if lists else _unlisted(tree, annotations, notes))
    first = 0 if any(_has_zero(annotations[path]) for part in pairs.values() for path, _ in part) else 1
    classes: set[str] = set()
    difficult = 0
    splits = {}
    for split, part in pairs.items():
        images = []
        for path, image in part:
            boxes = [_box(annotations[path], entry, first) for entry in annotations[path].objects]
            classes |= {str(box.label) for box in boxes}
            difficult += sum(box.ignore for box in boxes)
            images.append(LabelledImage(image, boxes))
        splits[split] = images
    if not classes:
        raise ValueError(f"{tree.folder}: the {len(annotations)} XML files have no object")
    notes.append(f"corners are taken as pixels from {first} on")
    if difficult:
        notes.append(f"{difficult} objects are marked difficult: they are neither trained on nor counted")
    names = sorted(classes)
    content = {split: coco_split(tree.folder, images, names) for split, images in splits.items()}
    return FolderDataset(FORMAT, tree.folder, content, notes)


def _parse(path: Path) -> _Annotation:
    handler = _Handler(path)
    try:
        xml.sax.parse(str(path), handler)
    except xml.sax.SAXParseException as error:
        raise ValueError(f"{path}:{error.getLineNumber()}: the file is no XML ({error.getMessage()})") from error
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error})") from error
    except (ValueError, LookupError) as error:  # of an encoding that the parser does not know
        raise ValueError(f"{path} cannot be read ({error}). Save it again as UTF-8.") from error
    return handler.found


def _lists(tree: Tree) -> dict[str, list[Path]]:
    """The lists of images by split, several where there are (VOC2007, VOC2012); lists of single classes are none."""
    lists: dict[str, list[Path]] = {}
    for path in tree.with_suffix(".txt"):
        if path.parent.name.lower() == "main" and path.parent.parent.name.lower() == "imagesets":
            lists.setdefault(path.stem.lower(), []).append(path)
    found: dict[str, list[Path]] = {split: lists[split] for split in ("train", "val", "test") if split in lists}
    if "train" not in found and "trainval" in lists:
        found = {"train": lists["trainval"], **{split: paths for split, paths in found.items() if split != "val"}}
    return found


def _listed(
    tree: Tree, lists: dict[str, list[Path]], annotations: dict[Path, _Annotation]
) -> Iterator[tuple[str, list[tuple[Path, Path]]]]:
    """XML files and images of the lists of each split."""
    by_stem: dict[str, list[Path]] = {}
    for path in annotations:
        by_stem.setdefault(plain(path.stem), []).append(path)
    for split, listings in lists.items():
        pairs = []
        for listing in listings:
            for number, line in read_lines(listing):
                file = _listed_file(by_stem, listing, line)
                if file is None:
                    raise ValueError(f"{listing}:{number}: {line!r} has no XML file. Restore it or remove the line.")
                image = _image(tree, annotations[file])
                if image is None:
                    raise ValueError(f"{listing}:{number}: {line!r} has no image. Restore it or remove the line.")
                pairs.append((file, image))
        if not pairs:
            raise ValueError(f"{some(listings)} lists no image")
        yield split, pairs


def _listed_file(by_stem: dict[str, list[Path]], listing: Path, line: str) -> Path | None:
    """The XML file of a line: a name, maybe with a suffix or a folder, or with VOC's mark 1, 0 or -1 after it."""
    names = [line]
    if len(words := line.rsplit(maxsplit=1)) == 2 and words[1] in ("-1", "0", "1"):
        names.append(words[0])
    for name in names:
        stem = plain(name).rpartition("/")[2]
        short, _, suffix = stem.rpartition(".")
        for wanted in (stem, short) if f".{suffix}" in {*IMAGE_SUFFIXES, ".xml"} else (stem,):
            found = by_stem.get(wanted, [])
            own = [path for path in found if listing.parent.parent.parent in path.parents]  # VOC2007/ImageSets/Main
            if len(own or found) > 1:
                raise ValueError(f"{listing}: {line!r} may mean any of {some(own or found)}: give them other names")
            if found:
                return (own or found)[0]
    return None


def _unlisted(
    tree: Tree, annotations: dict[Path, _Annotation], notes: list[str]
) -> Iterator[tuple[str, list[tuple[Path, Path]]]]:
    """XML files and images by the splits that their folders speak of."""
    pairs: dict[str, list[tuple[Path, Path]]] = {}
    missing, used = [], dict[Path, Path]()
    for path, found in annotations.items():
        image = _image(tree, found)
        if image is None:
            missing.append(path)
            continue
        if image in used:
            raise ValueError(f"{path} and {used[image]} are both of {image}: give each image one XML file")
        used[image] = path
        pairs.setdefault(split_of_path(path.relative_to(tree.folder).parent) or "train", []).append((path, image))
    if not pairs:
        raise ValueError(f"{tree.folder}: none of the {len(annotations)} XML files has an image, {missing[0]} first")
    if missing:
        notes.append(f"{len(missing)} XML files have no image and are left out: {some(missing)}")
    if unlabelled := [image for image in tree.images if image not in used]:
        notes.append(f"{len(unlabelled)} images have no XML file and are left out: {some(unlabelled)}")
    for split in ("train", "val", "test"):
        if split in pairs:
            yield split, pairs[split]


def _image(tree: Tree, found: _Annotation) -> Path | None:
    """The image of an XML file: what its name says, else the `filename` in it."""
    here, above = found.file.parent, found.file.parent.parent
    split = here.name if split_of(here.name) else ""
    near = [here, above / "JPEGImages", above / "images", above.parent / "images" / split, above.parent / "JPEGImages"]
    if found.filename:
        image = tree.find(found.filename, near)
        if image is not None and plain(image.stem) == plain(found.file.stem):
            return image
    try:
        image = tree.find_stem(found.file.stem, near)
    except ValueError as error:
        raise ValueError(f"{found.file}: {error}") from error
    return image or (tree.find(found.filename, near) if found.filename else None)


def _has_zero(found: _Annotation) -> bool:
    return any(_below_one(entry.values.get(tag, ("1", 0))[0]) for entry in found.objects for tag in _CORNERS[:2])


def _below_one(text: str) -> bool:
    try:
        return float(text) < 1
    except ValueError:
        return False  # told where the box is read


def _box(found: _Annotation, entry: _Object, first: int) -> LabelledBox:
    """An object of an XML file, its corners as pixels from 0 on."""
    corners = []
    for tag in _CORNERS:
        text, line = entry.values.get(tag, ("", entry.line))
        try:
            corners.append(float(text))
        except ValueError as error:
            problem = f"{tag} is {text!r}" if text else f"the object has no {tag}"
            raise ValueError(f"{found.file}:{line}: {problem}. It must be a number of pixels.") from error
    name, line = entry.values.get("name", ("", entry.line))
    if not name:
        raise ValueError(f"{found.file}:{line}: the object has no name. Give its class.")
    difficult, line = entry.values.get("difficult", ("0", entry.line))
    if difficult.lower() not in _FLAGS:
        raise ValueError(f"{found.file}:{line}: difficult is {difficult!r}. It must be 0 or 1.")
    x1, y1, x2, y2 = corners
    return LabelledBox(name, (x1 - first, y1 - first, x2, y2), ignore=_FLAGS[difficult.lower()])
