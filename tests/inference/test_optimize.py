"""A detector prepared for inference gives the results of the plain one."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from detectron2.modeling import build_model
from predicting import NAMES, config
from torch import nn

from detr_family.checkpoint import DETRCheckpointer
from detr_family.inference import Predictor
from detr_family.inference import preparing as module
from detr_family.inference.preparing import optimize
from detr_family.layers import prepared
from detr_family.layers.prepared import PreparedConv2d, PreparedFeedForward, PreparedLinear


@pytest.fixture(params=[True, False], ids=["packed", "plain"])
def packed(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether linear layers are replaced, whatever this processor likes better."""
    monkeypatch.setattr(module, "_packed_linear_is_faster", lambda: request.param)
    return bool(request.param)


def resnet(name: str, depth: int) -> Any:
    cfg = tiny.cfg_of(name)
    cfg.MODEL.BACKBONE.NAME = "build_torchvision_resnet_backbone"
    cfg.MODEL.RESNETS.DEPTH = depth
    cfg.MODEL.RESNETS.RES2_OUT_CHANNELS = 64 if depth < 50 else 256
    cfg.MODEL.RESNETS.NORM = "FrozenBN"
    cfg.MODEL.RESNETS.STRIDE_IN_1X1 = False
    cfg.MODEL.RESNETS.OUT_FEATURES = ["res4", "res5"] if name == "DINO" else ["res5"]
    torch.manual_seed(3)
    model = build_model(cfg).eval()
    generator = torch.Generator().manual_seed(4)
    for layer in model.modules():
        if "FrozenBatchNorm2d" in type(layer).__name__:  # norms that do something
            layer.weight.copy_(0.5 + torch.rand(layer.weight.shape, generator=generator))
            layer.bias.copy_(0.1 * torch.randn(layer.bias.shape, generator=generator))
            layer.running_mean.copy_(0.1 * torch.randn(layer.bias.shape, generator=generator))
            layer.running_var.copy_(0.5 + torch.rand(layer.bias.shape, generator=generator))
    return model


def outputs(model: Any, counts: tuple[int, ...] = (3, 2)) -> Any:
    with torch.no_grad():
        prediction = model.predict(model.preprocess_image(tiny.batch(counts)))
    return prediction.logits.float(), prediction.boxes.float()


@pytest.mark.parametrize("name", tiny.DETECTORS)
def test_results_are_those_of_the_plain_detector(name: str, packed: bool) -> None:
    model = tiny.build(name).eval()
    for counts in ((3,), (3, 2)):
        plain = outputs(model, counts)
        for a, b in zip(plain, outputs(optimize(copy.deepcopy(model)), counts), strict=True):
            torch.testing.assert_close(b, a, atol=1e-4, rtol=0)


@pytest.mark.parametrize("depth", [18, 50])
def test_a_resnets_norms_are_folded(depth: int, packed: bool) -> None:
    model = resnet("DETR", depth)
    images = model.preprocess_image(tiny.batch((1,))).tensor
    with torch.no_grad():
        plain = model.backbone(images)["res5"]
        found = optimize(model).backbone(images)["res5"]
    torch.testing.assert_close(found, plain, atol=1e-4 * float(plain.abs().max()), rtol=0)
    convolutions = [m for m in model.backbone.modules() if isinstance(m, PreparedConv2d)]
    assert len(convolutions) == {18: 20, 50: 53}[depth]
    assert not any("BatchNorm" in type(m).__name__ for m in model.backbone.modules())
    again = optimize(model).backbone(images)["res5"]  # what is prepared stays so
    torch.testing.assert_close(again, found, atol=0, rtol=0)


def test_heads_that_are_one_module_stay_one(packed: bool) -> None:
    model = resnet("DINO", 18)
    plain = outputs(model)
    for a, b in zip(plain, outputs(optimize(model)), strict=True):
        torch.testing.assert_close(b, a, atol=1e-3, rtol=0)
    if packed:
        assert not any(type(m) is nn.Linear for m in model.modules())
        assert any(isinstance(m, PreparedFeedForward) for m in model.modules())


def test_a_feed_forward_network_in_pieces_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = nn.Linear(8, 16), nn.Linear(16, 8)
    x = torch.randn(3, 100, 8)
    expected = second(nn.functional.gelu(first(x)))
    network = PreparedFeedForward(first, nn.GELU(), second)
    network.chunk = 7
    torch.testing.assert_close(network(x), expected, atol=1e-5, rtol=1e-5)
    assert network(x[:0]).shape == (0, 100, 8)


@pytest.mark.parametrize("name", tiny.DETECTORS)
def test_every_detector_runs_in_bfloat16(name: str, packed: bool) -> None:
    logits, boxes = outputs(optimize(tiny.build(name), precision="bfloat16"))
    assert torch.isfinite(logits).all() and torch.isfinite(boxes).all()


def test_bfloat16_is_near(packed: bool) -> None:
    model = resnet("DETR", 18)
    plain = outputs(model)
    for a, b in zip(plain, outputs(optimize(model, precision="bfloat16")), strict=True):
        assert 0 < float((a - b).abs().max()) < 0.1
    linear = [m for m in model.modules() if isinstance(m, PreparedLinear)]
    assert {m.dtype for m in linear} == {torch.bfloat16, torch.float32}  # the heads are of float32


def test_it_holds_no_weights_twice(packed: bool) -> None:
    model = resnet("DETR", 18)

    def bytes_of(m: Any) -> int:
        return sum(t.numel() * t.element_size() for t in (*m.parameters(), *m.buffers()))

    before = bytes_of(model)
    assert bytes_of(optimize(model)) <= before * 1.02


def test_what_cannot_be_is_said() -> None:
    model = tiny.build("DETR")
    with pytest.raises(ValueError, match="precision is 'int4'; it may be 'float32' or 'bfloat16'"):
        optimize(model, precision="int4")
    with pytest.raises(ValueError, match="cannot be trained"):
        optimize(model).train()


def test_a_torch_without_the_kernels_leaves_the_detector_alone(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(module, "kernels_work", lambda: False)
    model = optimize(tiny.build("DETR"))
    assert not any(isinstance(m, PreparedLinear) for m in model.modules())
    assert "prepacked" in caplog.text


def test_the_kernels_are_tried_before_they_are_trusted(monkeypatch: pytest.MonkeyPatch) -> None:
    assert prepared.kernels_work()
    prepared.kernels_work.cache_clear()
    monkeypatch.setattr(prepared.PreparedLinear, "forward", lambda self, x: x.new_zeros((*x.shape[:-1], 5)))
    assert not prepared.kernels_work()
    prepared.kernels_work.cache_clear()


def test_the_predictor_prepares_its_detector(tmp_path: Path, packed: bool) -> None:
    DETRCheckpointer(tiny.build("DETR"), str(tmp_path), class_names=NAMES).save("model")
    image = np.random.default_rng(0).integers(0, 256, (50, 80, 3), dtype=np.uint8)
    found = {
        how: Predictor.from_config(config("DETR"), tmp_path / "model.pth", optimize=how)(image)
        for how in ("", "float32")
    }
    torch.testing.assert_close(found["float32"].scores, found[""].scores, atol=1e-4, rtol=0)
    torch.testing.assert_close(found["float32"].pred_boxes.tensor, found[""].pred_boxes.tensor, atol=1e-2, rtol=0)
    with pytest.raises(ValueError, match="precision is 'half'"):
        Predictor.from_config(config("DETR"), tmp_path / "model.pth", optimize="half")
