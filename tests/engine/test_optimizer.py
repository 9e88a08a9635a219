"""Two learning rates, one weight decay, nothing frozen."""

import pytest
import tiny
import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model

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


def test_a_learned_spatial_encoding_is_of_the_backbones_group(cfg: CfgNode) -> None:
    """The release holds it in the backbone, and gives whatever is in there a rate of 1e-5."""
    cfg.merge_from_list(["SOLVER.BASE_LR", 1e-4, "SOLVER.BACKBONE_MULTIPLIER", 0.1])
    detr = tiny.cfg_of("DETR")
    detr.MODEL.DETR.SPATIAL_ENCODING.TYPE = "learned"
    model = build_model(detr)
    rates = {id(p): group["lr"] for group in build_optimizer(cfg, model).param_groups for p in group["params"]}
    assert [rates[id(p)] for p in model.position_encoding.parameters()] == pytest.approx([1e-5] * 2)
    assert rates[id(model.query_embed.weight)] == pytest.approx(1e-4)


def test_on_a_cpu_it_is_torchs_fused_one(cfg: CfgNode) -> None:
    model, other = tiny.build("DETR"), tiny.build("DETR")
    optimizer = build_optimizer(cfg, model)
    assert all(group["fused"] for group in optimizer.param_groups)
    plain = torch.optim.AdamW(
        [{"params": g["params"], "lr": g["lr"]} for g in build_optimizer(cfg, other).param_groups],
        weight_decay=cfg.SOLVER.WEIGHT_DECAY,
    )
    for step in range(3):
        for first, second in zip(model.parameters(), other.parameters(), strict=True):
            generator = torch.Generator().manual_seed(step)
            first.grad = torch.randn(first.shape, generator=generator)
            second.grad = first.grad.clone()
        optimizer.step()
        plain.step()
    for first, second in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(first, second, atol=1e-6, rtol=1e-5)


def test_everything_frozen_is_refused(cfg: CfgNode) -> None:
    model = tiny.build("DETR").requires_grad_(False)
    with pytest.raises(ValueError, match="FREEZE_AT"):
        build_optimizer(cfg, model)


def test_single_parameters_have_a_rate_of_their_own_by_name(cfg: CfgNode) -> None:
    model = tiny.build("DABDETR")
    cfg.SOLVER.BASE_LR, cfg.SOLVER.BACKBONE_MULTIPLIER = 1e-2, 0.1
    cfg.SOLVER.LR_FACTORS = [["linear1|res5", 0.5], ["decoder", 0.25]]
    rates = {id(p): group["lr"] for group in build_optimizer(cfg, model).param_groups for p in group["params"]}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        factor = 0.5 if "linear1" in name or "res5" in name else 0.25 if "decoder" in name else 1.0
        base = 1e-3 if name.startswith("backbone.") else 1e-2
        assert rates[id(parameter)] == pytest.approx(base * factor), name


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (["nothing_of_that_name", 0.1], "'nothing_of_that_name', which no parameter's name matches"),
        (["linear1"], r"\['linear1'\]; each entry must be"),
        (["linear1", "slow"], "each entry must be"),
        (["(", 0.1], "each entry must be"),
    ],
)
def test_wrong_factors_are_named(cfg: CfgNode, entry: list, message: str) -> None:
    cfg.SOLVER.LR_FACTORS = [entry]
    with pytest.raises(ValueError, match=rf"SOLVER\.LR_FACTORS has .*{message}"):
        build_optimizer(cfg, tiny.build("DETR"))
