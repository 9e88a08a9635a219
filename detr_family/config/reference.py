"""docs/config.md: a page on every key, made from the comments in defaults.py."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from detectron2.config import CfgNode, get_cfg

from detr_family.config import add_detr_family_config

_HEAD = """# Every key of the configuration

Made by `python tools/config_reference.py` from the comments in
[config/defaults.py](../detr_family/config/defaults.py): edit those.

These are the keys that detr_family adds to Detectron2's, with their defaults; the recipes in [configs/](../configs)
set them to the papers' values. Keys of Detectron2's own (`SOLVER.BASE_LR`, `INPUT.MIN_SIZE_TRAIN` ...) keep the meaning
that its documentation gives them, and projects explain theirs in a config.py of their own
([deformable](../projects/deformable/config.py)). A key that does not exist is an error that names similar ones.
"""

_ASSIGNMENT = re.compile(r"(_C|cfg)((?:\.[A-Z0-9_]+)+) = (.*)")
_KEY = re.compile(r"[A-Z0-9_]+(\.[A-Z0-9_]+)+")


@dataclass
class Entry:
    """Keys that one comment is about.

    Attributes:
        text: the comment, in one line.
        keys: their full names; none where the comment is about a group, or about a key of Detectron2's.
        group: the group that is opened here, or "".
    """

    text: str
    keys: list[str] = field(default_factory=list)
    group: str = ""


def entries(source: str) -> Iterator[Entry]:
    """What the comments in the body of `add_detr_family_config` say of which keys.

    A comment is about the key below it and those that follow it without a line between.

    Raises:
        ValueError: a key without a comment.
    """
    prefix = ""
    comment: list[str] = []
    entry: Entry | None = None
    for line in [*(x.strip() for x in source.splitlines()), ""]:
        alias = re.fullmatch(r"_C = cfg\.(\S+)", line)
        found = _ASSIGNMENT.match(line)
        if line.startswith("#"):
            comment.append(line.lstrip("# "))
        elif alias:
            prefix = alias[1]
        elif found:
            key = f"{prefix}{found[2]}" if found[1] == "_C" else found[2][1:]
            opens = found[3] == "CfgNode()"
            if comment or opens:
                if entry:
                    yield entry
                entry = Entry(" ".join(comment), group=key if opens else "")
                comment = []
            if not opens:
                if entry is None or not entry.text:
                    raise ValueError(f"config.py says nothing of {key}: give it a comment")
                entry.keys.append(key)
        elif not line:
            if entry:
                yield entry
            if comment:
                yield Entry(" ".join(comment))
            entry, comment = None, []


def page() -> str:
    """The text of docs/config.md."""
    body = inspect.getsource(add_detr_family_config)
    body = body[body.index('"""', body.index('"""') + 3) + 3 :]
    cfg = get_cfg()
    add_detr_family_config(cfg)
    sections: dict[str, list[str]] = {}
    for entry in entries(body):
        if not entry.text:
            continue
        note = _KEY.match(entry.text)
        names = entry.keys or [entry.group or (note[0] if note else "")]
        section = sections.setdefault(_section(names[0]), [])
        defaults = [_default(cfg, name) for name in names]
        section.append(f"| {_cell(names)} | {_cell(defaults)} | {_text(entry.text)} |")
    parts = [_HEAD]
    for name in sorted(sections):
        parts.append(f"## {name}\n\n| Key | Default | Meaning |\n|---|---|---|\n" + "\n".join(sections[name]) + "\n")
    return "\n".join(parts)


def _section(key: str) -> str:
    parts = key.split(".")
    return ".".join(parts[: 2 if parts[0] == "MODEL" else 1])


def _default(cfg: CfgNode, key: str) -> str:
    value: Any = cfg
    for part in key.split("."):
        value = value[part]
    return "" if isinstance(value, CfgNode) else repr(value)


def _cell(values: list[str]) -> str:
    return "<br>".join(f"`{value}`" for value in values if value)


def _text(comment: str) -> str:
    comment = comment.replace("|", "\\|")
    return comment[0].upper() + comment[1:]
