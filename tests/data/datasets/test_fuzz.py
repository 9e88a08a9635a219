"""Damaged annotation files and images: each gives a result or one clear error, and nothing is lost uncounted."""

from __future__ import annotations

import copy
import io
import json
import logging
import math
import random
from pathlib import Path
from typing import Any

import numpy as np
import own_data
import pytest
import tiny
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.modeling import build_model
from PIL import Image

from detr_family.commands.data_check import check_data, text_of
from detr_family.data import register_datasets, training_dicts
from detr_family.data.dataset_mapper import DETRDatasetMapper
from detr_family.data.datasets.coco_json import scan_coco_json

ODD: list[Any] = [
    *(None, True, False, "", "0", "7", "\ud800", "a\0b", "../../a.png", "a.png", [], {}, [1], {"id": 1}),
    *(0, -1, 1, 7, 3.0, 2.5, -0.0, 1e-12, 1e308, -1e308, 10**30, -(10**400), math.nan, math.inf, -math.inf),
    *([1, 2, 3, 4], [1, 2, 3], [None] * 4, [[1, 2, 3, 4]], [1e308, 1e308, 1e308, 1e308], [5, 5, 1e-9, 1e-9]),
]


def places(node: Any, path: tuple = ()) -> list[tuple]:
    """Every key and index of a JSON tree, as the path to it."""
    found = []
    items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for key, value in items:
        found.append((*path, key))
        found += places(value, (*path, key))
    return found


def corrupted(rng: random.Random) -> bytes:
    """A valid COCO file with one to three corruptions: of its content, or of its bytes."""
    data = copy.deepcopy(
        {"images": own_data.IMAGES, "annotations": own_data.ANNOTATIONS, "categories": own_data.CATEGORIES}
    )
    for _ in range(rng.randint(1, 3)):
        known = places(data)
        *path, key = rng.choice(known)
        node: Any = data
        for step in path:
            node = node[step]
        kind = rng.random()
        if kind < 0.55:
            node[key] = copy.deepcopy(rng.choice(ODD))
        elif kind < 0.75:
            del node[key]
        elif kind < 0.9 and isinstance(node, list):
            node.insert(rng.randrange(len(node) + 1), copy.deepcopy(node[key]))
        elif isinstance(node, dict):
            node[str(rng.choice(ODD))] = node.pop(key)
    content = json.dumps(data).encode()
    if rng.random() < 0.25:
        start = rng.randrange(len(content))
        change = rng.randrange(4)
        if change == 0:
            content = content[:start]
        elif change == 1:
            content = content[:start] + content[start + rng.randint(1, 40) :]
        elif change == 2:
            content = content[:start] + rng.randbytes(rng.randint(1, 5)) + content[start:]
        else:
            content = content[:start] + b"[" * 200000 + content[start:]
    return content


def use(cfg: Any, folder: Path) -> tuple[int, int]:
    """Reads and maps the dataset; images and boxes that came through. Any fault is a ValueError."""
    register_datasets(cfg)
    dicts = training_dicts(cfg)
    mapper = DETRDatasetMapper(cfg, True)
    boxes = 0
    for record in dicts:
        mapped = mapper(record)
        assert mapped["image"].numel() > 0 and torch.isfinite(mapped["instances"].gt_boxes.tensor).all()
        boxes += len(mapped["instances"])
    return len(dicts), boxes


@pytest.mark.parametrize("seed", range(200))
def test_a_corrupted_annotation_file(seed: int, coco_folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = coco_folder / "fuzz.json"
    path.write_bytes(corrupted(random.Random(seed)))
    cfg = tiny.cfg_of("DETR")
    cfg.DATASETS.COCO_FORMAT = [[f"fuzz{seed}", str(path), str(coco_folder)]]
    cfg.DATASETS.TRAIN = (f"fuzz{seed}",)
    cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS = False
    cfg.INPUT.MIN_SIZE_TRAIN, cfg.INPUT.MAX_SIZE_TRAIN, cfg.INPUT.CROP.ENABLED = (64,), 128, False
    try:
        with caplog.at_level(logging.WARNING):
            images, boxes = use(cfg, coco_folder)
    except ValueError as error:
        text = str(error)
        assert any(name in text for name in ("fuzz", "a.png", "b.png", "c.png")), text
        assert len(text) < 2000
        return
    scan = scan_coco_json(str(path), str(coco_folder))
    raw = json.loads(path.read_bytes())
    assert images == len(raw["images"]) == len(scan.records)
    kept = [a for record in scan.records for a in record["annotations"]]
    assert len(raw["annotations"]) == scan.num_annotations == len(kept) + scan.num_left_out
    assert boxes == sum(not a["iscrowd"] for a in kept)
    counts = [line for line in caplog.text.splitlines() if line.strip().startswith(tuple("123456789"))]
    assert len(counts) >= len(scan.faults)


@pytest.mark.parametrize("seed", range(0, 200, 4))
def test_the_data_check_on_a_corrupted_file(seed: int, coco_folder: Path) -> None:
    path = coco_folder / f"fuzz{seed}.json"
    path.write_bytes(corrupted(random.Random(seed)))
    cfg = tiny.cfg_of("DETR")
    cfg.DATASETS.COCO_FORMAT = [[f"fuzz{seed}", str(path), str(coco_folder)]]
    cfg.DATASETS.TRAIN = cfg.DATASETS.TEST = (f"fuzz{seed}",)
    report = check_data(cfg, workers=1, progress=False)
    json.dumps({**report, "findings": [vars(finding) for finding in report["findings"]]})
    text_of(report).encode("utf-8")
    try:
        scan_coco_json(str(path), str(coco_folder))
    except ValueError:
        assert report["status"] == 2


def test_the_corruptions_do_both(coco_folder: Path) -> None:
    """Some corrupted files must still be read and many refused, or the test above shows nothing."""
    read = 0
    for seed in range(200):
        (coco_folder / "fuzz.json").write_bytes(corrupted(random.Random(seed)))
        try:
            scan_coco_json(str(coco_folder / "fuzz.json"), str(coco_folder))
            read += 1
        except ValueError:
            pass
    assert 40 < read < 160


def noise(height: int = 40, width: int = 50) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def turned() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return encoded(noise(50, 40), "JPEG", exif=exif)


IMAGES: dict[str, tuple[bytes, tuple[int, int], bool]] = {
    # content, width and height in the annotation file, whether it can be used
    "truncated png": (encoded(noise())[:900], (50, 40), False),
    "truncated jpeg": (encoded(noise(), "JPEG")[:600], (50, 40), False),
    "zero bytes": (b"", (50, 40), False),
    "zeros": (bytes(5000), (50, 40), False),
    "text": (b"<html>404</html>", (50, 40), False),
    "cmyk": (encoded(noise().convert("CMYK"), "JPEG"), (50, 40), True),
    "16-bit": (encoded(Image.fromarray(np.full((40, 50), 1000, np.uint16))), (50, 40), False),
    "float": (encoded(Image.fromarray(np.full((40, 50), 0.5, np.float32)), "TIFF"), (50, 40), False),
    "palette": (encoded(noise().convert("P")), (50, 40), True),
    "palette with transparency": (encoded(noise().convert("P"), transparency=0), (50, 40), True),
    "grey with alpha": (encoded(noise().convert("LA")), (50, 40), True),
    "one bit": (encoded(noise().convert("1")), (50, 40), True),
    "gif": (encoded(noise(), "GIF"), (50, 40), True),
    "turned by exif": (turned(), (50, 40), True),
    "turned by exif, size of the file": (turned(), (40, 50), False),
    "1x1": (encoded(noise(1, 1)), (1, 1), True),
    "10000x20": (encoded(noise(20, 10000)), (10000, 20), True),
    "20x10000": (encoded(noise(10000, 20)), (20, 10000), True),
    "10000x1": (encoded(noise(1, 10000)), (10000, 1), True),
    "another size": (encoded(noise()), (51, 40), False),
}


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("crop", [False, True])
@pytest.mark.parametrize("name", IMAGES)
def test_an_odd_image(name: str, crop: bool, coco_folder: Path) -> None:
    content, (width, height), usable = IMAGES[name]
    (coco_folder / "odd.png").write_bytes(content)
    images = [{"id": 1, "file_name": "odd.png", "width": width, "height": height}]
    box = [0.2 * width, 0.2 * height, 0.5 * width, 0.6 * height]
    annotations = [{"id": 1, "image_id": 1, "category_id": 7, "bbox": box}]
    path = own_data.write(coco_folder, {"images": images, "annotations": annotations}, "odd.json")
    cfg = tiny.cfg_of("DETR")
    cfg.DATASETS.COCO_FORMAT = [["odd", path, str(coco_folder)]]
    cfg.DATASETS.TRAIN = ("odd",)
    cfg.INPUT.CROP.ENABLED, cfg.INPUT.CROP.TYPE, cfg.INPUT.CROP.SIZE = crop, "absolute_range", [38, 60]
    cfg.INPUT.CROP.RESIZE, cfg.INPUT.MIN_SIZE_TRAIN, cfg.INPUT.MAX_SIZE_TRAIN = [40, 50], (48, 64), 133
    cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST = 64, 133
    register_datasets(cfg)
    record = training_dicts(cfg)[0]
    mappers = [DETRDatasetMapper(cfg, is_train) for is_train in (True, True, True, True, False)]
    if not usable:
        for mapper in mappers:
            with pytest.raises(ValueError, match=r"odd\.png"):
                mapper(record)
        return
    for mapper in mappers:
        mapped = mapper(record)
        assert min(mapped["image"].shape) >= 1 and max(mapped["image"].shape) <= 133
        assert (mapped["height"], mapped["width"]) == (height, width)
        if "instances" in mapped:
            assert len(mapped["instances"]) == 1 or crop


@pytest.mark.parametrize("name", tiny.DETECTORS)
def test_images_of_one_row_column_or_pixel_go_through_every_detector(name: str) -> None:
    cfg = tiny.cfg_of(name)
    cfg.MODEL.BACKBONE.NAME, cfg.MODEL.BACKBONE.FREEZE_AT = "build_torchvision_resnet_backbone", 0
    cfg.MODEL.RESNETS.DEPTH, cfg.MODEL.RESNETS.RES2_OUT_CHANNELS, cfg.MODEL.RESNETS.NORM = 18, 64, "FrozenBN"
    if cfg.MODEL.RESNETS.OUT_FEATURES == ["res4"]:  # Detectron2's default; a detector of several levels says its own
        cfg.MODEL.RESNETS.OUT_FEATURES = ["res5"]
    model = build_model(cfg)
    images = [tiny.image(*size, 2, seed=i) for i, size in enumerate([(1, 133), (133, 1), (1, 1), (64, 48)])]
    losses = model(images)
    assert losses and all(torch.isfinite(loss) for loss in losses.values())
    model.eval()
    for i, image in enumerate(images):
        (alone,) = model([image])
        assert torch.isfinite(alone["instances"].scores).all(), i


def test_datasets_of_the_tests_are_forgotten() -> None:
    assert not any(name.startswith(("fuzz", "odd")) for name in [*DatasetCatalog.list(), *MetadataCatalog.list()])
