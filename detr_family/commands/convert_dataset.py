"""Any folder that `--data` takes, as COCO annotation files."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from detr_family.data.datasets.folder import FORMATS, free_name, read_folder, with_validation, write_split
from detr_family.data.datasets.labelled import FolderDataset, Split


def parser() -> argparse.ArgumentParser:
    """The command line of tools/convert_dataset.py."""
    result = argparse.ArgumentParser(
        description="Writes COCO annotation files from a folder in the format of COCO, YOLO, Pascal VOC or CSV.",
        epilog="Exit status: 0, or 2 where nothing was written.",
    )
    result.add_argument("folder", metavar="DIR", help="the dataset, or its data.yaml, annotation or CSV file")
    result.add_argument("--output", type=Path, required=True, metavar="DIR", help="for train.json, val.json, test.json")
    result.add_argument("--format", default="", choices=["", *FORMATS], help="by default what it is recognised as")
    result.add_argument("--val-share", type=float, default=0.0, help="cut off this share where there is no val split")
    result.add_argument("--val-seed", type=int, default=0, help="of that choice")
    return result


def convert(read: FolderDataset, output: Path) -> list[list[str]]:
    """Writes the splits of a folder as COCO annotation files whose image names start from `output`.

    Returns:
        The entries for DATASETS.COCO_FORMAT.
    """
    entries = []
    for split, part in read.splits.items():
        path = write_split(Split(_from(part, output), str(output)), output / f"{split}.json")
        entries.append([free_name(read.folder.name, split, str(path)), str(path), str(output)])
    return entries


def _from(part: Split, output: Path) -> dict[str, Any]:
    """A split's content with image names as they are seen from `output`."""
    base = output.absolute()
    images = [
        {**entry, "file_name": Path(os.path.relpath(Path(part.image_root, str(entry["file_name"])), base)).as_posix()}
        for entry in part.content["images"]
    ]
    return {**part.content, "images": images}


def command(arguments: Sequence[str] | None = None) -> int:
    """Parse the command line and do what it says; returns the exit status."""
    return run(parser().parse_args(arguments))


def run(args: argparse.Namespace) -> int:
    """Does what the command line says; returns the exit status."""
    try:
        read = read_folder(args.folder, args.format)
        if args.val_share:
            read = with_validation(read, args.val_share, args.val_seed)
        entries = convert(read, args.output)
    except (OSError, ValueError) as error:
        print(f"convert_dataset: {error}", file=sys.stderr)
        return 2
    print("\n".join(read.describe()))
    print(f'DATASETS.COCO_FORMAT "{entries}"')
    return 0
