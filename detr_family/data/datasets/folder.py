"""A folder is a dataset: its format recognised, its splits registered (`DATASETS.FOLDER`, `--data`).

Images stay where they are. What cannot be read as it stands is written as COCO annotation files into
OUTPUT_DIR/datasets, and the configuration names those from then on: the one that a training leaves repeats it, with the
same images kept apart for the validation.
"""

from __future__ import annotations

import json
import logging
import os
import re
import tempfile
from pathlib import Path
from types import ModuleType
from typing import Any

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.utils import comm

from detr_family.data.datasets import coco_folder, csv_boxes, voc, yolo
from detr_family.data.datasets.labelled import FolderDataset, Split, cut
from detr_family.data.datasets.tree import Tree, split_of

FORMATS: dict[str, ModuleType] = {"coco": coco_folder, "yolo": yolo, "voc": voc, "csv": csv_boxes}
_ARCHIVES = {".zip", ".tar", ".gz", ".tgz", ".7z", ".rar"}
_logger = logging.getLogger(__name__)


def read_folder(folder: str | os.PathLike[str], format_name: str = "") -> FolderDataset:
    """Recognises a folder and reads it.

    Args:
        folder: a folder, or the file in it that describes the dataset (data.yaml, an annotation file, a CSV file).
        format_name: "coco", "yolo", "voc" or "csv"; by default the first of these that it is, one with a training split
            before one without.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: it is none of these, or something in it is at fault; with file and, where there are, line.
    """
    path = Path(folder).expanduser()
    if not path.exists():
        raise FileNotFoundError(f"there is no folder {str(folder)!r} (DATASETS.FOLDER, --data)")
    if format_name and format_name not in FORMATS:
        raise ValueError(f"DATASETS.FOLDER_FORMAT is {format_name!r}; it may be {', '.join(FORMATS)} or empty")
    tree = Tree(_inner(path.absolute()) if path.is_dir() else path.absolute().parent)
    if path.is_file():
        name = format_name or {".json": "coco", ".yaml": "yolo", ".yml": "yolo", ".csv": "csv"}.get(path.suffix.lower())
        if name is None:
            remedy = ". Unpack it" if path.suffix.lower() in _ARCHIVES else ""
            raise ValueError(f"{path} is no folder, data.yaml, COCO annotation file or CSV file{remedy}")
        own = path.absolute()
        return _not_empty(FORMATS[name].read(tree, own if name == "yolo" else [own]))
    found = {
        name: handle
        for name, module in FORMATS.items()
        if format_name in ("", name) and (handle := module.find(tree)) is not None
    }
    if not found:
        raise ValueError(_unknown(tree, format_name))
    read: FolderDataset | None = None
    for name, handle in found.items():
        candidate = _not_empty(FORMATS[name].read(tree, handle))
        if read is None or ("train" in candidate.splits and "train" not in read.splits):
            read = candidate
        if "train" in read.splits:
            break
    assert read is not None
    others = [FORMATS[name].FORMAT for name in found if not read.format.startswith(FORMATS[name].FORMAT)]
    if others:
        read.notes.append(f"it also has {' and '.join(others)} annotations; DATASETS.FOLDER_FORMAT chooses")
    return read


def _not_empty(read: FolderDataset) -> FolderDataset:
    if not read.splits:
        raise ValueError(f"{read.folder}: nothing of it can be used. {'; '.join(read.notes)}")
    return read


def _inner(folder: Path) -> Path:
    """A folder, or what an archive was unpacked into: the only folder in it, where it has nothing else."""
    while True:
        inside = [path for path in folder.iterdir() if not path.name.startswith((".", "__MACOSX"))]
        if len(inside) != 1 or not inside[0].is_dir() or split_of(inside[0].name):
            return folder
        folder = inside[0]


def _unknown(tree: Tree, format_name: str) -> str:
    suffixes: dict[str, int] = {}
    for path in tree.files:
        suffixes[path.suffix.lower()] = suffixes.get(path.suffix.lower(), 0) + 1
    listed = ", ".join(f"{count} {suffix or 'without suffix'}" for suffix, count in sorted(suffixes.items())[:12])
    wanted = FORMATS[format_name].FORMAT if format_name else "COCO, YOLO, Pascal VOC or CSV"
    tables = tree.with_suffix(".csv", depth=1) if format_name in ("", "csv") else []
    hint = f". {csv_boxes.unknown_columns(tables[0])}" if tables else ""
    if {path.stem for path in tree.images} & {path.stem for path in tree.with_suffix(".txt")}:
        hint += ". Its text files may be YOLO's labels: write the names of the classes, a line each, into classes.txt"
    return (
        f"{tree.folder} has no annotations in the format of {wanted}. Looked for a COCO annotation file (.json) here "
        "or one folder down, data.yaml or classes.txt with YOLO's text files, VOC's XML files, a CSV file of boxes. "
        f"Its files by suffix: {listed or 'none'}{hint}"
    )


def with_validation(read: FolderDataset, share: float, seed: int) -> FolderDataset:
    """A dataset with a validation split: where there is none, `share` of the training images is cut off.

    Raises:
        ValueError: see `cut`.
    """
    if "val" in read.splits or "train" not in read.splits:
        return read
    train, val = cut(read.splits["train"], share, seed)
    note = (
        f"no validation split: {len(val.content['images'])} of {len(read.splits['train'].content['images'])} images "
        f"are cut off, chosen by their names (DATASETS.VAL_SHARE {share:g}, DATASETS.VAL_SEED {seed})"
    )
    splits = {"train": train, "val": val, **{key: part for key, part in read.splits.items() if key == "test"}}
    return FolderDataset(read.format, read.folder, splits, [*read.notes, note])


def apply_folder(cfg: CfgNode) -> list[str]:
    """Reads DATASETS.FOLDER, if there is one, into DATASETS.COCO_FORMAT, TRAIN, TEST and FINAL_TEST.

    FOLDER is empty afterwards. The first process of each machine reads; what is recognised is logged.

    Args:
        cfg: a configuration that is not frozen.

    Returns:
        What was recognised, in lines; they are in the log, too.

    Raises:
        FileNotFoundError, ValueError: see `read_folder` and `cut`; in all processes.
    """
    if not cfg.DATASETS.FOLDER:
        return []
    result: Any = None
    if comm.get_local_rank() == 0:
        try:
            result = _entries(cfg)
        except (OSError, ValueError) as error:
            result = error
    for other in comm.all_gather(result):
        if isinstance(other, Exception):
            raise other
        result = other if result is None else result
    entries, lines = result
    if comm.is_main_process():
        for line in lines:
            _logger.info("%s", line)
    names = {split: name for split, (name, _, _) in entries.items()}
    cfg.DATASETS.COCO_FORMAT = [*cfg.DATASETS.COCO_FORMAT, *entries.values()]
    cfg.DATASETS.TRAIN = (names["train"],) if "train" in names else ()
    evaluated = names.get("val") or names.get("test")
    cfg.DATASETS.TEST = (evaluated,) if evaluated else ()
    cfg.DATASETS.FINAL_TEST = (names["test"],) if "val" in names and "test" in names else ()
    cfg.DATASETS.FOLDER = ""
    return list(lines)


def _entries(cfg: CfgNode) -> tuple[dict[str, list[str]], list[str]]:
    """What DATASETS.COCO_FORMAT needs, by split, and what was recognised."""
    read = read_folder(cfg.DATASETS.FOLDER, cfg.DATASETS.FOLDER_FORMAT)
    read = with_validation(read, cfg.DATASETS.VAL_SHARE, cfg.DATASETS.VAL_SEED)
    target = Path(cfg.OUTPUT_DIR, "datasets").absolute()
    lines = read.describe()
    entries = {}
    for split, part in read.splits.items():
        json_file = part.json_file or str(write_split(part, target / f"{split}.json"))
        entries[split] = [free_name(read.folder.name, split, json_file), json_file, part.image_root]
    written = [split for split, part in read.splits.items() if part.json_file is None]
    if written:
        lines.append(f"read as COCO annotation files: {target} ({', '.join(f'{split}.json' for split in written)})")
    return entries, lines


def write_split(part: Split, target: Path) -> Path:
    """Writes a split as a COCO annotation file, whole or not at all."""
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=target.parent, suffix=".tmp")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            json.dump(part.content, file)
        os.chmod(name, 0o644)
        os.replace(name, target)
    except BaseException:
        os.unlink(name)
        raise
    return target


def free_name(folder: str, split: str, json_file: str) -> str:
    """A name for a dataset that stands for nothing else: cells_train, or cells_2_train ..."""
    base = re.sub(r"\W+", "_", folder).strip("_") or "folder"
    name, number = f"{base}_{split}", 1
    while name in DatasetCatalog and MetadataCatalog.get(name).__dict__.get("json_file") != json_file:
        number += 1
        name = f"{base}_{number}_{split}"
    return name
