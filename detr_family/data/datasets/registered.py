"""Datasets that a user registers in Python (`DatasetCatalog.register`): their records, checked before a training."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from detectron2.structures import BoxMode

_MODES = (BoxMode.XYXY_ABS, BoxMode.XYWH_ABS)
_DESCRIBED = "see Detectron2's description of dataset dicts"


def check_records(name: str, records: Any, num_classes: int, *, evaluated: bool) -> None:
    """Whether records are what training and COCO's evaluation take.

    Args:
        name: of the dataset.
        records: what the registered function gives.
        num_classes: that the metadata names; 0 where it does not.
        evaluated: by COCO's protocol, which needs ids and sizes of images.

    Raises:
        ValueError: they are not; with the place of the first that is at fault.
    """
    whose = f"the function that DatasetCatalog has for {name!r}"
    if not hasattr(records, "__len__") or not hasattr(records, "__getitem__"):
        raise ValueError(f"{whose} gives a {type(records).__name__}: it must return a list of dicts.")
    if not len(records):
        raise ValueError(f"{whose} gives an empty list: there are no images.")
    for i, record in enumerate(records):
        if not isinstance(record, Mapping):
            raise ValueError(f"{whose} gives a {type(record).__name__} at place {i}, not a dict: {_DESCRIBED}.")
        wrong = _wrong_image(record) if evaluated else ""
        if not wrong:
            found = (_wrong_annotation(x, num_classes) for x in record.get("annotations", ()))
            wrong = next((x for x in found if x), "")
        if wrong:
            file = os.fspath(record.get("file_name", "no file_name"))
            raise ValueError(f"{whose} gives at place {i} ({file}) {wrong}.")
    if evaluated:
        _check_ids(whose, (record["image_id"] for record in records))


def _wrong_image(record: Mapping[str, Any]) -> str:
    lacks = [key for key in ("image_id", "height", "width") if record.get(key) is None]
    if lacks:
        return f"no {' and no '.join(lacks)}, which COCO's evaluation needs: {_DESCRIBED}"
    identifier = record["image_id"]
    if not isinstance(identifier, (int, str)):
        kind = type(identifier).__name__
        return f"the image_id {identifier!r}, a {kind}, which no file of results can hold: int(...) or str(...) of it"
    return ""


def _wrong_annotation(annotation: Mapping[str, Any], num_classes: int) -> str:
    box, mode = annotation.get("bbox"), annotation.get("bbox_mode")
    if box is None or mode is None:
        lacks = "bbox" if box is None else "bbox_mode"
        return f"an annotation without {lacks}: [x0, y0, x1, y1] goes with BoxMode.XYXY_ABS, [x, y, w, h] with XYWH_ABS"
    if mode not in _MODES or len(box) != 4:
        shown = mode.name if isinstance(mode, BoxMode) else repr(mode)
        return (
            f"a box of {len(box)} numbers in the mode {shown}: boxes are upright, in pixels, XYXY_ABS or XYWH_ABS; "
            "BoxMode.convert turns rotated ones, and relative ones are to be multiplied with width and height"
        )
    number = annotation.get("category_id")
    if number is None or int(number) != number or number < 0 or (num_classes and number >= num_classes):
        known = f"0 to {num_classes - 1}, as thing_classes has {num_classes} names" if num_classes else "from 0"
        return f"an annotation of category_id {number!r}: here it is the class's number, {known}"
    return ""


def _check_ids(whose: str, identifiers: Iterable[int | str]) -> None:
    (identifier, count), *_ = Counter(identifiers).most_common(1)
    if count > 1:
        raise ValueError(f"{whose} gives the image_id {identifier!r} {count} times: each image needs its own.")
