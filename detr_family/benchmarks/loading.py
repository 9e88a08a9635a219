"""Images a second of one core, from a JPEG to a training's input: python -m detr_family.benchmarks.loading.

This package's mapper beside Detectron2's and the transforms of torchvision and, where it is installed, albumentations,
in turn, on the same made-up photographs: smooth shapes with noise, of COCO's usual size. "resized" is the shorter side
to 800 and a flip half of the time, in all of them; "recipe" is the papers': half of the images resized, cropped and
resized again, to shorter sides from 480 to 800. "draft" is with INPUT.DRAFT, from which only larger images
gain: --size 3000 4000.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetMapper
from detectron2.structures import BoxMode
from PIL import Image
from torchvision import io, tv_tensors
from torchvision.transforms import v2

from detr_family.benchmarks.measure import Run, time_on_cpu
from detr_family.config import load_config
from detr_family.data import DETRDatasetMapper

_BOXES = 7  # COCO's mean
_SIDE, _LONGEST = 800, 1333


def write_images(folder: Path, count: int, size: tuple[int, int]) -> list[dict[str, Any]]:
    """JPEGs of smooth content with noise, height and width `size`, and a dataset dict for each."""
    rng = np.random.default_rng(0)
    height, width = size
    records = []
    for i in range(count):
        coarse = Image.fromarray(rng.integers(0, 256, (8, 10, 3), dtype=np.uint8))
        smooth = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC), dtype=np.float32)
        pixels = (smooth + rng.normal(0, 12, smooth.shape)).clip(0, 255).astype(np.uint8)
        path = folder / f"{i}.jpg"
        Image.fromarray(pixels).save(path, quality=90)
        corners = rng.uniform(0, 0.5, (_BOXES, 2)) * (width, height)
        boxes = np.concatenate([corners, rng.uniform(0.1, 0.5, (_BOXES, 2)) * (width, height)], 1)
        annotations = [
            {"bbox": box.tolist(), "bbox_mode": BoxMode.XYWH_ABS, "category_id": 0, "iscrowd": 0} for box in boxes
        ]
        records.append(
            {"file_name": str(path), "height": height, "width": width, "image_id": i, "annotations": annotations}
        )
    return records


def _resized(cfg: CfgNode) -> CfgNode:
    """The configuration with one resizing and a flip."""
    cfg = cfg.clone()
    cfg.INPUT.CROP.ENABLED = False
    cfg.INPUT.MIN_SIZE_TRAIN, cfg.INPUT.MAX_SIZE_TRAIN = (_SIDE,), _LONGEST
    return cfg


def _torchvision() -> Callable[[dict[str, Any]], Any]:
    transform = v2.Compose(
        [
            v2.RandomShortestSize(_SIDE, max_size=_LONGEST, antialias=True),
            v2.RandomHorizontalFlip(),
            v2.ClampBoundingBoxes(),
            v2.SanitizeBoundingBoxes(labels_getter=None),
        ]
    )

    def read(record: dict[str, Any]) -> Any:
        image = io.decode_image(record["file_name"], mode=io.ImageReadMode.RGB)
        boxes = torch.tensor([annotation["bbox"] for annotation in record["annotations"]])
        canvas = (int(image.shape[1]), int(image.shape[2]))
        return transform(image, tv_tensors.BoundingBoxes(boxes, format="XYWH", canvas_size=canvas))

    return read


def _albumentations() -> Callable[[dict[str, Any]], Any]:
    import albumentations
    import cv2

    boxes = albumentations.BboxParams(format="coco", label_fields=["classes"])
    transform = albumentations.Compose(
        [albumentations.SmallestMaxSize(_SIDE), albumentations.HorizontalFlip(p=0.5)], bbox_params=boxes
    )

    def read(record: dict[str, Any]) -> Any:
        image = cv2.cvtColor(cv2.imread(record["file_name"]), cv2.COLOR_BGR2RGB)
        given = [annotation["bbox"] for annotation in record["annotations"]]
        done = transform(image=image, bboxes=given, classes=[0] * len(given))
        return torch.from_numpy(np.ascontiguousarray(done["image"].transpose(2, 0, 1))), torch.tensor(done["bboxes"])

    return read


def readers(config: str) -> dict[str, Callable[[dict[str, Any]], Any]]:
    """What is measured, by name."""
    cfg, draft = load_config(config), load_config(config, ["INPUT.DRAFT", "True"])
    result = {
        "recipe, detr_family": DETRDatasetMapper(cfg, True),
        "recipe, draft": DETRDatasetMapper(draft, True),
        "resized, detr_family": DETRDatasetMapper(_resized(cfg), True),
        "resized, draft": DETRDatasetMapper(_resized(draft), True),
        "resized, Detectron2": DatasetMapper(_resized(cfg), True),
        "resized, torchvision v2": _torchvision(),
    }
    if find_spec("albumentations") and find_spec("cv2"):
        result["resized, albumentations"] = _albumentations()
    return result


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config-file", default="detr_r50", help="whose augmentation the recipe is")
    parser.add_argument("--size", nargs=2, type=int, default=(480, 640), metavar=("HEIGHT", "WIDTH"))
    parser.add_argument("--images", type=int, default=24)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args(arguments)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        records = write_images(Path(folder), args.images, (args.size[0], args.size[1]))

        def run(read: Callable[[dict[str, Any]], Any]) -> Run:
            return lambda: [read(record) for record in records]

        times = time_on_cpu({name: run(read) for name, read in readers(args.config_file).items()}, args.repeats, False)
    print(f"JPEGs of {args.size[0]}x{args.size[1]}, {args.images} of them, one core, medians of {args.repeats}")
    print(f"{'':26} {'images/s':>9} {'ms each':>9}")
    for name, seconds in times.items():
        print(f"{name:26} {args.images / seconds:9.1f} {1000 * seconds / args.images:9.1f}")


if __name__ == "__main__":
    main()
