"""What the tests share."""

import os

import pytest
import torch
from detectron2.config import CfgNode, get_cfg
from own_data import coco_folder  # noqa: F401  (a fixture)

from detr_family import add_detr_family_config

torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))  # more would wait for each other on a busy machine


@pytest.fixture
def cfg() -> CfgNode:
    """Detectron2's configuration with detr_family's keys, on the CPU."""
    cfg = get_cfg()
    add_detr_family_config(cfg)
    cfg.MODEL.DEVICE = "cpu"
    return cfg
