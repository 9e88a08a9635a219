"""Gradients under autocast in bfloat16: every parameter has one, as large and of the direction that float32's has.

DINO runs `enc_output` and its class head twice in one autocast region, without gradients to choose tokens and with
gradients over the chosen ones. Autocast casts a weight once for a region; torch 2.10, the oldest that setup.py admits,
takes the cast that was made without gradients for the second run too, and loses that run's gradients.
"""

from __future__ import annotations

from typing import Any

import pytest
import tiny
import torch
from torch import Tensor

from detr_family.modeling import dino
from detr_family.modeling.set_detector import SetDetector

MODELS = 12  # over which bfloat16's noise is averaged


def gradients(model: SetDetector, *, autocast: bool) -> dict[str, Tensor]:
    model.zero_grad(set_to_none=True)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        losses = model(tiny.batch())
    sum(losses.values()).backward()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert not [name for name, p in trained.items() if p.grad is None]
    return {name: p.grad for name, p in trained.items()}


def decide_once(model: SetDetector, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokens are chosen and sets matched in the first pass; the next ones take over what it decided."""
    decided: dict[str, Any] = {}
    best, matcher = dino.best_tokens, model.matcher
    monkeypatch.setattr(dino, "best_tokens", lambda *a, **k: decided.setdefault("tokens", best(*a, **k)))
    monkeypatch.setattr(model, "matcher", lambda *a: decided.setdefault("pairs", matcher(*a)))


def test_every_gradient_of_dino_is_float32s_within_two_percent(monkeypatch: pytest.MonkeyPatch) -> None:
    share: dict[str, float] = {}
    for seed in range(MODELS):
        model = tiny.quiet("DINO").train()
        torch.manual_seed(seed)
        with torch.no_grad():
            for p in model.parameters():  # away from initial zeros, behind which nothing is felt
                p.add_(0.04 * torch.randn_like(p))
        with monkeypatch.context() as patch:
            decide_once(model, patch)
            exact, rough = gradients(model, autocast=False), gradients(model, autocast=True)
        for name, gradient in exact.items():  # 1, but for the noise; 0 where the gradient is lost
            along = (rough[name] * gradient).sum() / gradient.square().sum()
            share[name] = share.get(name, 0.0) + along.item() / MODELS
    assert {"transformer.enc_output.weight", "transformer.enc_out_class_embed.weight"} <= share.keys()
    assert {name: x for name, x in share.items() if not abs(x - 1) < 0.02} == {}
