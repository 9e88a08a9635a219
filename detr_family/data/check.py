"""What is odd about a dataset: counts, and findings that name the entries at fault.

Two depths. `annotation_findings` looks at what is already in memory, so that a training can say it before its
first step; `image_findings` opens and decodes every image.
"""

from __future__ import annotations

import hashlib
import os
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import BoxMode
from tqdm import tqdm

from detr_family.data.datasets.coco_json import (
    CLIPPED,
    CocoScan,
    corners_suspected,
    printable,
    read_categories,
    scan_coco_json,
)
from detr_family.data.images import read_image

NAMED_EXAMPLES = 5
_FEW_BOXES = 10  # of a class: too few to learn it from
_SMALL, _LARGE = 32.0**2, 96.0**2  # COCO's borders of area, square pixels


@dataclass(frozen=True)
class Finding:
    """Something that a user should know of a dataset.

    Attributes:
        level: "error" (training or evaluation will stop or be wrong), "warning" (look at it) or "note".
        kind: a word for programs.
        dataset: the name that it was registered under; both, where it is about two.
        count: how many entries it is about.
        text: what is wrong and what to do, one line.
        examples: the first entries at fault.
    """

    level: str
    kind: str
    dataset: str
    count: int
    text: str
    examples: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        some = ", ".join(self.examples) + (", ..." if self.count > len(self.examples) else "")
        return f"{self.dataset}: {self.text}" + (f" [{some}]" if self.examples else "")


@dataclass(frozen=True)
class DatasetPart:
    """One registered dataset as it was read.

    Attributes:
        name: the registered name.
        training: whether it is trained on, or only evaluated on.
        records: Detectron2's dataset dicts.
        class_names: by class number.
        category_ids: the file's own id of each class number; empty where unknown.
        scan: what the COCO-format file held; None for datasets that come from elsewhere.
    """

    name: str
    training: bool
    records: list[dict[str, Any]]
    class_names: list[str]
    category_ids: list[int]
    scan: CocoScan | None = None


def read_part(name: str, training: bool) -> DatasetPart:
    """Reads a registered dataset for checking; a COCO file is read by this package whoever registered it.

    Raises:
        ValueError: its file is at fault or not here.
    """
    if name not in DatasetCatalog:
        raise ValueError(f"{name!r} is no registered dataset: add it to DATASETS.COCO_FORMAT, or correct the name.")
    metadata = MetadataCatalog.get(name)
    json_file, root = metadata.__dict__.get("json_file"), metadata.__dict__.get("image_root")
    if json_file and root is not None and metadata.get("evaluator_type") == "coco":
        categories = read_categories(json_file)
        scan = scan_coco_json(json_file, root)
        return DatasetPart(name, training, scan.records, list(categories.values()), list(categories), scan)
    try:
        records = DatasetCatalog.get(name)
    except FileNotFoundError as error:
        raise ValueError(f"The dataset {name!r} is not here ({error}).") from error
    return DatasetPart(name, training, records, list(metadata.get("thing_classes", [])), [])


def boxes_of(record: dict[str, Any]) -> list[tuple[int, list[float], bool]]:
    """Class number, (x, y, width, height) in pixels, and crowd mark of each annotation of a record."""
    return [
        (
            a["category_id"],
            a["bbox"]
            if a["bbox_mode"] == BoxMode.XYWH_ABS
            else BoxMode.convert(list(a["bbox"]), a["bbox_mode"], BoxMode.XYWH_ABS),
            bool(a.get("iscrowd", 0)),
        )
        for a in record.get("annotations", ())
    ]


def statistics(part: DatasetPart) -> dict[str, Any]:
    """Counts and sizes of a dataset, in plain types that JSON can hold.

    Returns:
        images, pictures_without_objects, boxes (crowd regions not counted), crowd_regions, and where there
        are any: picture_sides and box_sides (least, median and greatest in pixels), boxes_per_picture
        (mean and greatest), boxes_by_area (COCO's small, medium, large), and classes: a dict for each with
        name, id, boxes and images.
    """
    boxes, images = Counter[int](), Counter[int]()
    sides, counts, crowd = [], [], 0
    for record in part.records:
        own = [(number, box) for number, box, is_crowd in boxes_of(record) if not is_crowd]
        crowd += len(record.get("annotations", ())) - len(own)
        counts.append(len(own))
        boxes.update(number for number, _ in own)
        images.update({number for number, _ in own})
        sides += [box[2:4] for _, box in own]
    result: dict[str, Any] = {
        "role": "train" if part.training else "test",
        "pictures": len(part.records),
        "pictures_without_objects": sum(not count for count in counts),
        "annotated": all("annotations" in record for record in part.records),
        "boxes": len(sides),
        "crowd_regions": crowd,
    }
    if part.scan and part.scan.num_annotations is not None:
        result["annotations_left_out"] = part.scan.num_left_out
    known = [record for record in part.records if "width" in record]
    if known:
        result["picture_sides"] = {key: _spread([r[key] for r in known]) for key in ("width", "height")}
    if sides:
        array = np.asarray(sides, dtype=np.float64)
        area = array.prod(1)
        result["box_sides"] = {key: _spread(array[:, i]) for i, key in enumerate(("width", "height"))}
        result["boxes_per_picture"] = {"mean": round(float(np.mean(counts)), 2), "most": max(counts)}
        result["boxes_by_area"] = {
            "small": int((area < _SMALL).sum()),
            "medium": int(((area >= _SMALL) & (area < _LARGE)).sum()),
            "large": int((area >= _LARGE).sum()),
        }
    ids: Sequence[int | None] = part.category_ids or [None] * len(part.class_names)
    result["classes"] = [
        {"name": name, "id": identifier, "boxes": boxes[number], "pictures": images[number]}
        for number, (name, identifier) in enumerate(zip(part.class_names, ids, strict=True))
    ]
    return result


def _spread(values: Sequence[float] | np.ndarray) -> list[float]:
    return [round(float(x), 1) for x in (np.min(values), np.median(values), np.max(values))]


def annotation_findings(parts: Sequence[DatasetPart], num_queries: int | None = None) -> list[Finding]:
    """What can be found without opening an image.

    Args:
        parts: the datasets of a run.
        num_queries: of the detector (MODEL.DETR.NUM_QUERIES), to compare with the fullest image.
    """
    findings = []
    for part in parts:
        if part.scan:
            findings += _scan_findings(part, part.scan)
        findings += _record_findings(part, num_queries)
    findings += _overlap(parts, {p.name: [os.path.abspath(r["file_name"]) for r in p.records] for p in parts}, "file")
    return findings


def _finding(level: str, kind: str, part: DatasetPart, entries: Sequence[object], text: str) -> Finding:
    return Finding(level, kind, part.name, len(entries), text, [printable(str(x)) for x in entries[:NAMED_EXAMPLES]])


def _scan_findings(part: DatasetPart, scan: CocoScan) -> list[Finding]:
    found = []
    for fault, labels in sorted(scan.faults.items()):
        treatment = "" if fault == CLIPPED else " (left out)"
        found.append(_finding("warning", "bad_boxes", part, labels, f"{len(labels)} boxes {fault}{treatment}"))
    if hint := corners_suspected(scan):
        found.append(Finding("error", "corner_boxes", part.name, scan.num_annotations or 0, hint))
    if scan.repeated_ids:
        text = f"{len(scan.repeated_ids)} annotation ids are given more than once"
        found.append(_finding("warning", "repeated_annotation_ids", part, scan.repeated_ids, text))
    if scan.without_size:
        text = f"{len(scan.without_size)} images have no width and height in the file: their headers are read instead"
        found.append(_finding("note", "pictures_without_size", part, scan.without_size, text))
    if scan.backslashes:
        text = f'{len(scan.backslashes)} file names have backslashes; the images are found with "/" in their place'
        found.append(_finding("note", "backslashes", part, scan.backslashes, text))
    renamed = [name for name, i in zip(part.class_names, part.category_ids, strict=True) if name.endswith(f"(id {i})")]
    if renamed:
        found.append(_finding("warning", "repeated_class_names", part, renamed, "classes of the same name"))
    ids = part.category_ids
    if ids and ids != list(range(ids[0], ids[0] + len(ids))):
        pairs = [f"{identifier} is class {number}" for number, identifier in enumerate(ids)]
        text = "category ids have holes; they are numbered by ascending id, and results keep your ids"
        found.append(_finding("note", "category_ids", part, pairs, text))
    return found


def _record_findings(part: DatasetPart, num_queries: int | None) -> list[Finding]:
    boxes, empty, crowded, doubled = Counter[int](), 0, [], []
    seen: dict[str, int] = Counter(str(record["file_name"]) for record in part.records)
    largest = 0.0
    for record in part.records:
        own = boxes_of(record)
        kept = [number for number, _, is_crowd in own if not is_crowd]
        boxes.update(kept)
        empty += not kept
        if num_queries is not None and len(kept) > num_queries:
            crowded.append(f"{record['file_name']} ({len(kept)})")
        if len({(number, *box) for number, box, _ in own}) < len(own):
            doubled.append(record["file_name"])
        largest = max([largest, *(max(box) for _, box, _ in own)])
    found = []
    again = [name for name, count in seen.items() if count > 1]
    if again:
        text = f"{len(again)} image files have several image entries: join their annotations under one"
        found.append(_finding("warning", "repeated_pictures", part, again, text))
    if crowded:
        text = (
            f"{len(crowded)} images have more objects than the detector has queries ({num_queries}); the rest "
            "can never be found: raise MODEL.DETR.NUM_QUERIES"
        )
        found.append(_finding("warning", "more_objects_than_queries", part, crowded, text))
    if doubled:
        text = f"{len(doubled)} images have the same box with the same class more than once"
        found.append(_finding("warning", "repeated_boxes", part, doubled, text))
    if boxes and largest <= 1.0:
        text = (
            "no coordinate is above 1: the boxes seem to be fractions of the image, but COCO's format has "
            "pixels (x, y, width, height)"
        )
        found.append(Finding("error", "boxes_in_fractions", part.name, sum(boxes.values()), text))
    if not any("annotations" in record for record in part.records):
        level = "error" if part.training else "note"
        found.append(Finding(level, "no_annotations", part.name, len(part.records), "has no annotations"))
    elif not boxes:
        level = "error" if part.training else "warning"
        found.append(Finding(level, "no_boxes", part.name, len(part.records), "has not one usable box"))
    else:
        names = list(enumerate(part.class_names))
        none = [name for number, name in names if not boxes[number]]
        few = [f"{name} ({boxes[number]})" for number, name in names if 0 < boxes[number] < _FEW_BOXES]
        if none:
            level = "warning" if part.training else "note"
            found.append(_finding(level, "classes_without_boxes", part, none, f"{len(none)} classes have no box"))
        if few and part.training:
            text = f"{len(few)} classes have fewer than {_FEW_BOXES} boxes"
            found.append(_finding("note", "classes_with_few_boxes", part, few, text))
        if 2 * empty > len(part.records):
            text = f"{empty} of {len(part.records)} images have no object"
            found.append(Finding("note", "mostly_without_objects", part.name, empty, text))
    return found


def _overlap(parts: Sequence[DatasetPart], keys: dict[str, Sequence[str]], what: str) -> list[Finding]:
    """Images of a training set that a test set has, too; `keys` has one key per image, "" for none."""
    found = []
    for test in parts:
        for train in parts:
            if test.training or not train.training:
                continue
            trained = set(keys[train.name]) - {""}
            shared = [r["file_name"] for r, key in zip(test.records, keys[test.name], strict=True) if key in trained]
            if shared and train.name != test.name:
                text = (
                    f"{len(shared)} of {len(test.records)} test images are training images, too (the same {what}): "
                    "results on them say nothing"
                )
                both = f"{train.name} / {test.name}"
                examples = [printable(str(x)) for x in shared[:NAMED_EXAMPLES]]
                found.append(Finding("warning", f"overlap_{what}", both, len(shared), text, examples))
    return found


def image_findings(parts: Sequence[DatasetPart], workers: int = 4, progress: bool = True) -> list[Finding]:
    """Opens and decodes every image: missing, unreadable, of another size, and the same content twice.

    The content is that of the decoded pixels: a file that was only compressed anew or renamed is found too, as
    long as not one pixel differs.

    Args:
        parts: the datasets of a run.
        workers: images read at a time.
        progress: show a bar where stderr is a terminal, once it takes more than two seconds.
    """
    findings = []
    digests: dict[str, Sequence[str]] = {}
    with ThreadPoolExecutor(max(workers, 1)) as pool:
        for part in parts:
            looked: Iterable[tuple[str, str, str]] = pool.map(_look, part.records)
            bar = tqdm(
                looked, f"reading images of {part.name}", len(part.records), delay=2, disable=not progress or None
            )
            results = list(bar)
            faults: dict[str, list[str]] = defaultdict(list)
            for kind, text, _ in results:
                if kind:
                    faults[kind].append(text)
            for kind, texts in faults.items():
                what = {
                    "missing": "images are missing",
                    "unreadable": "images cannot be used",
                    "size": "images are of another size than the file says (after turning by EXIF orientation)",
                }[kind]
                findings.append(_finding("error", f"{kind}_pictures", part, texts, f"{len(texts)} {what}"))
            digests[part.name] = [digest for _, _, digest in results]
            findings += _same_content(part, digests[part.name])
    return findings + _overlap(parts, digests, "content")


def _look(record: dict[str, Any]) -> tuple[str, str, str]:
    """Kind of fault, what to tell of it, and a digest of the pixels; empty where there is none."""
    path = str(record["file_name"])
    if not os.path.isfile(path):
        return "missing", path, ""
    try:
        pixels = read_image(path, "RGB")
    except ValueError as error:
        return "unreadable", str(error), ""
    height, width = pixels.shape[:2]
    digest = hashlib.blake2b(pixels.tobytes(), digest_size=16, key=f"{height}x{width}".encode()).hexdigest()
    expected = record.get("width", width), record.get("height", height)
    if (width, height) != expected:
        return "size", f"{path} is {width}x{height}, not {expected[0]}x{expected[1]}", digest
    return "", "", digest


def _same_content(part: DatasetPart, digests: Sequence[str]) -> list[Finding]:
    groups: dict[str, list[str]] = defaultdict(list)
    for record, digest in zip(part.records, digests, strict=True):
        if digest and record["file_name"] not in groups[digest]:
            groups[digest].append(record["file_name"])
    same = [" = ".join(names) for names in groups.values() if len(names) > 1]
    if not same:
        return []
    return [_finding("warning", "duplicate_pictures", part, same, f"{len(same)} images are there more than once")]
