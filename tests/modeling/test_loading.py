"""Detectron2's own checkpointer and predictor on our detectors: right, or an error."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.engine import DefaultPredictor
from torch import nn

from detr_family.checkpoint import DETRCheckpointer


def saved(tmp_path: Path, state: dict[str, Any]) -> str:
    path = tmp_path / "model.pth"
    torch.save({"model": state}, path)
    return str(path)


@pytest.mark.parametrize("name", tiny.DETECTORS)
def test_a_whole_checkpoint_loads(name: str, tmp_path: Path) -> None:
    model = tiny.build(name)
    state = {k: v + 1 for k, v in model.state_dict().items()}
    DetectionCheckpointer(model).load(saved(tmp_path, state))
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize("name", tiny.DETECTORS)
def test_other_classes_are_an_error(name: str, tmp_path: Path) -> None:
    other = tiny.build(name, NUM_CLASSES=5)
    with pytest.raises(ValueError, match=r"class_embed.*would stay untrained.*NUM_CLASSES is 3 here.*Predictor"):
        DetectionCheckpointer(tiny.build(name)).load(saved(tmp_path, other.state_dict()))


def test_another_backbone_is_an_error(tmp_path: Path) -> None:
    """As a paper's release, whose detector has our names and whose backbone has not."""
    model = tiny.build("DETR")
    before = {k: v.clone() for k, v in model.state_dict().items()}
    state = {k.replace("backbone.", "backbone.0.body."): v + 1 for k, v in before.items()}
    with pytest.raises(ValueError, match=r"weights of DETR are not in the checkpoint.*backbone\.res5"):
        DetectionCheckpointer(model).load(saved(tmp_path, state))
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_names_of_nothing_here_are_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="would stay untrained"):
        DetectionCheckpointer(tiny.build("DETR")).load(saved(tmp_path, {"model.encoder.weight": torch.zeros(2)}))


def test_a_backbone_alone_and_nothing_at_all_may_be_loaded(tmp_path: Path) -> None:
    model = tiny.build("DETR")
    state = {k: v + 1 for k, v in model.state_dict().items() if k.startswith("backbone.")}
    DetectionCheckpointer(model).load(saved(tmp_path, state))
    assert torch.equal(model.state_dict()["backbone.res5.weight"], state["backbone.res5.weight"])
    DetectionCheckpointer(model).load("")


def test_a_part_on_purpose(tmp_path: Path) -> None:
    model = tiny.build("DETR")
    part = {"query_embed.weight": torch.ones_like(model.query_embed.weight)}
    with pytest.raises(ValueError, match="would stay untrained"):
        model.load_state_dict(part, strict=False)
    DETRCheckpointer(model, strict=False).load(saved(tmp_path, part))
    assert model.query_embed.weight.eq(1).all()
    assert not model.allow_partial_weights
    model.allow_partial_weights = True
    assert model.load_state_dict({"query_embed.weight": part["query_embed.weight"] + 1}, strict=False).missing_keys
    assert model.query_embed.weight.eq(2).all()


def test_a_detector_within_another_module() -> None:
    wrapped = nn.ModuleDict({"detector": tiny.build("DETR")})
    state = wrapped.state_dict()
    wrapped.load_state_dict(state, strict=False)
    del state["detector.class_embed.bias"]
    with pytest.raises(ValueError, match=r"1 weights of DETR .*\(class_embed\.bias\)"):
        wrapped.load_state_dict(state, strict=False)


def test_detectron2s_predictor(tmp_path: Path) -> None:
    cfg = tiny.cfg_of("DETR")
    cfg.DATASETS.TEST = ()
    cfg.MODEL.WEIGHTS = saved(tmp_path, tiny.build("DETR").state_dict())
    image = np.zeros((40, 60, 3), np.uint8)
    assert DefaultPredictor(cfg)(image)["instances"].pred_classes.max() < 3
    cfg.MODEL.DETR.NUM_CLASSES = 80
    with pytest.raises(ValueError, match="would stay untrained"):
        DefaultPredictor(cfg)
