"""What every format of labelled images is read into, and from there COCO's format.

Readers of YOLO's, Pascal VOC's and CSV files give `LabelledImage`s, by split; `coco_split` makes of each split what
a COCO annotation file holds. The formats are read by hand, not through the package supervision: it (0.31) takes one
flat pair of folders, knows neither lists of images nor splits, forgets VOC's mark of difficult objects, decodes every
image of a VOC set, and its errors name no line.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from detr_family.data.datasets.tree import some
from detr_family.data.images import usable_size


@dataclass(frozen=True)
class LabelledBox:
    """One object.

    Attributes:
        label: the class, by number or name.
        corners: x1, y1, x2, y2, in pixels or as fractions of the image's width and height.
        ignore: neither trained on nor counted in an evaluation.
    """

    label: int | str
    corners: tuple[float, float, float, float]
    ignore: bool = False


@dataclass(frozen=True)
class LabelledImage:
    """An image with its objects; `fractions` says that their corners are no pixels."""

    path: Path
    boxes: list[LabelledBox]
    fractions: bool = False


@dataclass(frozen=True)
class Split:
    """One split in COCO's format.

    Attributes:
        content: what a COCO annotation file holds.
        image_root: the folder that its file names start from.
        json_file: the file that holds just this, where there is one.
    """

    content: dict[str, Any]
    image_root: str
    json_file: str | None = None


@dataclass(frozen=True)
class FolderDataset:
    """A folder as it was recognised.

    Attributes:
        format: what it is, for people.
        folder: where it is.
        splits: by "train", "val" and "test", those that there are.
        notes: what a user should know of the reading, a line each.
    """

    format: str
    folder: Path
    splits: dict[str, Split]
    notes: list[str] = field(default_factory=list)

    def describe(self) -> list[str]:
        """What was recognised, in lines: splits with their counts, classes, notes."""
        first = next(iter(self.splits.values())).content
        names = [category.get("name") for category in first["categories"]]
        counts = [
            f"{split} {len(part.content['images'])} images, {_count(part.content.get('annotations'))} boxes"
            for split, part in self.splits.items()
        ]
        return [
            f"{self.folder}: {self.format}; {'; '.join(counts)}; {len(names)} classes: {some(names, 20)}",
            *self.notes,
        ]


def coco_split(folder: Path, images: Sequence[LabelledImage], class_names: Sequence[str]) -> Split:
    """A split in COCO's format. Image sizes are read from the files' headers, as the images are shown (EXIF).

    Args:
        folder: file names are relative to it, where the image is below it.
        images: in the order that ids are given in.
        class_names: by class number; category ids are class numbers + 1.

    Raises:
        ImageError: the header of an image cannot be read, or it has 16 bits a channel.
    """
    numbers = {name: number for number, name in enumerate(class_names)}
    entries: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    with ThreadPoolExecutor(8) as pool:
        sizes = list(pool.map(lambda image: usable_size(str(image.path)), images))
    for number, (image, (width, height)) in enumerate(zip(images, sizes, strict=True), start=1):
        path = image.path.relative_to(folder) if folder in image.path.parents else image.path.absolute()
        entries.append({"id": number, "file_name": path.as_posix(), "width": width, "height": height})
        for box in image.boxes:
            scale = (width, height, width, height) if image.fractions else (1, 1, 1, 1)
            x1, y1, x2, y2 = (value * factor for value, factor in zip(box.corners, scale, strict=True))
            label = box.label if isinstance(box.label, int) else numbers[box.label]
            annotation = {
                "id": len(annotations) + 1,
                "image_id": number,
                "category_id": label + 1,
                "bbox": [x1, y1, x2 - x1, y2 - y1],
                "area": (x2 - x1) * (y2 - y1),
                "iscrowd": 0,
            }
            annotations.append({**annotation, "ignore": 1} if box.ignore else annotation)
    categories = [{"id": number + 1, "name": name} for number, name in enumerate(class_names)]
    return Split({"info": {}, "images": entries, "annotations": annotations, "categories": categories}, str(folder))


def cut(split: Split, share: float, seed: int) -> tuple[Split, Split]:
    """Two parts of a split: without and with a share of its images.

    Which images those are follows from their names and the seed alone: an image that is added later moves few others.

    Args:
        split: at least two images.
        share: of the second part, between 0 and 1.
        seed: of the choice.

    Raises:
        ValueError: a share out of range, or fewer than two images.
    """
    images = split.content["images"]
    if not 0 < share < 1:
        raise ValueError(f"DATASETS.VAL_SHARE is {share}; a share lies between 0 and 1")
    if len(images) < 2:
        raise ValueError(f"{split.image_root} has {len(images)} images: none can be kept apart for the validation")

    def drawn(image: dict[str, Any]) -> bytes:
        return hashlib.blake2b(f"{seed}:{image.get('file_name')}".encode("utf-8", "backslashreplace")).digest()

    count = min(max(round(share * len(images)), 1), len(images) - 1)
    second = {_key(image.get("id")) for image in sorted(images, key=drawn)[:count]}
    parts = []
    for inside in (False, True):
        content = {
            **split.content,
            "images": [image for image in images if (_key(image.get("id")) in second) == inside],
        }
        if isinstance(entries := split.content.get("annotations"), list):
            content["annotations"] = [
                entry
                for entry in entries
                if (isinstance(entry, dict) and _key(entry.get("image_id")) in second) == inside
            ]
        parts.append(Split(content, split.image_root))
    return parts[0], parts[1]


def _count(entries: object) -> int:
    return len(entries) if isinstance(entries, list) else 0


def _key(identifier: object) -> object:
    """An id to look up; those that cannot be ids are told where the file that is written here is read."""
    return identifier if isinstance(identifier, (int, float, str)) else None


def read_lines(path: Path, strip: bool = True) -> list[tuple[int, str]]:
    """The lines of a text file, with their numbers from 1 on.

    Args:
        path: the file, in UTF-8.
        strip: leave out blank lines, and spaces around the others.

    Raises:
        ValueError: it cannot be read, or is not UTF-8.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text ({error}): save it again as UTF-8") from error
    lines = list(enumerate(text.splitlines(), start=1))
    return [(number, line.strip()) for number, line in lines if line.strip()] if strip else lines
