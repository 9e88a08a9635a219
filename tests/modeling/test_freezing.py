"""Frozen by name: not in the optimizer, bit-equal after steps, statistics included; mistakes are named."""

from __future__ import annotations

import pytest
import tiny
import torch
from detectron2.modeling import build_model
from torch import nn

from detr_family.engine.optimizer import build_optimizer
from detr_family.modeling.freezing import freeze, keep_frozen_statistics


@pytest.mark.parametrize("name", tiny.DETECTORS)
def test_what_is_frozen_by_name_stays_bit_equal_and_is_not_in_the_optimizer(name: str) -> None:
    cfg = tiny.cfg_of(name)
    cfg.MODEL.DETR.FREEZE = [r"^backbone\.", r"encoder\.layers\.\d"]
    model = build_model(cfg).train()
    optimizer = build_optimizer(cfg, model)
    trained = {id(p) for group in optimizer.param_groups for p in group["params"]}
    before = {key: value.clone() for key, value in model.state_dict().items()}
    sum(model(tiny.batch()).values()).backward()
    optimizer.step()
    frozen = 0
    for key, parameter in model.named_parameters():
        is_frozen = key.startswith("backbone.") or ".encoder.layers." in key
        assert (id(parameter) in trained) != is_frozen, key
        assert torch.equal(model.state_dict()[key], before[key]) == is_frozen, key
        frozen += is_frozen
    assert frozen > 10


def test_an_expression_without_a_match_names_similar_parameters() -> None:
    cfg = tiny.cfg_of("DETR")
    cfg.MODEL.DETR.FREEZE = [r"^backbone\.", "transformer.encodr"]
    with pytest.raises(ValueError, match=r"FREEZE has 'transformer\.encodr'.*similar:.*transformer\.encoder"):
        build_model(cfg)
    cfg.MODEL.DETR.FREEZE = ["layers.(0"]
    with pytest.raises(ValueError, match=r"FREEZE has 'layers\.\(0', no regular expression"):
        build_model(cfg)


class Normed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 5, 1), nn.BatchNorm2d(5))
        self.body = nn.Sequential(nn.Conv2d(5, 5, 1), nn.BatchNorm2d(5))

    def train(self, mode: bool = True) -> Normed:
        super().train(mode)
        keep_frozen_statistics(self)
        return self

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.body(self.stem(x))


def test_batch_norms_with_frozen_weights_keep_their_statistics() -> None:
    model = Normed()
    assert freeze(model, ["stem"]) == ["stem.0.weight", "stem.0.bias", "stem.1.weight", "stem.1.bias"]
    before = {key: value.clone() for key, value in model.state_dict().items()}
    model.train()(torch.randn(2, 3, 7, 7))
    changed = {key for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
    assert changed == {"body.1.running_mean", "body.1.running_var", "body.1.num_batches_tracked"}
    model.eval()
    assert not model.body.training and model.train().body[1].training
