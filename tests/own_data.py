"""A small COCO-format dataset, with whatever fault a test wants in it."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from PIL import Image

# Ids with holes, not in order; two images with objects, one without.
CATEGORIES = [{"id": 7, "name": "red"}, {"id": 3, "name": "white"}, {"id": 100, "name": "platelet"}]
IMAGES = [
    {"id": 21, "file_name": "b.png", "width": 50, "height": 40},
    {"id": 4, "file_name": "a.png", "width": 60, "height": 30},
    {"id": 9, "file_name": "c.png", "width": 20, "height": 20},
]
ANNOTATIONS = [
    {"id": 0, "image_id": 21, "category_id": 100, "bbox": [5, 6, 20, 10], "area": 150, "iscrowd": 0},
    {"id": 1, "image_id": 4, "category_id": 3, "bbox": [1.5, 2, 8, 9], "area": 72, "iscrowd": 0},
    {"id": 2, "image_id": 4, "category_id": 7, "bbox": [30, 10, 12, 13], "area": 156, "iscrowd": 0},
]


def write(folder, changes=None, name="train.json", without=()):
    data = {"images": IMAGES, "annotations": ANNOTATIONS, "categories": CATEGORIES, **(changes or {})}
    data = {key: value for key, value in data.items() if key not in without}
    (folder / name).write_text(json.dumps(data))
    return str(folder / name)


@pytest.fixture
def coco_folder(tmp_path: Path) -> Iterator[Path]:
    """A folder with the images of IMAGES; datasets registered in the test are forgotten after it."""
    for image in IMAGES:
        Image.new("RGB", (image["width"], image["height"])).save(tmp_path / image["file_name"])
    known = set(DatasetCatalog.list())
    yield tmp_path
    for name in set(DatasetCatalog.list()) - known:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)
