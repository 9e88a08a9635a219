"""Backbones of timm and Detectron2's ViT: their maps, settings that are refused, and detectors that train on them."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import tiny
import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_backbone, build_model
from torch import Tensor

from detr_family.benchmarks.complexity import count_gflops, count_params
from detr_family.config import load_config
from detr_family.layers.checkpointing import backbone_blocks
from detr_family.modeling.backbone import pyramid

timm = pytest.importorskip("timm")

# Small ones of each kind: a ConvNeXt, a DINOv3 with registers and rotary positions, a ViT with learned ones.
TIMM = {"convnext": "test_convnext", "dinov3": "vit_tiny_patch16_dinov3_qkvb", "vit": "test_vit"}


def backbone_cfg(cfg: CfgNode, kind: str, monkeypatch: pytest.MonkeyPatch) -> CfgNode:
    cfg.MODEL.BACKBONE.FREEZE_AT = 0
    cfg.MODEL.PYRAMID.CHANNELS = 12
    if kind == "detectron2":
        cfg.MODEL.BACKBONE.NAME = "build_vit_backbone"
        monkeypatch.setitem(pyramid.SIZES, "T", (24, 4, 2))
        cfg.MODEL.VIT.SIZE, cfg.MODEL.VIT.WINDOW_SIZE, cfg.MODEL.VIT.IMAGE_SIZE = "T", 3, 64
    else:
        cfg.MODEL.BACKBONE.NAME = "build_timm_backbone"
        cfg.MODEL.TIMM.NAME = TIMM[kind]
    return cfg


def features(cfg: CfgNode, height: int, width: int) -> dict[str, Tensor]:
    torch.manual_seed(0)
    backbone = build_backbone(cfg).eval()
    return backbone(torch.rand(2, 3, height, width))


@pytest.mark.parametrize("kind", [*TIMM, "detectron2"])
def test_maps_are_as_they_say(kind: str, cfg: CfgNode, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    backbone = build_backbone(backbone_cfg(cfg, kind, monkeypatch)).eval()
    shapes = backbone.output_shape()
    assert [shape.stride for shape in shapes.values()] == [8, 16, 32] and backbone.size_divisibility == 32
    for height, width in ((64, 96), (32, 160)):  # of another size than the one that it was made for
        maps = backbone(torch.rand(2, 3, height, width))
        for name, shape in shapes.items():
            assert maps[name].shape == (2, shape.channels, height // shape.stride, width // shape.stride)
    assert backbone_blocks(backbone)


@pytest.mark.parametrize("kind", [*TIMM, "detectron2"])
def test_dino_trains_a_step(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    cfg = backbone_cfg(tiny.cfg_of("DINO"), kind, monkeypatch)
    cfg.MODEL.DETR.CHECKPOINT.BACKBONE = kind == "vit"
    torch.manual_seed(0)
    model = build_model(cfg)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    losses = model(tiny.batch())
    sum(losses.values()).backward()
    without = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert not without
    before = {name: p.detach().clone() for name, p in model.backbone.named_parameters()}
    optimizer.step()
    assert all(torch.isfinite(loss) for loss in losses.values())
    moved = [name for name, p in model.backbone.named_parameters() if not torch.equal(p, before[name])]
    assert len(moved) > len(before) / 2
    found = model.eval()(tiny.batch())[0]["instances"]
    assert len(found) and torch.isfinite(found.pred_boxes.tensor).all()
    assert count_params(model) > 0 and count_gflops(model, 64, 64) > 0


def test_fewer_stages_leave_nothing_untrained(cfg: CfgNode) -> None:
    cfg.MODEL.BACKBONE.NAME, cfg.MODEL.BACKBONE.FREEZE_AT = "build_timm_backbone", 0
    cfg.MODEL.TIMM.NAME, cfg.MODEL.TIMM.OUT_FEATURES = TIMM["convnext"], ["stride16", "stride8"]
    backbone = build_backbone(cfg)
    maps = backbone(torch.rand(1, 3, 64, 64))
    assert list(maps) == ["stride8", "stride16"]
    sum(x.sum() for x in maps.values()).backward()
    assert all(p.grad is not None for p in backbone.parameters())


@pytest.mark.slow
def test_channels_last_are_turned(cfg: CfgNode) -> None:
    cfg.MODEL.BACKBONE.NAME, cfg.MODEL.BACKBONE.FREEZE_AT = "build_timm_backbone", 0
    cfg.MODEL.TIMM.NAME = "swin_tiny_patch4_window7_224"
    maps = features(cfg, 64, 96)
    assert {name: x.shape[1:] for name, x in maps.items()} == {
        "stride8": (192, 8, 12), "stride16": (384, 4, 6), "stride32": (768, 2, 3)
    }  # fmt: skip


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"TIMM.NAME": "convnext_tyni"}, r"MODEL\.TIMM\.NAME is 'convnext_tyni', which timm .* similar: convnext_tiny"),
        ({"TIMM.OUT_FEATURES": ["res5"]}, r"MODEL\.TIMM\.OUT_FEATURES is \['res5'\]; it must hold some of stride"),
        ({"TIMM.NAME": "mlp_mixer_none"}, "which timm"),
        ({"TIMM.NAME": "test_convnext.no_such_tag", "TIMM.PRETRAINED": True}, "timm has no weights 'test_convn"),
        ({"BACKBONE.FREEZE_AT": 2}, r"MODEL\.BACKBONE\.FREEZE_AT is 2, which build_timm_backbone does not know"),
        ({"TIMM.NAME": "test_vit", "PYRAMID.SCALES": [1.0, 2.0]}, r"MODEL\.PYRAMID\.SCALES is \[1\.0, 2\.0\]"),
        ({"BACKBONE.NAME": "build_vit_backbone", "VIT.SIZE": "XL"}, r"MODEL\.VIT\.SIZE is 'XL'"),
    ],
)
def test_settings_that_cannot_be(keys: dict[str, Any], message: str, cfg: CfgNode) -> None:
    cfg.MODEL.BACKBONE.NAME, cfg.MODEL.BACKBONE.FREEZE_AT = "build_timm_backbone", 0
    cfg.MODEL.TIMM.NAME = TIMM["convnext"]
    for key, value in keys.items():
        node, _, leaf = key.rpartition(".")
        cfg.MODEL[node][leaf] = value
    with pytest.raises(ValueError, match=message):
        build_backbone(cfg)


def test_weights_out_of_reach(cfg: CfgNode, monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*_: object, **__: object) -> None:
        raise OSError("Network is unreachable")

    monkeypatch.setattr("timm.models._builder.load_pretrained", offline)
    cfg.MODEL.BACKBONE.NAME, cfg.MODEL.BACKBONE.FREEZE_AT = "build_timm_backbone", 0
    cfg.MODEL.TIMM.NAME, cfg.MODEL.TIMM.PRETRAINED = TIMM["convnext"], True
    with pytest.raises(FileNotFoundError, match=r"test_convnext cannot be fetched \(Network is unreachable\): run"):
        build_backbone(cfg)


def test_without_timm(cfg: CfgNode, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    cfg.MODEL.BACKBONE.NAME, cfg.MODEL.BACKBONE.FREEZE_AT = "build_timm_backbone", 0
    with pytest.raises(ImportError, match=r"needs timm, which is not installed: pip install 'detr_family\[timm\]'"):
        build_backbone(cfg)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "params"), [("dino_convnext_t_4scale", 48.5), ("dino_vit_b_4scale", 108), ("dino_dinov3_s_4scale", 43)]
)
def test_recipes(name: str, params: float) -> None:
    cfg = load_config(name, ["MODEL.DEVICE", "cpu", "MODEL.DETR.NUM_CLASSES", "80", "MODEL.TIMM.PRETRAINED", "False"])
    model = build_model(cfg)
    assert count_params(model) == pytest.approx(params, rel=0.05)
    losses = model([tiny.image(96, 128, 2, seed=0, num_classes=80)])
    sum(losses.values()).backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
