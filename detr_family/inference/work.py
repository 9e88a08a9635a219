"""What a long run of predictions is about: images and videos named by folders, globs, list files and COCO files."""

from __future__ import annotations

import glob
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from detr_family.data.datasets import coco_folder
from detr_family.data.datasets.tree import Tree, some

VIDEO_SUFFIXES = {".mp4", ".avi", ".mov", ".mkv", ".webm", ".m4v", ".mpg", ".mpeg", ".wmv"}
_LISTS = (".txt", ".lst")


class ImageItem(NamedTuple):
    """One image of a run.

    Attributes:
        path: where it lies.
        name: what it is called in the results: the path, or the file_name of a COCO file.
        image_id: of a COCO file, else None.
    """

    path: str
    name: str
    image_id: int | None


@dataclass
class Work:
    """What a run is about, each image and video once, in an order that depends on nothing but the inputs.

    Attributes:
        images: all images.
        videos: paths.
        others: how many files of folders and globs are neither, by their suffix.
        categories: those of the COCO files among the inputs, name to id.
    """

    images: list[ImageItem] = field(default_factory=list)
    videos: list[str] = field(default_factory=list)
    others: int = 0
    categories: dict[str, int] = field(default_factory=dict)


def find_work(inputs: Sequence[str], image_root: str | None = None, *, below: bool = True) -> Work:
    """The images and videos that a command line names.

    Args:
        inputs: images, videos, folders, globs ("**" goes below), list files (.txt: a path a line, from the list's
            folder or from here), and COCO files (.json), of which only images and categories count.
        image_root: where the images of COCO files lie; by default it is looked for around each.
        below: take what lies in the folders below a folder, too; else only where it has no image or video itself.

    Raises:
        ValueError: something is not there, has no images, or two COCO files have an image id in common.
    """
    work = Work()
    seen: set[str | int] = set()
    for given in inputs:
        path = Path(given).expanduser()
        if path.is_dir():
            _add_files(work, seen, given, Tree(path).files if below else _directly_in(path) or Tree(path).files)
        elif not path.is_file():
            found = sorted(name for name in glob.glob(str(path), recursive=True) if Path(name).is_file())
            if not found:
                key = re.fullmatch(r"[A-Z]+[A-Z_]*(\.[A-Z0-9_]+)+", given)
                hint = ": it reads as a key, and KEY VALUE pairs follow --opts" if key else ""
                raise ValueError(f"{given!r} is no file or folder, and as a pattern it matches no file{hint}")
            _add_files(work, seen, given, map(Path, found))
        elif path.suffix.lower() == ".json":
            _add_coco(work, seen, path, image_root)
        elif path.suffix.lower() in _LISTS:
            for name in _listed(path):
                _add(work, seen, name)
        else:  # taken for what it is called, an image in doubt
            _add(work, seen, str(path))
    return work


def _add(work: Work, seen: set[str | int], name: str) -> None:
    if name in seen:
        return
    seen.add(name)
    if Path(name).suffix.lower() in VIDEO_SUFFIXES:
        work.videos.append(name)
    else:
        work.images.append(ImageItem(name, name, None))


def _add_files(work: Work, seen: set[str | int], given: str, files: Iterable[Path]) -> None:
    known = _known()
    before, others = len(work.images) + len(work.videos), 0
    twice = 0
    for path in files:
        if path.suffix.lower() in known:
            twice += str(path) in seen
            _add(work, seen, str(path))
        else:
            others += 1
    if len(work.images) + len(work.videos) + twice == before:
        raise ValueError(f"{given!r} has no image or video among its {others} files")
    work.others += others


def _directly_in(folder: Path) -> list[Path]:
    """The files of a folder that has images or videos; of another, none."""
    files = sorted(file for file in folder.iterdir() if file.is_file() and not file.name.startswith("."))
    known = _known()
    return files if any(file.suffix.lower() in known for file in files) else []


def _known() -> set[str]:
    return {suffix.lower() for suffix in Image.registered_extensions()} | VIDEO_SUFFIXES


def _listed(path: Path) -> list[str]:
    """The paths of a list file."""
    try:
        content = path.read_bytes()
        encoding = "utf-16" if content.startswith((b"\xff\xfe", b"\xfe\xff")) else "utf-8-sig"  # as PowerShell writes
        lines = content.decode(encoding).splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no list of paths, or not in UTF-8: save it so ({error})") from error
    names = [line.strip() for line in lines if line.strip()]
    if not names:
        raise ValueError(f"{path} is a list without a path")
    # The first that is there tells where all start from: looking at each of a million would take minutes.
    for name in names[:1000]:
        if (path.parent / name).is_file():
            return [str(path.parent / name) for name in names]
        if Path(name).is_file():
            return names
    raise ValueError(
        f"{path}: of its paths ({some(names)}) none is a file, from {path.parent} or from the folder of the command"
    )


def _add_coco(work: Work, seen: set[str | int], path: Path, image_root: str | None) -> None:
    data = coco_folder.load(path)
    names = _categories(path, data["categories"])
    if work.categories and work.categories != names:
        raise ValueError(f"{path} has other categories than the COCO file before it: run them one after the other")
    work.categories = names
    if image_root is None:
        above = path.parent.parent if path.parent.name == "annotations" else path.parent
        try:
            root = coco_folder.image_root(Tree(above), path, data)
        except ValueError as error:
            raise ValueError(f"{error}: give the folder with --image-root") from error
    else:
        root = Path(image_root)
    for entry in data["images"]:
        name, image_id = entry.get("file_name"), entry.get("id")
        if not isinstance(name, str) or not isinstance(image_id, int):
            raise ValueError(f"{path}: an image's file_name is {name!r} and its id {image_id!r}: no text and number")
        if image_id in seen:
            raise ValueError(f"{path}: the image id {image_id} is there twice, or in the COCO file before it, too")
        seen.add(image_id)
        work.images.append(ImageItem(str(root / name), name, image_id))


def _categories(path: Path, entries: Sequence[dict[str, Any]]) -> dict[str, int]:
    try:
        return {str(entry["name"]): int(entry["id"]) for entry in entries}
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: a category lacks its name or its id, a number") from error
