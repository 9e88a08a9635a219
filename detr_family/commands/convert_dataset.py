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
from detr_family.data.tiling import TiledForm, tiled_split
from detr_family.errors import check_output


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
    result.add_argument("--tile", type=int, default=0, metavar="PIXELS", help="cut images into tiles of this side")
    result.add_argument("--overlap", type=float, default=0.2, help="of neighbouring tiles, at least, as a share of one")
    result.add_argument(
        "--least-visible", type=float, default=0.3, help="share of a box; a tile with less ignores the object"
    )
    result.add_argument("--empty-tiles", type=float, default=0.1, help="share that is kept of tiles without objects")
    return result


def convert(read: FolderDataset, output: Path, form: TiledForm | None = None) -> list[list[str]]:
    """Writes the splits of a folder as COCO annotation files whose image names start from `output`.

    Args:
        read: the folder.
        output: where they go.
        form: how to cut the images into tiles, which are written into `output`, too; None leaves them whole.

    Returns:
        The entries for DATASETS.COCO_FORMAT.
    """
    entries = []
    for split, part in read.splits.items():
        if form is None:
            part = Split(_from(part, output), str(output))
        else:
            part = tiled_split(part, split, output, form)
            print(f"{split}: {len(part.content['images'])} tiles, {len(part.content['annotations'])} boxes")
        path = write_split(part, output / f"{split}.json")
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
        check_output(args.output, "--output", folder=True)
        read = read_folder(args.folder, args.format)
        if args.val_share:
            read = with_validation(read, args.val_share, args.val_seed)
        form = TiledForm(args.tile, args.overlap, args.least_visible, args.empty_tiles) if args.tile else None
        entries = convert(read, args.output, form)
    except (OSError, ValueError) as error:
        print(f"convert_dataset: {error}", file=sys.stderr)
        return 2
    print("\n".join(read.describe()))
    print(f'DATASETS.COCO_FORMAT "{entries}"')
    return 0
