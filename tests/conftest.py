"""What the tests share."""

from collections.abc import Iterator
from pathlib import Path

import own_data
import pytest
import torch
from detectron2.config import CfgNode, get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog
from PIL import Image

from detr_family import add_detr_family_config

torch.set_num_threads(2)


@pytest.fixture
def cfg() -> CfgNode:
    """Detectron2's configuration with detr_family's keys, on the CPU."""
    cfg = get_cfg()
    add_detr_family_config(cfg)
    cfg.MODEL.DEVICE = "cpu"
    return cfg


@pytest.fixture
def coco_folder(tmp_path: Path) -> Iterator[Path]:
    """A folder with the pictures of `own_data`; data sets registered in the test are forgotten after it."""
    for image in own_data.IMAGES:
        Image.new("RGB", (image["width"], image["height"])).save(tmp_path / image["file_name"])
    known = set(DatasetCatalog.list())
    yield tmp_path
    for name in set(DatasetCatalog.list()) - known:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)
