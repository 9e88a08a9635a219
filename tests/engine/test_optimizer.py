"""Two learning rates, one weight decay, nothing frozen."""

import pytest
import tiny
import torch
from detectron2.config import CfgNode

from detr_family.engine.optimizer import build_optimizer


def test_groups(cfg: CfgNode) -> None:
    cfg.merge_from_list(["SOLVER.BASE_LR", 1e-4, "SOLVER.BACKBONE_MULTIPLIER", 0.1, "SOLVER.WEIGHT_DECAY", 1e-4])
    model = tiny.build("DETR")
    optimizer = build_optimizer(cfg, model)
    assert isinstance(optimizer, torch.optim.AdamW)
    rates = {id(p): g["lr"] for g in optimizer.param_groups for p in g["params"]}
    for name, p in model.named_parameters():
        if not p.requires_grad:
            assert id(p) not in rates, name
        else:
            assert rates[id(p)] == pytest.approx(1e-5 if name.startswith("backbone.") else 1e-4), name
    assert {g["weight_decay"] for g in optimizer.param_groups} == {1e-4}  # norms and biases included


def test_everything_frozen_is_refused(cfg: CfgNode) -> None:
    model = tiny.build("DETR").requires_grad_(False)
    with pytest.raises(ValueError, match="FREEZE_AT"):
        build_optimizer(cfg, model)
