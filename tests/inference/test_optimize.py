"""A detector prepared for inference gives the results of the plain one."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from detectron2.modeling import build_backbone, build_model
from predicting import NAMES, config
from torch import nn

from detr_family.checkpoint import DETRCheckpointer
from detr_family.errors import UserError
from detr_family.export import export_model
from detr_family.inference import Predictor
from detr_family.inference import preparing as module
from detr_family.inference.preparing import optimize
from detr_family.layers import prepared, winograd
from detr_family.layers.prepared import (
    PreparedConv2d,
    PreparedFeedForward,
    PreparedLinear,
    PreparedPointwise,
    PreparedStem,
)
from detr_family.layers.winograd import WinogradConv2d


@pytest.fixture(params=[True, False], ids=["packed", "plain"])
def packed(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether linear layers are replaced, whatever this processor likes better."""
    monkeypatch.setattr(module, "_packed_linear_is_faster", lambda: request.param)
    monkeypatch.setattr(module, "_winograd_is_faster", lambda: request.param)
    return bool(request.param)


def resnet_cfg(name: str, depth: int) -> Any:
    cfg = tiny.cfg_of(name)
    cfg.MODEL.BACKBONE.NAME = "build_torchvision_resnet_backbone"
    cfg.MODEL.RESNETS.DEPTH = depth
    cfg.MODEL.RESNETS.RES2_OUT_CHANNELS = 64 if depth < 50 else 256
    cfg.MODEL.RESNETS.NORM = "FrozenBN"
    cfg.MODEL.RESNETS.STRIDE_IN_1X1 = False
    cfg.MODEL.RESNETS.OUT_FEATURES = ["res4", "res5"] if name == "DINO" else ["res5"]
    return cfg


def resnet(name: str, depth: int) -> Any:
    cfg = resnet_cfg(name, depth)
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
    convolutions = [
        m for m in model.backbone.modules() if isinstance(m, (PreparedConv2d, PreparedPointwise, WinogradConv2d))
    ]
    assert len(convolutions) == {18: 20, 50: 53}[depth]
    if packed and not winograd.missing_reason:
        kinds = {kind: sum(type(m) is kind for m in convolutions) for kind in {type(m) for m in convolutions}}
        # Of the last stage's 3x3 ones all but one are too large; the stem and strided ones are direct.
        of_18 = {WinogradConv2d: 11, PreparedPointwise: 3, PreparedConv2d: 6}
        assert kinds == {18: of_18, 50: {WinogradConv2d: 12, PreparedPointwise: 36, PreparedConv2d: 5}}[depth]
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
    assert {m.stride for m in model.modules() if isinstance(m, PreparedPointwise)} <= {2}  # others stay oneDNN's
    linear = [m for m in model.modules() if isinstance(m, PreparedLinear)]
    assert {m.dtype for m in linear} == {torch.bfloat16, torch.float32}  # the heads are of float32


def test_it_holds_no_weights_twice(packed: bool) -> None:
    model = resnet("DETR", 18)

    def bytes_of(m: Any) -> int:
        return sum(t.numel() * t.element_size() for t in (*m.parameters(), *m.buffers()))

    before = bytes_of(model)
    after = bytes_of(optimize(model))
    more = sum(m.packed.numel() * 3 for m in model.modules() if isinstance(m, WinogradConv2d))  # 36 values for 9
    assert (more > 0) == packed and more <= module._WINOGRAD_BYTES
    assert after - more <= before * 1.02


def test_what_cannot_be_is_said() -> None:
    model = tiny.build("DETR")
    with pytest.raises(ValueError, match="precision is 'int4'; it may be 'float32' or 'bfloat16'"):
        optimize(model, precision="int4")
    with pytest.raises(ValueError, match=r"weights are torch\.bfloat16; it is prepared from float32"):
        optimize(tiny.build("DETR").bfloat16())


def test_a_prepared_detector_is_for_nothing_else(packed: bool) -> None:
    plain = resnet("DETR", 18)
    model = optimize(copy.deepcopy(plain))
    for use, message in (
        (model.train, "cannot be trained: load it without preparing it .*optimize=False"),
        (model.state_dict, "weights cannot be saved"),
        (lambda: model.load_state_dict(plain.state_dict(), strict=False), "prepared for inference"),
        (model.half, "moved to no other device or type"),
        (lambda: model.to("meta"), "moved to no other device or type"),
    ):
        with pytest.raises(ValueError, match=message):
            use()
    assert model.cpu().float().eval() is model  # what changes nothing may be called
    for a, b in zip(outputs(plain), outputs(model), strict=True):
        torch.testing.assert_close(b, a, atol=1e-3, rtol=0)
    torch.testing.assert_close(model.class_embed.weight, plain.class_embed.weight, atol=0, rtol=0)
    torch.testing.assert_close(model.input_proj.weight, plain.input_proj.weight, atol=0, rtol=0)
    with pytest.raises(UserError, match=r"prepared for inference .* cannot be exported: .*optimize=False"):
        export_model(Predictor(model), "torchscript", "never.ts")


def test_convolutions_of_another_kind_are_left_alone() -> None:
    class Standardised(nn.Conv2d):
        """Scales its weights as it runs."""

    assert not module._foldable(Standardised(3, 4, 3)) and module._foldable(nn.Conv2d(3, 4, 3))


def test_a_torch_without_the_kernels_leaves_the_detector_alone(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
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
    how: tuple[bool | str, ...] = (False, True, "float32", "bfloat16")
    predictors = [Predictor.from_config(config("DETR"), tmp_path / "model.pth", optimize=each) for each in how]
    prepared_ones = [any(isinstance(m, prepared.Prepared) for m in p.model.modules()) for p in predictors]
    assert prepared_ones == [False, True, True, True]
    plain, *found = (predictor(image) for predictor in predictors)
    for other, bound in zip(found, (1e-4, 1e-4, 0.1), strict=True):
        torch.testing.assert_close(other.scores, plain.scores, atol=bound, rtol=0)
    for other in found[:2]:
        torch.testing.assert_close(other.pred_boxes.tensor, plain.pred_boxes.tensor, atol=1e-2, rtol=0)
    assert predictors[0].model.state_dict()
    with pytest.raises(ValueError, match="precision is 'half'"):
        Predictor.from_config(config("DETR"), tmp_path / "model.pth", optimize="half")


def test_winograd_is_the_convolution() -> None:
    for height, width in ((1, 1), (4, 8), (7, 13), (33, 18)):
        conv = nn.Conv2d(5, 6, 3, padding=1)
        x = torch.randn(2, 5, height, width)
        found = WinogradConv2d(conv.weight, conv.bias, relu=True)(x)
        torch.testing.assert_close(found, conv(x).relu(), atol=2e-5, rtol=0)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(WinogradConv2d(conv.weight, conv.bias, relu=True)(x), found)
        plain = WinogradConv2d(conv.weight, None)(x)
        torch.testing.assert_close(plain, nn.functional.conv2d(x, conv.weight, padding=1), atol=2e-5, rtol=0)


@pytest.mark.parametrize("size", [(5, 7), (64, 48), (65, 50), (131, 97)])
def test_the_stem_in_strips_is_the_stem(size: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    weight, bias = torch.randn(4, 3, 7, 7), torch.randn(4)
    x = torch.randn(2, 3, *size)
    y = nn.functional.conv2d(x, weight, bias, stride=2, padding=3).relu()
    expected = nn.functional.max_pool2d(y, kernel_size=3, stride=2, padding=1)
    for strip in (1, 20_000, 1 << 30):
        monkeypatch.setattr(prepared, "_STRIP", strip)
        found = PreparedStem(weight, bias, 2, 3)(x)
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("features", [["res2", "res3", "res4", "res5"], ["stem", "res5"]])
@pytest.mark.parametrize("depth", [18, 50])
def test_blocks_overwrite_nothing_that_is_wanted(
    depth: int, features: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_winograd_is_faster", lambda: True)
    cfg = resnet_cfg("DETR", depth)
    cfg.MODEL.RESNETS.OUT_FEATURES = features
    backbone = build_backbone(cfg).eval()
    x = torch.randn(2, 3, 70, 90)
    before = x.clone()
    with torch.no_grad():
        expected = backbone(x)
        module._prepare_backbone(backbone, torch.float32)
        assert any(isinstance(layer, WinogradConv2d) for layer in backbone.modules())
        for _ in range(2):
            found = backbone(x)
            for name in features:
                bound = 1e-4 * float(expected[name].abs().max())
                torch.testing.assert_close(found[name], expected[name], atol=bound, rtol=0)
    assert torch.equal(x, before)


@pytest.mark.parametrize("native", [True, False])
def test_winograd_takes_no_more_memory_than_it_may(native: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(winograd, "missing_reason", "" if native else "not built")
    monkeypatch.setattr(module, "_winograd_is_faster", lambda: True)
    backbone = build_backbone(resnet_cfg("DETR", 50))

    def channels(dtype: torch.dtype = torch.float32) -> list[int]:
        chosen = module._winograd_convolutions(backbone, dtype)
        return sorted(m.out_channels for m in backbone.modules() if id(m) in chosen)

    small = [64] * 3 if native else []
    every = [*small, *[128] * 3, *[256] * 5, 512]
    assert channels() == every
    assert channels(torch.bfloat16) == (every if native else [])
    monkeypatch.setattr(module, "_WINOGRAD_BYTES", 22 << 20)
    assert channels() == [*small, *[128] * 3, *[256] * 2]
    monkeypatch.setattr(module, "_winograd_is_faster", lambda: False)
    assert not channels()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("relu", [True, False])
def test_a_1x1_convolution_is_a_linear_layer(
    relu: bool, stride: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prepared, "_SUM_CHUNK", 1)  # 64 rows at a time
    conv = nn.Conv2d(5, 6, 1, stride=stride)
    x = torch.randn(2, 5, 13, 17)
    layer = PreparedPointwise(conv.weight, conv.bias, stride, relu=relu, dtype=dtype)
    near = {"atol": 1e-5, "rtol": 1e-5} if dtype == torch.float32 else {"atol": 0.1, "rtol": 0.02}
    expected = conv(x)
    sums = torch.randn_like(expected).contiguous(memory_format=torch.channels_last)
    for add, want in ((None, expected), (sums, expected + sums), (sums.contiguous(), expected + sums)):
        add = None if add is None else add.to(dtype)
        for layout in (torch.contiguous_format, torch.channels_last):
            found = layer(x.contiguous(memory_format=layout), None if add is None else add.clone())
            assert found.dtype == dtype and found.is_contiguous(memory_format=torch.channels_last)
            torch.testing.assert_close(found.float(), want.relu() if relu else want, **near)
    torch.testing.assert_close(layer.weight.float(), conv.weight.detach(), atol=0.01, rtol=0)
    assert layer(x[:0]).shape == (0, *expected.shape[1:])


def test_a_kept_encoding_may_be_dropped_by_another_thread_at_any_moment() -> None:
    kept = module.KeptEncoding(Sized())
    mask = torch.zeros(1, 2, 3, dtype=torch.bool)
    expected = kept(mask)
    kept._kept = Dropping(kept._kept)
    assert torch.equal(kept(mask), expected)


class Sized(nn.Module):
    def forward(self, mask: torch.Tensor) -> torch.Tensor:
        return mask[..., None].float()


class Dropping(dict[Any, Any]):
    """Has been emptied, as by another thread, once it was asked what it has."""

    def __contains__(self, key: object) -> bool:
        found = super().__contains__(key)
        self.clear()
        return found


@pytest.mark.skipif(bool(winograd.missing_reason), reason="the library is not built")
@pytest.mark.parametrize(("processor", "chosen"), [("avx512_bf16", True), ("avx512_bf16 amx_bf16", False)])
def test_tiles_of_bfloat16_are_left_to_the_processor(
    processor: str, chosen: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_winograd_is_faster", lambda: True)
    monkeypatch.setattr(module, "_processor", lambda: processor)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    backbone = build_backbone(resnet_cfg("DETR", 50))
    assert bool(module._winograd_convolutions(backbone, torch.bfloat16)) == chosen
    assert module._winograd_convolutions(backbone, torch.float32)
