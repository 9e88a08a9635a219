"""The files of a user's folder: images found by whatever an annotation file calls them, and what splits are called."""

from __future__ import annotations

import os
import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path

IMAGE_SUFFIXES = {
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".jp2", ".avif", ".webp", ".png", ".bmp", ".gif", ".tif", ".tiff"),
    *(".pbm", ".pgm", ".ppm", ".pnm"),
}
_WRITTEN_HERE = ({"config.yaml", "log.txt"}, {"results.json", "images.json"})
_SPLIT_WORDS = {
    **dict.fromkeys(("train", "training", "trainval"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "minival", "dev"), "val"),
    **dict.fromkeys(("test", "testing"), "test"),
}


def split_of(name: str) -> str | None:
    """The split that a file's or folder's name speaks of: "train", "val", "test", or None.

    >>> split_of("instances_train2017"), split_of("Valid"), split_of("cells")
    ('train', 'val', None)
    """
    for word in re.split(r"[^a-z]+", name.lower()):
        if word in _SPLIT_WORDS:
            return _SPLIT_WORDS[word]
    return None


def split_of_path(path: Path) -> str | None:
    """The split that the nearest of a path's parts speaks of."""
    for part in reversed(path.parts):
        if (split := split_of(part)) is not None:
            return split
    return None


def plain(name: str) -> str:
    """A path for comparing: slashes, composed letters (macOS decomposes them), no case, no "./" in front."""
    return unicodedata.normalize("NFC", name.replace("\\", "/")).casefold().removeprefix("./")


class Tree:
    """The files below a folder, but for hidden ones; links to folders are followed once.

    Folders below it that a training or the demo wrote are left out: they have drawings called as the images are.

    Args:
        folder: an existing folder.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.files: list[Path] = []
        seen: set[str] = set()
        for top, folders, files in os.walk(folder, followlinks=True):
            real = os.path.realpath(top)
            if top != str(folder) and any(set(files) >= written for written in _WRITTEN_HERE):
                folders[:] = []
                continue
            folders[:] = [] if real in seen else sorted(f for f in folders if not f.startswith((".", "__MACOSX")))
            if real not in seen:
                self.files += [Path(top, name) for name in sorted(files) if not name.startswith(".")]
            seen.add(real)
        self.images = [path for path in self.files if path.suffix.lower() in IMAGE_SUFFIXES]

    def with_suffix(self, *suffixes: str, depth: int | None = None) -> list[Path]:
        """Files with these suffixes in lower or upper case, at most `depth` folders down."""
        return [
            path
            for path in self.files
            if path.suffix.lower() in suffixes
            and (depth is None or len(path.relative_to(self.folder).parts) <= depth + 1)
        ]

    @cached_property
    def _by_name(self) -> dict[str, list[Path]]:
        names: dict[str, list[Path]] = defaultdict(list)
        for path in self.images:
            names[plain(path.name)].append(path)
        return names

    @cached_property
    def _by_stem(self) -> dict[str, list[Path]]:
        stems: dict[str, list[Path]] = defaultdict(list)
        for path in self.images:
            stems[plain(path.stem)].append(path)
        return stems

    def find(self, name: str, near: Sequence[Path]) -> Path | None:
        """The image that a file means by a path.

        As it stands, from one of the folders `near`; else with backslashes for slashes, letters composed otherwise and
        in another case; else the image of that name whose folders agree best, as for an absolute path of another
        computer.

        Args:
            name: relative or absolute.
            near: folders that a relative path may start from, the likeliest first.

        Raises:
            ValueError: several images are meant as likely.
        """
        for written in dict.fromkeys((name, name.replace("\\", "/"))):
            for folder in near:
                path = folder / written  # an absolute one stays itself
                if path.is_file():
                    return path
        wanted = plain(name).split("/")
        return self._best(self._by_name.get(wanted[-1], []), wanted, near, name)

    def find_stem(self, name: str, near: Sequence[Path]) -> Path | None:
        """The image whose name without suffix is `name`, of several that in a folder of `near`.

        Raises:
            ValueError: several are.
        """
        found = self._by_stem.get(plain(name), [])
        for folder in near:
            if here := [path for path in found if path.parent == folder]:
                return self._only(here, name)
        return self._only(found, name) if found else None

    def _best(self, found: Sequence[Path], wanted: Sequence[str], near: Sequence[Path], name: str) -> Path | None:
        if not found:
            return None

        def agreeing(path: Path) -> int:
            parts = plain(str(path)).split("/")
            both = list(zip(reversed(parts), reversed(wanted), strict=False))
            return next((i for i, (a, b) in enumerate(both) if a != b), len(both))

        most = max(agreeing(path) for path in found)
        best = [path for path in found if agreeing(path) == most]
        for folder in near:
            if len(best) > 1 and (here := [path for path in best if folder in path.parents]):
                best = here
        return self._only(best, name)

    @staticmethod
    def _only(found: Sequence[Path], name: str) -> Path:
        if len(found) > 1:
            names = ", ".join(str(path) for path in found[:3])
            raise ValueError(f"{name!r} may mean any of {len(found)} images: {names}. Give them names of their own")
        return found[0]


def some(names: Iterable[object], count: int = 3) -> str:
    """The first few of several names, for a message."""
    listed = [str(name) for name in names]
    return ", ".join(listed[:count]) + (", ..." if len(listed) > count else "")
