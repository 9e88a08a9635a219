"""Overlapping tiles of images that are too large to look at whole, and datasets cut into such tiles."""

from __future__ import annotations

import hashlib
import math
import re
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from detr_family.data.datasets.labelled import Split
from detr_family.data.images import read_image

_JPEG = {".jpg", ".jpeg", ".jfif"}


def tiles(height: int, width: int, tile: int, overlap: float) -> list[tuple[int, int, int, int]]:
    """Tiles that cover an image, evenly spread, as x1, y1, x2, y2.

    Args:
        height: of the image, pixels.
        width: of the image, pixels.
        tile: side of a tile, pixels; one that is longer than the image is cut to it.
        overlap: share of a tile that its neighbour has, too, at least; in [0, 1).

    Raises:
        ValueError: a side below 1 or an overlap that cannot be.
    """
    if tile < 1:
        raise ValueError(f"the tile's side is {tile} pixels; it must be at least 1")
    if not 0 <= overlap < 1:
        raise ValueError(f"the tiles' overlap is {overlap}; it must be at least 0 and below 1")
    return [
        (x, y, x + min(tile, width), y + min(tile, height))
        for y in _starts(height, tile, overlap)
        for x in _starts(width, tile, overlap)
    ]


def _starts(length: int, tile: int, overlap: float) -> list[int]:
    if length <= tile:
        return [0]
    count = math.ceil((length - tile) / max(tile * (1 - overlap), 1)) + 1
    return [round(i * (length - tile) / (count - 1)) for i in range(count)]


@dataclass(frozen=True)
class TiledForm:
    """How a dataset is cut into tiles.

    Attributes:
        tile: side of a tile, pixels.
        overlap: share of a tile that its neighbour has, too, at least; in [0, 1).
        least_visible: the share of an object's box that must lie in a tile for the piece to be an object of it. A
            smaller piece is marked "ignore": neither trained on nor counted. In (0, 1].
        empty: share of the training set's tiles without an object that are kept; other sets keep all. In [0, 1].
    """

    tile: int
    overlap: float = 0.2
    least_visible: float = 0.3
    empty: float = 0.1

    def __post_init__(self) -> None:
        tiles(1, 1, self.tile, self.overlap)
        if not 0 < self.least_visible <= 1:
            raise ValueError(f"the least visible share of a box is {self.least_visible}; it lies above 0, up to 1")
        if not 0 <= self.empty <= 1:
            raise ValueError(f"the share of empty tiles that are kept is {self.empty}; it lies between 0 and 1")


def tiled_split(part: Split, name: str, output: Path, form: TiledForm) -> Split:
    """A split cut into tiles, which are written into `output`/`name`.

    A tile is named after its image, with its left and upper border: scans/a.png gives train/scans/a_0_640.png. JPEG
    stays JPEG, of quality 95; all else becomes PNG. Images have new ids, 1, 2, 3 ..., and say what they are of:
    `tile_of`, `tile_x`, `tile_y`. An image that is no larger than a tile is one tile. Masks and key points are left
    out. Which empty tiles are kept follows from their names alone.

    Args:
        part: what to cut.
        name: "train", "val" or "test".
        output: a folder.
        form: how.

    Returns:
        The tiles, in the images' order and in each from left to right, row by row.

    Raises:
        ImageError: an image cannot be read.
        ValueError: the set has no annotations, or two images would have tiles of one name.
    """
    if "annotations" not in part.content:
        raise ValueError(f"{part.image_root}: without annotations nothing can be cut into tiles for training")
    of_image: dict[Any, list[dict[str, Any]]] = defaultdict(list)
    for annotation in part.content["annotations"]:
        of_image[annotation["image_id"]].append(annotation)
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    stems: dict[str, str] = {}
    for entry in part.content["images"]:
        source = str(entry["file_name"])
        stem = _stem(source)
        if (other := stems.setdefault(stem.casefold(), source)) != source:
            raise ValueError(f"{other} and {source} would have tiles of the same names: rename one of them")
        pixels = read_image(str(Path(part.image_root, source)), "RGB")
        height, width = pixels.shape[:2]
        for x1, y1, x2, y2 in tiles(height, width, form.tile, form.overlap):
            inside = [
                piece
                for annotation in of_image[entry["id"]]
                if (piece := _piece(annotation, (x1, y1, x2, y2), (width, height), form.least_visible)) is not None
            ]
            suffix = ".jpg" if Path(source).suffix.lower() in _JPEG else ".png"
            file_name = f"{name}/{stem}_{x1}_{y1}{suffix}"
            there = any(not piece.get("ignore") and not piece.get("iscrowd") for piece in inside)
            if name == "train" and not there and not _drawn(file_name, form.empty):
                continue
            path = output / file_name
            path.parent.mkdir(parents=True, exist_ok=True)
            options: dict[str, Any] = {"quality": 95, "subsampling": 0} if suffix == ".jpg" else {}
            Image.fromarray(pixels[y1:y2, x1:x2]).save(path, **options)
            number = len(images) + 1
            images.append(
                {"id": number, "file_name": file_name, "width": x2 - x1, "height": y2 - y1,
                 "tile_of": source, "tile_x": x1, "tile_y": y1}
            )  # fmt: skip
            for piece in inside:
                annotations.append({**piece, "id": len(annotations) + 1, "image_id": number})
    return Split({**part.content, "images": images, "annotations": annotations}, str(output))


def _stem(source: str) -> str:
    """A file's name without suffix, below no other folder than its own: ../a/b.png is a/b, C:/a.png is C_/a."""
    parts = [part for part in source.replace("\\", "/").split("/") if part not in ("", ".", "..")]
    parts = [re.sub(r'[:*?"<>|]', "_", part) for part in parts]
    return "/".join([*parts[:-1], Path(parts[-1]).stem])


def _piece(
    annotation: dict[str, Any], tile: tuple[int, int, int, int], size: tuple[int, int], least: float
) -> dict[str, Any] | None:
    """What a tile sees of an object: its box cut to the tile, in the tile's pixels; None where it sees nothing."""
    x, y, width, height = (float(value) for value in annotation["bbox"])
    in_image = _cut((x, y, x + width, y + height), (0, 0, *size))
    x1, y1, x2, y2 = _cut(in_image, tile)
    if x2 <= x1 or y2 <= y1:
        return None
    kept = {
        key: value for key, value in annotation.items() if key not in ("segmentation", "keypoints", "num_keypoints")
    }
    kept["bbox"] = [x1 - tile[0], y1 - tile[1], x2 - x1, y2 - y1]
    whole = (in_image[2] - in_image[0]) * (in_image[3] - in_image[1])
    if (x2 - x1) * (y2 - y1) < whole:
        kept["area"] = (x2 - x1) * (y2 - y1)
        if (x2 - x1) * (y2 - y1) < least * whole and not annotation.get("iscrowd"):
            kept["ignore"] = 1
    return kept


def _cut(box: tuple[float, ...], to: tuple[float, ...]) -> tuple[float, ...]:
    return (max(box[0], to[0]), max(box[1], to[1]), min(box[2], to[2]), min(box[3], to[3]))


def _drawn(name: str, share: float) -> bool:
    number = int.from_bytes(hashlib.blake2b(name.encode("utf-8", "backslashreplace"), digest_size=8).digest(), "big")
    return number < share * 2**64
