"""Start-up and memory of data workers with a large dataset: python -m detr_family.benchmarks.workers.

A made-up COCO file of as many images and annotations as COCO's training set, which name the same few JPEGs. Measured,
each in a process of its own: reading the file (CPU time), the first batch from the start of the workers on, and the
memory that each worker has for itself (not shared with the main process) after some batches; with Detectron2's
serialised list, as a training has it, and with a plain list of dicts. Linux.
"""

from __future__ import annotations

import argparse
import multiprocessing
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
from detectron2.data import DatasetFromList, build_detection_train_loader
from detectron2.data.samplers import TrainingSampler

from detr_family.benchmarks.loading import write_images
from detr_family.config import load_config
from detr_family.data import DETRDatasetMapper
from detr_family.data.datasets.coco_json import read_coco_json

_BATCHES = 20  # read before memory is measured
_FILES = 16  # that all entries share


def write_dataset(folder: Path, images: int, annotations: int) -> Path:
    """A COCO annotation file whose images are `_FILES` JPEGs of 480x640; an annotation has a polygon of four points."""
    write_images(folder, _FILES, (480, 640))
    rng = np.random.default_rng(0)
    corners = rng.uniform(0, (480, 320), (annotations, 2)).round(2).tolist()
    sides = rng.uniform(10, 160, (annotations, 2)).round(2).tolist()
    owners, classes = rng.integers(0, images, annotations).tolist(), rng.integers(1, 81, annotations).tolist()
    path = folder / "train.json"
    with open(path, "w", encoding="utf-8") as file:
        file.write('{"categories": [')
        file.write(",".join(f'{{"id": {number}, "name": "class {number}"}}' for number in range(1, 81)))
        file.write('],\n"images": [')
        for i in range(images):
            file.write(
                f'{"," if i else ""}\n{{"id": {i}, "file_name": "{i % _FILES}.jpg", "width": 640, "height": 480}}'
            )
        file.write('],\n"annotations": [')
        for i, ((x, y), (w, h), owner, label) in enumerate(zip(corners, sides, owners, classes, strict=True)):
            polygon = f"[[{x}, {y}, {x + w:.2f}, {y}, {x + w:.2f}, {y + h:.2f}, {x}, {y + h:.2f}]]"
            file.write(
                f'{"," if i else ""}\n{{"id": {i}, "image_id": {owner}, "category_id": {label}, "iscrowd": 0, '
                f'"bbox": [{x}, {y}, {w}, {h}], "area": {w * h:.2f}, "segmentation": {polygon}}}'
            )
        file.write("]}\n")
    return path


def own_memory(process: int) -> int:
    """Bytes of a process that it shares with none."""
    lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
    return sum(1024 * int(line.split()[1]) for line in lines if line.startswith(("Private_Clean", "Private_Dirty")))


def measure(path: str, workers: int, serialised: bool, start: str) -> dict[str, float]:
    """Seconds ("read", CPU time; "first batch") and MiB ("dataset" if serialised, "worker" on average, "most")."""
    multiprocessing.set_start_method(start, force=True)  # a process that was spawned would spawn
    mapper = DETRDatasetMapper(load_config("detr_r50", ["MODEL.DEVICE", "cpu"]), True)
    started = time.process_time()
    dicts = read_coco_json(path, str(Path(path).parent))
    read = time.process_time() - started
    dataset = DatasetFromList(dicts, copy=False, serialize=serialised)
    size = dataset._lst._lst.nbytes if serialised else 0
    del dicts
    loader = build_detection_train_loader(
        dataset, mapper=mapper, sampler=TrainingSampler(len(dataset)), total_batch_size=2, num_workers=workers
    )
    started = time.perf_counter()
    batches = iter(loader)
    next(batches)
    first = time.perf_counter() - started
    for _ in range(_BATCHES * max(workers, 1)):
        next(batches)
    own = [own_memory(child.pid) / 2**20 for child in multiprocessing.active_children() if child.pid]
    del batches
    return {
        "read": read,
        "first batch": first,
        "dataset": size / 2**20,
        "worker": float(np.mean(own)),
        "most": max(own),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=118287)
    parser.add_argument("--annotations", type=int, default=860001)
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--start", default="fork", choices=["fork", "spawn"], help="how workers start; Linux forks")
    args = parser.parse_args(arguments)
    if args.workers < 1:
        parser.error("--workers has to be 1 or more")
    with tempfile.TemporaryDirectory() as folder:
        path = write_dataset(Path(folder), args.images, args.annotations)
        print(f"{args.images} images, {args.annotations} annotations, {path.stat().st_size / 2**20:.0f} MiB of JSON")
        print(
            f"{'':12} {'read, s':>9} {'first batch, s':>15} {'dataset, MiB':>13} {'a worker, MiB':>14} {'most':>7}",
            flush=True,
        )
        for name, serialised in (("serialised", True), ("plain list", False)):
            with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
                found = pool.submit(measure, str(path), args.workers, serialised, args.start).result()
            print(
                f"{name:12} {found['read']:9.1f} {found['first batch']:15.1f} {found['dataset']:13.0f} "
                f"{found['worker']:14.0f} {found['most']:7.0f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
