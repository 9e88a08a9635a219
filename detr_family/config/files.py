"""Config files by name: the recipes that come with the package, and those of imported projects, from any folder.

A name is a file's path below such a folder, without ".yaml": `dn_detr_r50`, `detrex/dino_r50_4scale`. What follows an
"@" names other weights of the same configuration (see `detr_family.model_zoo`) and is left out here.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterable
from pathlib import Path

from detectron2.utils.file_io import PathManager

_PACKAGE = Path(__file__).resolve().parents[1]
_project_folders: list[Path] = []


def add_config_folder(folder: Path) -> None:
    """Let the config files in a project's folder be found by name, as a project does when it is imported."""
    if folder not in _project_folders:
        _project_folders.append(folder)


def config_folders() -> list[Path]:
    """Where names are looked for: within the installed package, or configs/ of a checkout; then the projects'."""
    packaged = _PACKAGE / "model_zoo" / "configs"
    return [packaged if packaged.is_dir() else _PACKAGE.parent / "configs", *_project_folders]


def config_names() -> list[str]:
    """Every name that `find_config` knows, but for the files that others are based on (Base-...)."""
    return [
        path.relative_to(folder).with_suffix("").as_posix()
        for folder in config_folders()
        for path in sorted(folder.rglob("*.yaml"))
        if not path.name.startswith("Base-")
    ]


def plain_name(name: str) -> str:
    """A name without ".yaml" and without what follows an "@"."""
    stem, suffix = os.path.splitext(name)
    return (stem if suffix in (".yaml", ".yml") else name).partition("@")[0]


def find_config(name: str | os.PathLike[str]) -> str:
    """The path of a config file.

    Args:
        name: a file; else a name, with or without ".yaml".

    Raises:
        FileNotFoundError: there is neither; similar files in its folder and similar names are named.
    """
    name = os.path.expanduser(os.fspath(name))
    if PathManager.isfile(name):
        return name
    if not os.path.isabs(name) and "://" not in name:
        for folder in config_folders():
            path = folder / f"{plain_name(name)}.yaml"
            if path.is_file():
                return str(path)
    if os.path.isdir(name):
        inside = sorted(str(path) for path in Path(name).glob("*.y*ml"))
        such = f", for instance {inside[0]}" if inside else "; there is none in it"
        raise FileNotFoundError(f"{name!r} is a folder: give the config file{such}")
    beside = [str(path) for path in Path(name).parent.glob("*.y*ml")]
    hint = similar(name, beside) or similar(plain_name(Path(name).name), config_names())
    raise FileNotFoundError(
        f"there is no config file {name!r}, and no configuration of that name comes with detr_family{hint}"
    )


def similar(wrong: str, known: Iterable[str]) -> str:
    """A hint for the end of a message, or nothing."""
    names = {name.lower(): name for name in known}
    close = [names[name] for name in difflib.get_close_matches(wrong.lower(), list(names), n=3)]
    return f"; similar: {', '.join(close)}" if close else ""
