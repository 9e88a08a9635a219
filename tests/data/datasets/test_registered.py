"""Datasets that are registered in Python: what their functions give is looked at before a training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import BoxMode
from engine_runs import run_cfg
from PIL import Image

from detr_family.data.datasets.coco import check_test_sets, training_dicts
from detr_family.data.datasets.registered import check_records
from detr_family.engine import Trainer

BOX = {"bbox": [5, 5, 20, 30], "bbox_mode": BoxMode.XYXY_ABS, "category_id": 1}


def records(**keys: Any) -> list[dict[str, Any]]:
    """Two good records; in the second these keys are others, and those that are None are left out."""
    good = {"file_name": "a.png", "height": 40, "width": 50, "annotations": [BOX]}
    second = {**good, "image_id": 1, **keys}
    return [{**good, "image_id": 0}, {k: v for k, v in second.items() if v is not None}]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (None, "gives a NoneType: it must return a list of dicts"),
        ((x for x in records()), "gives a generator: it must return a list of dicts"),
        ([], "gives an empty list"),
        (["a.png"], "gives a str at place 0, not a dict"),
        (records(image_id=None), r"at place 1 \(a\.png\) no image_id, which COCO's evaluation needs"),
        (records(width=None, height=None), "no height and no width"),
        (records(image_id=np.int64(3)), "the image_id .*3.*, a int64, which no file of results can hold"),
        (records(image_id=0), "gives the image_id 0 2 times"),
        (records(annotations=[{**BOX, "bbox_mode": None}]), "an annotation without bbox_mode"),
        (records(annotations=[{"segmentation": [], "category_id": 1}]), "an annotation without bbox:"),
        (records(annotations=[{**BOX, "bbox_mode": BoxMode.XYXY_REL}]), "in the mode XYXY_REL: boxes are upright"),
        (
            records(annotations=[{**BOX, "bbox": [9, 9, 4, 5, 45], "bbox_mode": BoxMode.XYWHA_ABS}]),
            "a box of 5 numbers",
        ),
        (records(annotations=[{**BOX, "category_id": 2}]), "category_id 2: .* 0 to 1, as thing_classes has 2 names"),
        (records(annotations=[{**BOX, "category_id": 0.5}]), "category_id 0.5"),
    ],
    ids=lambda x: x if isinstance(x, str) else type(x).__name__,
)
def test_what_cannot_be_is_told(given: Any, message: str) -> None:
    with pytest.raises(ValueError, match=f"the function that DatasetCatalog has for 'mine' .*{message}"):
        check_records("mine", given, 2, evaluated=True)


@pytest.mark.parametrize("keys", [{}, {"image_id": "1"}, {"annotations": []}, {"file_name": Path("a.png")}], ids=str)
def test_what_can_be_is_not(keys: dict[str, Any]) -> None:
    check_records("mine", records(**keys), 2, evaluated=True)
    check_records("mine", records(image_id=None, width=None), 0, evaluated=False)


@pytest.fixture
def registered(tmp_path: Path) -> Any:
    """Registers records under a name, as a user does, and gives a run's configuration on them."""
    Image.new("RGB", (50, 40)).save(tmp_path / "a.png")
    name = f"registered {tmp_path}"

    def register(given: list[dict[str, Any]]) -> CfgNode:
        DatasetCatalog.register(name, lambda: given)
        MetadataCatalog.get(name).thing_classes = ["a", "b"]
        cfg = run_cfg("DETR", tmp_path, "run", ["SOLVER.MAX_ITER", 1, "SOLVER.STEPS", (), "VIS_REPORT", False])
        cfg.DATASETS.TRAIN = cfg.DATASETS.TEST = (name,)
        return cfg

    yield register
    DatasetCatalog.remove(name)


def test_a_training_and_its_evaluation_tell_it_first(registered: Any, tmp_path: Path) -> None:
    cfg = registered(records(annotations=[{**BOX, "category_id": 2}], file_name=str(tmp_path / "a.png")))
    with pytest.raises(ValueError, match="annotation of category_id 2"):  # in place of Detectron2's assertion
        training_dicts(cfg)
    with pytest.raises(ValueError, match=r"in DATASETS\.TEST cannot be evaluated on: .*annotation of category_id 2"):
        check_test_sets(cfg)


def test_ids_of_images_may_be_texts(registered: Any, tmp_path: Path) -> None:
    """As Detectron2 says; COCO's fast implementations take numbers alone."""
    file = str(tmp_path / "a.png")
    given = [{**x, "file_name": file, "image_id": f"image {x['image_id']}"} for x in records()]
    trainer = Trainer(registered(given))
    trainer.train()
    assert 0 <= trainer._last_eval_results["bbox"]["AP"] <= 100
