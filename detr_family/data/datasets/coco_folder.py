"""Folders with COCO annotation files: COCO's own layout, Roboflow's, CVAT's and Label Studio's exports.

A file that can be read as it stands is not copied. Roboflow's root class (id 0, of supercategory "none", the
supercategory of all others, without a box) is left out.
"""

from __future__ import annotations

import json
import mmap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from detr_family.data.datasets.coco_json import no_json
from detr_family.data.datasets.labelled import FolderDataset, Split
from detr_family.data.datasets.tree import Tree, some, split_of, split_of_path

FORMAT = "COCO"
_OTHERS = ("person_keypoints", "captions", "stuff", "panoptic", "image_info")  # beside COCO's instances_*.json
_TRIED = 50  # images that an image folder is looked for with


def find(tree: Tree) -> list[Path] | None:
    """The COCO annotation files, at most one folder down."""
    files = [path for path in tree.with_suffix(".json", depth=1) if _is_coco(path)]
    if any(path.name.startswith("instances_") for path in files):
        files = [path for path in files if not path.name.startswith(_OTHERS)]
    return files or None


def _is_coco(path: Path) -> bool:
    if not path.stat().st_size:
        return False
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        return content.find(b'"images"') >= 0 and content.find(b'"categories"') >= 0


def read(tree: Tree, files: Sequence[Path]) -> FolderDataset:
    """Finds the splits of COCO annotation files and the folders of their images.

    Raises:
        ValueError: a file that is no JSON, two files of one split, no folder that has a file's images.
    """
    loaded: dict[str, tuple[Path, dict[str, Any]]] = {}
    for path in files:
        split = split_of(path.stem) or split_of_path(path.relative_to(tree.folder).parent) or "train"
        if split in loaded:
            raise ValueError(
                f"{loaded[split][0]} and {path} are both of the split {split!r}: name the files train.json, val.json, "
                "test.json, or give them with DATASETS.COCO_FORMAT"
            )
        loaded[split] = path, load(path)
    notes = []
    root_class = _root_class([data for _, data in loaded.values()])
    if root_class:
        notes.append(f"the class {root_class!r}, which Roboflow puts above all others, has no box and is left out")
    splits = {}
    for split in ("train", "val", "test"):
        if split not in loaded:
            continue
        path, data = loaded[split]
        if split == "test" and not data.get("annotations"):
            notes.append(f"test: {path} has no annotations: the split is left out")
            continue
        root = image_root(tree, path, data)
        changed = _with_plain_names(tree, root, path, data)
        if root_class:
            data = {**data, "categories": [entry for entry in data["categories"] if entry.get("id") != 0]}
        splits[split] = Split(data, str(root), None if root_class or changed else str(path))
    return FolderDataset(FORMAT, tree.folder, splits, notes)


def load(path: Path) -> dict[str, Any]:
    """A COCO annotation file whose images and categories are lists of objects.

    Raises:
        ValueError: it is no such file.
    """
    try:
        data: dict[str, Any] = json.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        line = f":{error.lineno}" if isinstance(error, json.JSONDecodeError) else ""
        raise ValueError(f"{path}{line}: {'. '.join(no_json(str(path), error))}") from error
    for key in ("images", "categories"):
        entries = data.get(key) if isinstance(data, dict) else None
        if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
            if isinstance(data, list):
                raise ValueError(f"{path}: no COCO dataset but a list, as results are. Give the file with the images.")
            raise ValueError(f'{path}: no COCO dataset: "{key}" is no list of objects. Export it again.')
    return data


def _root_class(contents: Sequence[dict[str, Any]]) -> str:
    """The name of Roboflow's root class where all files have it and none uses it, else nothing."""
    names = set()
    for data in contents:
        root: dict[str, Any] = next((entry for entry in data["categories"] if entry.get("id") == 0), {})
        others = [str(entry.get("supercategory")) for entry in data["categories"] if entry.get("id") != 0]
        entries = data.get("annotations")
        entries = entries if isinstance(entries, list) else []  # told where it is read
        used = any(isinstance(entry, dict) and entry.get("category_id") == 0 for entry in entries)
        if root.get("supercategory") != "none" or not others or set(others) != {str(root.get("name"))} or used:
            return ""
        names.add(str(root["name"]))
    return names.pop() if len(names) == 1 else ""


def image_root(tree: Tree, path: Path, data: dict[str, Any]) -> Path:
    """The folder that has most of a file's images, of those where they usually lie.

    Raises:
        ValueError: none has any.
    """
    names = [str(entry.get("file_name", "")).replace("\\", "/") for entry in data["images"]]
    names = [names[i * len(names) // _TRIED] for i in range(_TRIED)] if len(names) > _TRIED else names
    stem = path.stem.removeprefix("instances_")
    folders = [path.parent, tree.folder]
    for folder in (tree.folder, tree.folder / "images", path.parent, path.parent / "images"):
        folders += [folder / stem, folder / stem.lower(), folder]
        folders += [folder / word for word in ("train", "val", "valid", "test") if split_of(word) == split_of(stem)]
    folders += sorted({image.parent for image in tree.images})
    folders = [folder for folder in dict.fromkeys(folders) if folder.is_dir()]
    found = {folder: sum((folder / name).is_file() for name in names if name) for folder in folders}
    best = max(folders, key=lambda folder: found[folder])
    if names and not found[best]:
        if not any(tree.find(name, folders) for name in names if name):
            raise ValueError(f"{path}: its images ({some(names)}) are not in {tree.folder} or a folder below it")
        return tree.folder
    return best


def _with_plain_names(tree: Tree, root: Path, path: Path, data: dict[str, Any]) -> bool:
    """Gives images that are called otherwise than their files the files' names, in place; whether there were any."""
    changed = False
    for entry in data["images"]:
        name = entry.get("file_name")
        if isinstance(name, str) and name and not (root / name).is_file():
            try:
                image = tree.find(name, [root, path.parent, tree.folder])
            except ValueError as error:
                raise ValueError(f"{path}: {error}") from error
            if image is not None:
                entry["file_name"] = image.relative_to(root).as_posix() if root in image.parents else str(image)
                changed = True
    return changed
