"""README's snippet: right for any checkpoint, or the error of --eval-only."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from detectron2.data import DatasetCatalog

from detr_family.checkpoint import DETRCheckpointer
from detr_family.checkpoint.releases import COCO_IDS, COCO_NAMES
from detr_family.inference import Predictor

README = Path(__file__).resolve().parents[2] / "README.md"
NAMES = ["red", "white", "platelet"]


def run_config(name: str) -> Any:
    """What a training on three classes leaves as config.yaml: its datasets are not registered here."""
    cfg = tiny.cfg_of(name)
    cfg.MODEL.DETR.NUM_CLASSES = -1
    cfg.DATASETS.COCO_FORMAT = [["gone_train", "gone/train.json", "gone"], ["gone_val", "gone/val.json", "gone"]]
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = ("gone_train",), ("gone_val",)
    cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST = 64, 96
    return cfg


@pytest.mark.parametrize("name", tiny.DETECTORS)
def test_the_snippet_of_the_readme(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder = Path("output/cells")
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(run_config(name).dump())
    DETRCheckpointer(tiny.build(name), str(folder), class_names=NAMES).save("model_best")
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    (code,) = [block for block in blocks if "Predictor" in block]
    space: dict[str, Any] = {"image": np.zeros((40, 60, 3), np.uint8)}
    exec(code, space)
    predictor, instances = space["predictor"], space["instances"]
    assert predictor.model.num_classes == 3 and predictor.class_names == NAMES
    assert len(instances) and set(predictor.names(instances)) <= set(NAMES)
    assert "gone_train" not in DatasetCatalog.list()


def test_an_authors_file(tmp_path: Path) -> None:
    """91 rows and no-object, torchvision's names: 80 classes here, with COCO's names."""
    cfg = run_config("DETR")
    model = tiny.build("DETR", NUM_CLASSES=91)
    state = {re.sub(r"^backbone\.", "backbone.0.", k): v for k, v in model.state_dict().items()}
    torch.save({"model": state}, tmp_path / "release.pth")
    predictor = Predictor.from_config(cfg, tmp_path / "release.pth")
    assert predictor.model.num_classes == 80 and predictor.class_names == COCO_NAMES
    assert torch.equal(predictor.model.class_embed.bias, model.class_embed.bias[[*COCO_IDS, 91]])


def test_what_does_not_fit_is_the_error_of_an_evaluation(tmp_path: Path) -> None:
    DETRCheckpointer(tiny.build("DETR"), str(tmp_path), class_names=NAMES).save("detr")
    path = str(tmp_path / "detr.pth")
    with pytest.raises(ValueError) as predicting:
        Predictor.from_config(run_config("ConditionalDETR"), path)
    with pytest.raises(ValueError) as evaluating:
        DETRCheckpointer(tiny.build("ConditionalDETR"), whole=True).load(path)
    assert str(predicting.value) == str(evaluating.value)
    assert "does not fit ConditionalDETR as configured" in str(predicting.value)
