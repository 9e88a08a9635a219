"""Reading one COCO-format annotation file: checks it and turns it into Detectron2's dataset dicts.

Two kinds of fault, two answers:

* The file cannot mean what it says (not JSON, an undeclared category, a repeated id ...): one ValueError that
  names the file, the entry and what to do.
* A single box is unusable (NaN, no width, outside its picture ...): it is left out, in training and
  evaluation alike, and one warning counts what was left out and names the first annotations.
"""

import json
import logging
import math
import os
from collections import defaultdict
from typing import Any

from detectron2.structures import BoxMode
from detectron2.utils.logger import log_first_n
from PIL import Image

CONFIG_KEY = "DATASETS.COCO_FORMAT"
# A box may reach this far over the border before it counts as wrong: annotation tools round to whole pixels.
_BORDER_TOLERANCE = 1.0
_ORIENTATION_TAG = 0x0112
_NAMED_EXAMPLES = 5


def read_categories(json_file: str) -> dict[int, str]:
    """Category names of a COCO-format file, by the file's own ids in ascending order.

    The position in this order is the class number that the model sees. Names that occur twice get their id
    appended ("cell (id 4)"), so that results per class stay apart.

    Args:
        json_file: path of the annotation file.

    Raises:
        ValueError: the file is missing or is no COCO file, or its categories are unusable.
    """
    return _categories(json_file, _load(json_file))


def read_coco_json(json_file: str, image_root: str) -> list[dict[str, Any]]:
    """Reads and checks a COCO-format file without opening its pictures.

    Only an image entry without a usable width or height has its picture's header read. Segmentations and
    keypoints are ignored; an annotation marked "ignore" counts as crowd.

    Args:
        json_file: path of the annotation file.
        image_root: folder that the file names in it start from.

    Returns:
        One dict for each picture, by ascending image id, with file_name, height, width, image_id (the file's
        own) and, if the file has annotations at all, annotations: dicts with bbox (x, y, width, height in
        pixels), bbox_mode, category_id (0-based class number), iscrowd (0 or 1) and area (square pixels).

    Raises:
        ValueError: the file is missing, is no COCO file, contradicts itself or has no pictures.
    """
    data = _load(json_file)
    class_numbers = {category: number for number, category in enumerate(_categories(json_file, data))}
    records = _images(json_file, image_root, data["images"])
    annotations = data.get("annotations")
    if annotations is None:
        return [records[image_id] for image_id in sorted(records)]
    if not isinstance(annotations, list):
        raise _fault(json_file, f'"annotations" is {_short(annotations)}', "It must be a list.")

    for record in records.values():
        record["annotations"] = []
    faults: dict[str, list[str]] = defaultdict(list)
    for index, annotation in enumerate(annotations):
        if not isinstance(annotation, dict):
            raise _fault(json_file, f"annotations[{index}] is {_short(annotation)}", "It must be an object.")
        label = f"id {annotation['id']}" if "id" in annotation else f"annotations[{index}]"
        image_id, category = annotation.get("image_id"), annotation.get("category_id")
        if not _is_integer(image_id) or image_id not in records:
            raise _fault(
                json_file,
                f'annotation {label} has image_id {_short(image_id)}, which no entry of "images" declares',
                "Add the image or remove the annotation.",
            )
        if not _is_integer(category) or category not in class_numbers:
            raise _fault(
                json_file,
                f'annotation {label} has category_id {_short(category)}; declared in "categories" are '
                f"{_short(list(class_numbers))}",
                "Add the category or correct the annotation.",
            )
        record = records[image_id]
        box, fault = _check_box(annotation.get("bbox"), record["width"], record["height"])
        if fault:
            faults[fault].append(label)
        if box is not None:
            record["annotations"].append(
                {
                    "bbox": box,
                    "bbox_mode": BoxMode.XYWH_ABS,
                    "category_id": class_numbers[category],
                    "iscrowd": int(bool(annotation.get("iscrowd")) or bool(annotation.get("ignore"))),
                    "area": _area(annotation.get("area"), box, clipped=fault is not None),
                }
            )
    _report(json_file, faults, len(annotations))
    return [records[image_id] for image_id in sorted(records)]


def _fault(json_file: str, problem: str, remedy: str) -> ValueError:
    return ValueError(f"{json_file} (given in {CONFIG_KEY}): {problem}. {remedy}")


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 120 else text[:120] + " ..."


def _is_integer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _load(json_file: str) -> dict[str, Any]:
    """The file's top-level object, with "images" and "categories" known to be lists of objects."""
    try:
        with open(json_file, encoding="utf-8-sig") as file:
            data = json.load(file)
    except OSError as error:
        raise _fault(
            json_file,
            f"the annotation file cannot be read ({error.strerror})",
            f"Correct its path in {CONFIG_KEY}; a relative path starts from {os.getcwd()}.",
        ) from error
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise _fault(json_file, f"the file is not JSON ({error})", "Export it again in COCO format.") from error
    if not isinstance(data, dict):
        raise _fault(
            json_file,
            f"the file holds a {type(data).__name__}, not a COCO data set",
            'It must be an object with "images", "annotations" and "categories".',
        )
    for key in ("images", "categories"):
        entries = data.get(key)
        if not isinstance(entries, list):
            raise _fault(
                json_file,
                f'not a COCO data set: "{key}" is {"missing" if entries is None else _short(entries)}',
                'A COCO file has the lists "images", "annotations" and "categories".',
            )
        for index, entry in enumerate(entries):
            if not isinstance(entry, dict):
                raise _fault(json_file, f"{key}[{index}] is {_short(entry)}", "It must be an object.")
    return data


def _unique_id(json_file: str, key: str, index: int, entry: dict[str, Any], known: dict[int, Any]) -> int:
    identifier = entry.get("id")
    if not _is_integer(identifier):
        raise _fault(
            json_file,
            f"{key}[{index}] has the id {_short(identifier)}",
            "Ids must be integers; renumber them here and in the annotations.",
        )
    if identifier in known:
        raise _fault(
            json_file,
            f"{key}[{index}] repeats the id {identifier}",
            f'Every entry of "{key}" needs an id of its own.',
        )
    return int(identifier)  # type: ignore[arg-type]


def _categories(json_file: str, data: dict[str, Any]) -> dict[int, str]:
    names: dict[int, str] = {}
    for index, entry in enumerate(data["categories"]):
        identifier = _unique_id(json_file, "categories", index, entry, names)
        if entry.get("name") in (None, ""):
            raise _fault(json_file, f"categories[{index}] (id {identifier}) has no name", "Give it one.")
        names[identifier] = str(entry["name"])
    if not names:
        raise _fault(json_file, '"categories" is empty', "List the classes there, each with id and name.")
    used = list(names.values())
    return {
        identifier: f"{names[identifier]} (id {identifier})" if used.count(names[identifier]) > 1 else names[identifier]
        for identifier in sorted(names)
    }


def _images(json_file: str, image_root: str, entries: list[dict[str, Any]]) -> dict[int, dict[str, Any]]:
    records: dict[int, dict[str, Any]] = {}
    for index, entry in enumerate(entries):
        identifier = _unique_id(json_file, "images", index, entry, records)
        name = entry.get("file_name")
        if not isinstance(name, str) or not name:
            raise _fault(
                json_file,
                f"images[{index}] (id {identifier}) has the file_name {_short(name)}",
                f"It must be a path below {image_root}.",
            )
        path = os.path.join(image_root, name)
        size = entry.get("width"), entry.get("height")
        if not all(isinstance(side, int) and not isinstance(side, bool) and side > 0 for side in size):
            size = _size_from_header(json_file, path)
        width, height = size
        records[identifier] = {"file_name": path, "height": height, "width": width, "image_id": identifier}
    if not records:
        raise _fault(json_file, '"images" is empty: the data set has no pictures', "Give a file with pictures.")
    return records


def _size_from_header(json_file: str, path: str) -> tuple[int, int]:
    """Width and height as the picture is shown: turned by its EXIF orientation, as Detectron2 loads it."""
    try:
        with Image.open(path) as picture:
            width, height = picture.size
            turned = picture.getexif().get(_ORIENTATION_TAG, 1) in (5, 6, 7, 8)
    except Exception as error:  # whatever a damaged file makes the decoder raise
        raise _fault(
            json_file,
            f"the entry of {path} has no width and height, and the picture cannot be read ({error})",
            f"Add the two numbers, or correct the picture or its folder in {CONFIG_KEY}.",
        ) from error
    return (height, width) if turned else (width, height)


def _check_box(value: object, width: int, height: int) -> tuple[list[float] | None, str | None]:
    """The usable box, or None, and what was wrong with it, or None."""
    if not (
        isinstance(value, list)
        and len(value) == 4
        and all(isinstance(number, (int, float)) and not isinstance(number, bool) for number in value)
    ):
        return None, "missing or not four numbers"
    try:
        x, y, w, h = (float(number) for number in value)
    except OverflowError:
        x = y = w = h = math.inf
    if not all(math.isfinite(number) for number in (x, y, w, h, x + w, y + h)):
        return None, "not finite"
    if w <= 0 or h <= 0:
        return None, "zero or negative width or height"
    left, top, right, bottom = max(x, 0.0), max(y, 0.0), min(x + w, float(width)), min(y + h, float(height))
    if right <= left or bottom <= top:
        return None, "outside the picture"
    overhang = max(left - x, top - y, x + w - right, y + h - bottom)
    if overhang > _BORDER_TOLERANCE:
        return [left, top, right - left, bottom - top], "partly outside the picture (kept, clipped to it)"
    return [x, y, w, h], None


def _area(value: object, box: list[float], clipped: bool) -> float:
    """The object's own area where the file gives a usable one, else the box's."""
    box_area = box[2] * box[3]
    if isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < math.inf:
        return min(float(value), box_area) if clipped else float(value)
    return box_area


def _report(json_file: str, faults: dict[str, list[str]], total: int) -> None:
    if not faults:
        return
    lines = [f"{json_file}: unusable boxes are left out, of {total} annotations:"]
    for fault, labels in sorted(faults.items()):
        examples = ", ".join(labels[:_NAMED_EXAMPLES]) + (", ..." if len(labels) > _NAMED_EXAMPLES else "")
        lines.append(f"  {len(labels)} {fault}: {examples}")
    # An evaluation reads its file anew each time; the same report once is enough.
    log_first_n(logging.WARNING, "\n".join(lines), name=__name__, key="message")
