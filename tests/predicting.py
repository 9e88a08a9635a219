"""What the tests of predictor and demo share."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny
from detectron2.config import CfgNode

from detr_family.config import projects

NAMES = ["red", "white", "platelet"]


def config(name: str) -> CfgNode:
    cfg = tiny.cfg_of(name)
    cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST = 64, 96
    cfg.MODEL.DETR.NUM_CLASSES = -1
    cfg.DATASETS.TRAIN = cfg.DATASETS.TEST = ()
    return cfg


def config_text(name: str) -> str:
    """`config(name)` as a file for another process, which has not imported the projects that other tests have."""
    cfg = config(name)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(projects, "_added", [])
        plain = config(name)
    for group in cfg.MODEL.keys() - plain.MODEL.keys():
        del cfg.MODEL[group]
    return str(cfg.dump())


class Bomb:
    """Touches a file when unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return (Path.touch, (self.path,))
