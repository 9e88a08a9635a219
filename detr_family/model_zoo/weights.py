"""Published weights by name: the table zoo.json, and `zoo://` addresses for Detectron2's path manager.

The addresses were read in the documents that the table names; none was tried by this project. A name is that of the
configuration which the weights go into; where there are several of one configuration, "@" and a word tell the others:
`detrex/dino_r50_4scale`, `detrex/dino_r50_4scale@300dn`, `detr_r50@transformers`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from detectron2.utils.file_io import PathHandler, PathManager

from detr_family.checkpoint.downloads import ZOO
from detr_family.config.files import config_names, plain_name, similar

TABLE = Path(__file__).with_name("zoo.json")


@dataclass(frozen=True)
class Checkpoint:
    """Published weights of a detector, or of a backbone.

    Attributes:
        name: see above; of a backbone its own.
        format: whose names the file has: "release", "detrex", "transformers"; "torchvision", "swin", "detectron2".
        backbone: as its publishers call it.
        detector: "" where it is a backbone alone.
        epochs: of its training; None where they are not published.
        ap: box AP on COCO val2017 as published, in percent.
        top1: of a backbone, on ImageNet-1K as published, in percent.
        pretrained_on: of a backbone.
        address: https:// or hf://; a page for people where `fetchable` is False; "" where none is known.
        licence: of the repository that publishes the weights; "" where it was not read.
        source: the document that has the address.
        note: what to know before use.
    """

    name: str
    format: str
    backbone: str
    detector: str = ""
    epochs: int | None = None
    ap: float | None = None
    top1: float | None = None
    pretrained_on: str = ""
    address: str = ""
    licence: str = ""
    source: str = ""
    note: str = ""

    @property
    def fetchable(self) -> bool:
        """Whether a program can fetch the file from the address."""
        return bool(self.address) and "://drive.google.com/" not in self.address


@cache
def _table() -> dict[str, Any]:
    table: dict[str, Any] = json.loads(TABLE.read_text(encoding="utf-8"))
    return table


def checkpoints() -> Iterator[Checkpoint]:
    """Every detector in the table."""
    return (Checkpoint(**row) for row in _table()["checkpoints"])


def backbones() -> Iterator[Checkpoint]:
    """Every backbone in the table."""
    return (Checkpoint(**row) for row in _table()["backbones"])


def find_weights(name: str) -> Checkpoint:
    """An entry of the table.

    Args:
        name: with or without ".yaml".

    Raises:
        ValueError: there is none; similar ones are named.
    """
    name = name.removesuffix(".yaml")
    known = {entry.name: entry for entry in (*checkpoints(), *backbones())}
    if name in known:
        return known[name]
    if plain_name(name) in config_names():
        raise ValueError(f"no weights of {name!r} are known to be published{similar(name, known)}")
    raise ValueError(f"{name!r} is no file, and no weights of that name are in the model zoo{similar(name, known)}")


def address_of(name: str) -> str:
    """Where a program can fetch weights.

    Raises:
        ValueError: there are none of that name, or they have no such address; the message has the page where their
            publishers have them, and others that are the same but for their origin.
    """
    entry = find_weights(name)
    if entry.fetchable:
        return entry.address
    recipe = plain_name(entry.name).rsplit("/", 1)[-1]
    others = [x.name for x in checkpoints() if x.fetchable and plain_name(x.name).rsplit("/", 1)[-1] == recipe]
    where = (
        f"their publishers have them in {entry.address}, which a program cannot fetch: download them there and name "
        "the file in MODEL.WEIGHTS"
        if entry.address
        else f"no address is known ({entry.note})"
    )
    also = f"; of other origin, with an address: {', '.join(others)}" if others else ""
    raise ValueError(f"weights {entry.name!r}: {where}{also}")


class ZooHandler(PathHandler):
    """`zoo://dn_detr_r50`: weights of the table, fetched from their address."""

    def _get_supported_prefixes(self) -> list[str]:
        return [ZOO]

    def _get_local_path(self, path: str, force: bool = False, **kwargs: Any) -> str:
        local: str = PathManager.get_local_path(address_of(path[len(ZOO) :]), force=force, **kwargs)
        return local

    def _open(self, path: str, mode: str = "r", buffering: int = -1, **kwargs: Any) -> Any:
        return PathManager.open(self._get_local_path(path), mode, **kwargs)


PathManager.register_handler(ZooHandler(), allow_override=True)
