"""A small generated dataset in COCO format: circles, squares and triangles on noisy backgrounds.

Meant for trying out a detector in minutes without downloading anything: objects of many sizes overlap, some
images are empty, and the category ids have holes as users' own often do. The same seed gives the same
images.
"""

import json
import math
import os
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from PIL import Image, ImageDraw
from tqdm import tqdm

CATEGORIES = ((1, "circle"), (3, "square"), (7, "triangle"))
_STAMP = "shapes.json"
_FORMAT = 1  # raise when the images of a seed change
_EMPTY = 0.05
_MOST_OBJECTS = 6
_SMALLEST, _LARGEST = 11.0, 0.55  # diameter: pixels, and share of the shorter side
_MOST_COVERED = 0.4  # share of the smaller of two boxes
_OVERSAMPLING = 4


@dataclass(frozen=True)
class _Recipe:
    num_train: int
    num_val: int
    size: tuple[int, int]
    seed: int
    format: int = _FORMAT


def write_shapes(
    root: str, num_train: int, num_val: int, size: tuple[int, int] = (96, 112), seed: int = 0
) -> list[tuple[str, str, str]]:
    """Writes the dataset, or finds it there from an earlier call with the same arguments.

    Layout: train.json, val.json, and the images as PNG in train/ and val/. A stamp written last marks the
    dataset complete, so that an interrupted call is redone.

    Args:
        root: the folder, made if missing.
        num_train: images to train on, at least 1.
        num_val: images to evaluate on, at least 1.
        size: least and greatest length of an image's side in pixels, each side drawn for itself.
        seed: of all that is random.

    Returns:
        Two entries for DATASETS.COCO_FORMAT with absolute paths, named shapes_train and shapes_val.

    Raises:
        ValueError: numbers out of range, or the folder holds another dataset.
    """
    recipe = _Recipe(num_train, num_val, (int(size[0]), int(size[1])), seed)
    if num_train < 1 or num_val < 1:
        raise ValueError(f"num_train {num_train} and num_val {num_val} must be at least 1.")
    if not 32 <= recipe.size[0] <= recipe.size[1]:
        raise ValueError(f"size {recipe.size} must be two lengths in pixels, the smaller first and at least 32.")
    if seed < 0:
        raise ValueError(f"seed {seed} must not be negative.")
    root = os.path.abspath(os.path.expanduser(root))
    entries = [
        (f"shapes_{split}", os.path.join(root, f"{split}.json"), os.path.join(root, split))
        for split in ("train", "val")
    ]
    stamp = os.path.join(root, _STAMP)
    wanted = json.loads(json.dumps({"complete": True, **asdict(recipe)}))
    found = _read_json(stamp)
    if found == wanted:
        return entries
    if found is None:
        for taken in (path for entry in entries for path in entry[1:] if os.path.exists(path)):
            raise ValueError(f"{taken} is there and was not made by this tool. Give another folder than {root}.")
    os.makedirs(root, exist_ok=True)
    _write_json(stamp, {**wanted, "complete": False})
    for split, ((_, json_file, folder), count) in enumerate(zip(entries, (num_train, num_val), strict=True)):
        _write_split(json_file, folder, count, recipe, split)
    _write_json(stamp, wanted)
    return entries


def draw_shapes(rng: np.random.Generator, size: tuple[int, int]) -> tuple[Image.Image, list[dict[str, Any]]]:
    """One image and its objects, from back to front.

    Args:
        rng: source of all that is random.
        size: least and greatest length of a side in pixels.

    Returns:
        The image (RGB) and for each object a dict with category_id, bbox (x, y, width, height in pixels,
        around the whole shape, also where another covers it) and area (square pixels of the whole shape).
    """
    width, height = (int(side) for side in rng.integers(size[0], size[1] + 1, 2))
    canvas = _background(rng, width, height)
    mean = canvas.mean(axis=(0, 1))
    objects: list[dict[str, Any]] = []
    count = 0 if rng.random() < _EMPTY else int(rng.integers(1, _MOST_OBJECTS + 1))
    for _ in range(count):
        category, name = CATEGORIES[int(rng.integers(len(CATEGORIES)))]
        diameter = math.exp(rng.uniform(math.log(_SMALLEST), math.log(_LARGEST * min(width, height))))
        outline = _outline(name, diameter, angle=rng.uniform(0, 2 * math.pi))
        extent = np.ptp(outline, axis=0)
        box = _place(rng, extent, (width, height), [known["bbox"] for known in objects])
        if box is None:
            continue
        outline = outline - outline.min(axis=0) + box[:2]
        colour = _far_from(rng, mean)
        left, top, right, bottom = (
            math.floor(box[0]),
            math.floor(box[1]),
            min(math.ceil(box[0] + box[2]), width),
            min(math.ceil(box[1] + box[3]), height),
        )
        mask = _mask(outline - (left, top), right - left, bottom - top)
        shade = colour + rng.uniform(-30, 30, 3) * np.linspace(-1, 1, bottom - top)[:, None, None]
        patch = canvas[top:bottom, left:right]
        patch += mask * (shade + rng.uniform(-8, 8, mask.shape) - patch)
        objects.append(
            {
                "category_id": category,
                "bbox": [round(float(value), 2) for value in box],
                "area": round(_polygon_area(outline), 2),
            }
        )
    return Image.fromarray(np.clip(np.rint(canvas), 0, 255).astype(np.uint8)), objects


def _write_split(json_file: str, folder: str, count: int, recipe: _Recipe, split: int) -> None:
    os.makedirs(folder, exist_ok=True)
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for index in tqdm(range(count), desc=f"drawing {os.path.basename(folder)} images", delay=2, mininterval=1):
        # A generator for each image: the first hundred are the same whatever the count.
        rng = np.random.Generator(np.random.PCG64(np.random.SeedSequence([recipe.seed, split, index])))
        image, objects = draw_shapes(rng, recipe.size)
        name = f"{index:06d}.png"
        image.save(os.path.join(folder, name), compress_level=1)
        images.append({"id": index + 1, "file_name": name, "width": image.width, "height": image.height})
        for known in objects:
            annotations.append({"id": len(annotations) + 1, "image_id": index + 1, "iscrowd": 0, **known})
    categories = [{"id": identifier, "name": name} for identifier, name in CATEGORIES]
    _write_json(json_file, {"images": images, "annotations": annotations, "categories": categories})


def _background(rng: np.random.Generator, width: int, height: int) -> np.ndarray:
    """A colour gradient in a random direction with coarse blotches and fine noise: (height, width, 3)."""
    first, second = rng.uniform(30, 225, (2, 3))
    angle = rng.uniform(0, 2 * math.pi)
    across = np.linspace(-0.5, 0.5, width)[None, :] * math.cos(angle)
    down = np.linspace(-0.5, 0.5, height)[:, None] * math.sin(angle)
    share = np.clip(across + down + 0.5, 0, 1)[..., None]
    blotches = Image.fromarray(rng.integers(0, 256, (9, 9), dtype=np.uint8)).resize(
        (width, height), Image.Resampling.BICUBIC
    )
    noise = rng.uniform(-14, 14, (height, width, 3))
    return first * (1 - share) + second * share + (np.asarray(blotches)[..., None] - 128.0) * 0.2 + noise


def _far_from(rng: np.random.Generator, colour: np.ndarray) -> np.ndarray:
    """A random colour that stands out from another one: (3,) floats."""
    candidates = rng.uniform(0, 255, (6, 3))
    return candidates[np.abs(candidates - colour).sum(axis=1).argmax()]


def _outline(name: str, diameter: float, angle: float) -> np.ndarray:
    """A regular polygon around the origin, turned by the angle in radians: (corners, 2) as x, y in pixels."""
    corners = {"circle": 72, "square": 4, "triangle": 3}[name]
    turns = angle + 2 * math.pi * np.arange(corners) / corners
    return diameter / 2 * np.stack([np.cos(turns), np.sin(turns)], axis=1)


def _place(
    rng: np.random.Generator, extent: np.ndarray, image: tuple[int, int], taken: list[list[float]]
) -> tuple[float, float, float, float] | None:
    """A box (x, y, width, height) inside the image that covers no other too much; None if none is found."""
    width, height = float(extent[0]), float(extent[1])
    for _ in range(20):
        x, y = rng.uniform(0, image[0] - width), rng.uniform(0, image[1] - height)
        for left, top, other_width, other_height in taken:
            across = min(x + width, left + other_width) - max(x, left)
            down = min(y + height, top + other_height) - max(y, top)
            smaller = min(width * height, other_width * other_height)
            if max(across, 0.0) * max(down, 0.0) > _MOST_COVERED * smaller:
                break
        else:
            return float(x), float(y), width, height
    return None


def _mask(outline: np.ndarray, width: int, height: int) -> np.ndarray:
    """How much of each pixel the shape covers: (height, width, 1) floats in [0, 1]."""
    large = Image.new("L", (width * _OVERSAMPLING, height * _OVERSAMPLING))
    # ImageDraw counts pixel centres, the outline pixel borders: half a pixel apart.
    ImageDraw.Draw(large).polygon([tuple(point) for point in outline * _OVERSAMPLING - 0.5], fill=255)
    return np.asarray(large.reduce(_OVERSAMPLING), dtype=np.float64)[..., None] / 255


def _polygon_area(outline: np.ndarray) -> float:
    x, y = outline.T
    return abs(float(x @ np.roll(y, -1) - y @ np.roll(x, -1))) / 2


def _read_json(path: str) -> object:
    try:
        with open(path, encoding="utf-8") as file:
            return json.load(file)
    except (OSError, ValueError):
        return None


def _write_json(path: str, value: object) -> None:
    """Writes a file whole or not at all."""
    with open(path + ".tmp", "w", encoding="utf-8") as file:
        json.dump(value, file)
    os.replace(path + ".tmp", path)
