"""What the model zoo has: configurations with their published figures, and weights.

Epochs and AP (COCO val2017) are the publishers'; params (millions) and GFLOPs the papers'. Weights: "yes", an address
is known that a program can fetch (none was tried); "by hand", their page is for people; "-", none are published.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence

from tabulate import tabulate

from detr_family.config import config_names
from detr_family.config.files import plain_name
from detr_family.config.projects import add_import
from detr_family.model_zoo.published import PUBLISHED, Published
from detr_family.model_zoo.weights import Checkpoint, backbones, checkpoints

HEADINGS = ("name", "AP", "epochs", "params", "GFLOPs", "format", "licence", "weights")


def rows(texts: Sequence[str] = ()) -> list[list[object]]:
    """The table, a row for each configuration without weights and for each published checkpoint of a detector.

    Args:
        texts: only names that hold one of these; all where there are none.

    Returns:
        Rows of HEADINGS, by name.
    """
    configs = set(config_names())
    entries = {entry.name: entry for entry in checkpoints()}
    found: list[list[object]] = []
    for name in sorted(configs | set(entries)):
        if texts and not any(text in name for text in texts):
            continue
        entry = entries.get(name)
        recipe = plain_name(name)
        known = PUBLISHED.get(re.sub(r"_\d+ep$", "", recipe.rsplit("/", 1)[-1]), Published())
        exact = PUBLISHED.get(recipe)
        published = ((exact.ap or (None,))[0], exact.epochs) if exact else (None, None)
        found.append(
            [
                name if recipe in configs else f"{name} (no configuration here)",
                entry.ap if entry else published[0],
                entry.epochs if entry else published[1],
                known.params,
                known.gflops,
                entry.format if entry else "",
                entry.licence if entry else "",
                _weights(entry),
            ]
        )
    return found


def _weights(entry: Checkpoint | None) -> str:
    if entry is None or not entry.address:
        return "-"
    return "yes" if entry.fetchable else "by hand"


def main(arguments: Sequence[str] | None = None, prog: str | None = None) -> int:
    """Print the table; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog=prog or "python -m detr_family.model_zoo",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("texts", nargs="*", metavar="TEXT", help="only names that hold this; several: any of them")
    parser.add_argument("--addresses", action="store_true", help="addresses, sources and notes in place of the table")
    parser.add_argument("--backbones", action="store_true", help="weights of backbones, for MODEL.WEIGHTS")
    add_import(parser)
    args = parser.parse_args(arguments)
    chosen = [
        entry
        for entry in (backbones() if args.backbones else checkpoints())
        if not args.texts or any(text in entry.name for text in args.texts)
    ]
    if args.addresses:
        for entry in chosen:
            print(entry.name, entry.address or "(no address)", entry.source, entry.note, sep="\n    ")
    elif args.backbones:
        table = [[x.name, x.backbone, x.pretrained_on, x.top1, x.format] for x in chosen]
        print(tabulate(table, ["name", "backbone", "trained on", "top-1", "format"]))
    else:
        print(tabulate(rows(args.texts), HEADINGS))
    return 0
