"""Reading one COCO-format annotation file: checks it and turns it into Detectron2's dataset dicts.

Two kinds of fault, two answers:

* The file cannot mean what it says (not JSON, an undeclared category, a repeated id ...): one ValueError that
  names the file, the entry and what to do.
* A single box is unusable (NaN, no width, outside its image ...): it is left out, in training and
  evaluation alike, and one warning counts what was left out and names the first annotations.
"""

import json
import logging
import math
import os
import re
from collections import defaultdict
from dataclasses import dataclass
from typing import Any

from detectron2.structures import BoxMode
from detectron2.utils.logger import log_first_n

from detr_family.contents import told_by_head
from detr_family.data.images import ImageError, shown_size

CONFIG_KEY = "DATASETS.COCO_FORMAT"
CLIPPED = "partly outside the image (kept, clipped to it)"
# A box may reach this far over the border before it counts as wrong: annotation tools round to whole pixels.
_BORDER_TOLERANCE = 1.0
# Narrower boxes do not survive the rounding of float32, and Detectron2 would drop them without a word.
_LEAST_SIDE = 1e-3
# The most digits an image's side may have: sides of more are typing errors, and overflow later.
_MOST_PIXELS = 10**6
# From this share of boxes that reach outside on, they are taken for two corners.
_SHARE_OUTSIDE = 0.2
_NAMED_EXAMPLES = 5
_WHOLE = re.compile(r"-?(0|[1-9][0-9]{0,17})")  # in quotation marks; "007" may be the name of something


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


@dataclass(frozen=True)
class CocoScan:
    """What a COCO-format file holds, and what of it is left out.

    Attributes:
        records: one dataset dict for each image, see `read_coco_json`.
        faults: what is wrong with single boxes -> the annotations it is wrong with ("id 7", or their place in
            the list). All are left out but for the fault CLIPPED.
        num_annotations: entries of "annotations"; None where the file has no such list.
        repeated_ids: annotation ids that occur more than once, as texts.
        without_size: names of images whose entry has no width and height, and whose header was read.
        backslashes: file names with backslashes, as Windows has them, whose images were found with "/" in their place.
    """

    records: list[dict[str, Any]]
    faults: dict[str, list[str]]
    num_annotations: int | None
    repeated_ids: list[str]
    without_size: list[str]
    backslashes: list[str]

    @property
    def num_left_out(self) -> int:
        """Annotations that no record holds."""
        return sum(len(labels) for fault, labels in self.faults.items() if fault != CLIPPED)


def read_coco_json(json_file: str, image_root: str) -> list[dict[str, Any]]:
    """Reads and checks a COCO-format file without opening its images.

    Only an image entry without a usable width or height has its image's header read. Segmentations and
    keypoints are ignored; an annotation marked "ignore" counts as crowd. What is left out is counted in the log.

    Args:
        json_file: path of the annotation file.
        image_root: folder that the file names in it start from.

    Returns:
        One dict for each image, by ascending image id, with file_name, height, width, image_id (the file's
        own) and, if the file has annotations at all, annotations: dicts with bbox (x, y, width, height in
        pixels), bbox_mode, category_id (0-based class number), iscrowd (0 or 1) and area (square pixels).

    Raises:
        ValueError: the file is missing, is no COCO file, contradicts itself or has no images.
    """
    scan = scan_coco_json(json_file, image_root)
    _report(json_file, scan)
    return scan.records


def scan_coco_json(json_file: str, image_root: str) -> CocoScan:
    """`read_coco_json` for those who want to see what was left out, too; nothing is logged.

    Args:
        json_file: path of the annotation file.
        image_root: folder that the file names in it start from.

    Raises:
        ValueError: as read_coco_json.
    """
    data = _load(json_file)
    class_numbers = {category: number for number, category in enumerate(_categories(json_file, data))}
    records, without_size, backslashes = _images(json_file, image_root, data["images"])
    ordered = [records[image_id] for image_id in sorted(records)]
    annotations = data.get("annotations")
    if annotations is None:
        return CocoScan(ordered, {}, None, [], without_size, backslashes)
    if not isinstance(annotations, list):
        raise _fault(json_file, f'"annotations" is {_short(annotations)}', "It must be a list.")

    for record in ordered:
        record["annotations"] = []
    faults: dict[str, list[str]] = defaultdict(list)
    ids: dict[str, int] = defaultdict(int)
    for index, annotation in enumerate(annotations):
        if not isinstance(annotation, dict):
            raise _fault(json_file, f"annotations[{index}] is {_short(annotation)}", "It must be an object.")
        label = f"id {_short(annotation['id'])}" if "id" in annotation else f"annotations[{index}]"
        if "id" in annotation:
            ids[label] += 1
        image_id, category = _integer(annotation.get("image_id")), _integer(annotation.get("category_id"))
        if image_id is None or image_id not in records:
            raise _fault(
                json_file,
                f'annotation {label} has image_id {_short(annotation.get("image_id"))}, which no entry of "images" '
                "declares",
                "Add the image or remove the annotation.",
            )
        if category is None or category not in class_numbers:
            raise _fault(
                json_file,
                f'annotation {label} has category_id {_short(annotation.get("category_id"))}; declared in "categories" '
                f"are {_short(list(class_numbers))}",
                "Add the category or correct the annotation.",
            )
        crowd = [_flag(json_file, label, annotation, key) for key in ("iscrowd", "ignore")]
        record = records[image_id]
        box, fault = check_box(annotation.get("bbox"), record["width"], record["height"])
        if fault:
            faults[fault].append(label)
        if box is not None:
            record["annotations"].append(
                {
                    "bbox": box,
                    "bbox_mode": BoxMode.XYWH_ABS,
                    "category_id": class_numbers[category],
                    "iscrowd": int(any(crowd)),
                    "area": _area(annotation.get("area"), box, clipped=fault is not None),
                }
            )
    repeated = [label.removeprefix("id ") for label, count in ids.items() if count > 1]
    return CocoScan(ordered, dict(faults), len(annotations), repeated, without_size, backslashes)


def _flag(json_file: str, label: str, annotation: dict[str, Any], key: str) -> bool:
    """A mark that is 0 or 1; a "0" between quotation marks must not count as set."""
    value = annotation.get(key)
    value = {"0": 0, "1": 1}.get(value, value) if isinstance(value, str) else value
    if value is None or (isinstance(value, (bool, int, float)) and value in (0, 1)):
        return bool(value)
    raise _fault(json_file, f'annotation {label} has "{key}" {_short(annotation[key])}', "It must be 0 or 1.")


def printable(text: str) -> str:
    """Text that can be written anywhere: halves of surrogate pairs, which JSON may hold, are escaped."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def _fault(json_file: str, problem: str, remedy: str) -> ValueError:
    return ValueError(f"{json_file} (given in {CONFIG_KEY}): {problem}. {remedy}")


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 120 else text[:120] + " ..."


def _integer(value: object) -> int | None:
    """A whole number, which some exporters write as 1.0 or "1"; None for anything else."""
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, str) and _WHOLE.fullmatch(value):
        return int(value)
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def no_json(json_file: str, error: Exception) -> tuple[str, str]:
    """What is wrong with a file that cannot be read as JSON, and the remedy.

    Args:
        json_file: its path.
        error: what reading it raised.
    """
    if told := told_by_head(json_file, "the annotation file (.json)"):
        return f"the file is not JSON: it is {told[0]}", told[1]
    place, remedy = "", "Export it again in COCO format."
    if isinstance(error, json.JSONDecodeError):
        place = f", line {error.lineno}"
        if error.msg == "Extra data":
            remedy = "It holds more than one object, as one a line or two files in a row: COCO's format is one."
    elif isinstance(error, UnicodeDecodeError):
        remedy = "Save it as UTF-8."
    return f"the file is not JSON{place} ({error})", remedy


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
    except (ValueError, RecursionError) as error:  # not UTF-8, not JSON, numbers of thousands of digits, too deep
        raise _fault(json_file, *no_json(json_file, error)) from error
    if not isinstance(data, dict):
        raise _fault(
            json_file,
            f"the file holds a {type(data).__name__}, not a COCO dataset",
            'It must be an object with "images", "annotations" and "categories".',
        )
    for key in ("images", "categories"):
        entries = data.get(key)
        if not isinstance(entries, list):
            raise _fault(
                json_file,
                f'not a COCO dataset: "{key}" is {"missing" if entries is None else _short(entries)}',
                'A COCO file has the lists "images", "annotations" and "categories".',
            )
        for index, entry in enumerate(entries):
            if not isinstance(entry, dict):
                raise _fault(json_file, f"{key}[{index}] is {_short(entry)}", "It must be an object.")
    return data


def _unique_id(json_file: str, key: str, index: int, entry: dict[str, Any], known: dict[int, Any]) -> int:
    identifier = _integer(entry.get("id"))
    if identifier is None:
        raise _fault(
            json_file,
            f"{key}[{index}] has the id {_short(entry.get('id'))}",
            "Ids must be integers; renumber them here and in the annotations.",
        )
    if identifier in known:
        raise _fault(
            json_file,
            f"{key}[{index}] repeats the id {identifier}",
            f'Every entry of "{key}" needs an id of its own.',
        )
    return identifier


def _categories(json_file: str, data: dict[str, Any]) -> dict[int, str]:
    names: dict[int, str] = {}
    for index, entry in enumerate(data["categories"]):
        identifier = _unique_id(json_file, "categories", index, entry, names)
        if entry.get("name") in (None, ""):
            raise _fault(json_file, f"categories[{index}] (id {identifier}) has no name", "Give it one.")
        names[identifier] = printable(str(entry["name"]))
    if not names:
        raise _fault(json_file, '"categories" is empty', "List the classes there, each with id and name.")
    used = list(names.values())
    return {
        identifier: f"{names[identifier]} (id {identifier})" if used.count(names[identifier]) > 1 else names[identifier]
        for identifier in sorted(names)
    }


def _images(
    json_file: str, image_root: str, entries: list[dict[str, Any]]
) -> tuple[dict[int, dict[str, Any]], list[str], list[str]]:
    """Records by image id, names of those whose size came from the image, and of those found by other slashes."""
    records: dict[int, dict[str, Any]] = {}
    without_size: list[str] = []
    backslashes: list[str] = []
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
        if "\\" in name and not os.path.isfile(path):  # as Windows writes it
            slashed = os.path.join(image_root, name.replace("\\", "/"))
            if os.path.isfile(slashed):
                path = slashed
                backslashes.append(name)
        sides = [_side(entry.get(key)) for key in ("width", "height")]
        width, height = sides if all(sides) else _size_from_header(json_file, path)
        if not all(sides):
            without_size.append(path)
        if max(width, height) > _MOST_PIXELS:
            raise _fault(
                json_file,
                f"images[{index}] (id {identifier}) is {_short(width)} pixels wide and {_short(height)} high",
                "Correct its width and height.",
            )
        records[identifier] = {"file_name": path, "height": height, "width": width, "image_id": identifier}
    if not records:
        raise _fault(json_file, '"images" is empty: the dataset has no images', "Give a file with images.")
    return records, without_size, backslashes


def _side(value: object) -> int:
    """An image's width or height in pixels where the file gives a usable one (640.0 is), else 0."""
    return max(_integer(value) or 0, 0)


def _size_from_header(json_file: str, path: str) -> tuple[int, int]:
    try:
        return shown_size(path)
    except ImageError as error:
        raise _fault(
            json_file,
            f"the entry of {path} has no width and height, and the image cannot be read ({error.__cause__})",
            f"Add the two numbers, or correct the image or its folder in {CONFIG_KEY}.",
        ) from error


def check_box(value: object, width: int, height: int) -> tuple[list[float] | None, str | None]:
    """What can be used of a box.

    Args:
        value: should be x, y, width, height in pixels.
        width: the image's, pixels.
        height: the image's, pixels.

    Returns:
        The usable box, or None, and what was wrong with it, or None.
    """
    if isinstance(value, list):
        value = [_number(entry) for entry in value]
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
    if w < _LEAST_SIDE or h < _LEAST_SIDE:
        return None, f"less than {_LEAST_SIDE} pixel wide or high"
    left, top, right, bottom = max(x, 0.0), max(y, 0.0), min(x + w, float(width)), min(y + h, float(height))
    if right - left < _LEAST_SIDE or bottom - top < _LEAST_SIDE:
        return None, "outside the image"
    overhang = max(left - x, top - y, x + w - right, y + h - bottom)
    if overhang > _BORDER_TOLERANCE:
        return [left, top, right - left, bottom - top], CLIPPED
    return [x, y, w, h], None


def _number(value: object) -> object:
    """A number between quotation marks as one; everything else as it is."""
    if not isinstance(value, str):
        return value
    try:
        return float(value)
    except ValueError:
        return value


def _area(value: object, box: list[float], clipped: bool) -> float:
    """The object's own area where the file gives a usable one, else the box's.

    One of more than twice the box's is in another unit, or of the image before it was made smaller.
    """
    box_area = box[2] * box[3]
    most = 2 * box_area + 1
    if isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value <= most:
        return min(float(value), box_area) if clipped else float(value)
    return box_area


def corners_suspected(scan: CocoScan) -> str:
    """Where so many boxes reach outside their images that they seem to be corners: what to do; else empty."""
    outside = sum(len(labels) for fault, labels in scan.faults.items() if "outside" in fault)
    if not scan.num_annotations or outside < 5 or outside < _SHARE_OUTSIDE * scan.num_annotations:
        return ""
    return (
        f"{outside} of {scan.num_annotations} boxes reach outside their images: COCO's format has x, y, width, "
        "height, not two corners, and counts in the pixels of the image as it is shown"
    )


def _report(json_file: str, scan: CocoScan) -> None:
    if not scan.faults:
        return
    lines = [f"{json_file}: unusable boxes are left out, of {scan.num_annotations} annotations:"]
    for fault, labels in sorted(scan.faults.items()):
        examples = ", ".join(labels[:_NAMED_EXAMPLES]) + (", ..." if len(labels) > _NAMED_EXAMPLES else "")
        lines.append(f"  {len(labels)} {fault}: {examples}")
    if hint := corners_suspected(scan):
        lines.append(hint)
    # An evaluation reads its file anew each time; the same report once is enough.
    log_first_n(logging.WARNING, "\n".join(lines), name=__name__, key="message")
