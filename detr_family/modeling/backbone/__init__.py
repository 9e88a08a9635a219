"""Backbones as the papers use them, by the names that MODEL.BACKBONE.NAME takes."""

from __future__ import annotations

from typing import Any

import detectron2
from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY
from detectron2.modeling.backbone import Backbone

from detr_family.modeling.backbone.resnet import build_torchvision_resnet_backbone

__all__ = [
    "build_swin_backbone",
    "build_timm_backbone",
    "build_torchvision_resnet_backbone",
    "build_vit_backbone",
]


@BACKBONE_REGISTRY.register()
def build_swin_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> Backbone:
    """Swin T, S, B or L (MODEL.SWIN), its outputs p0 to p3 of strides 4 to 32; see `swin.Swin`.

    Raises:
        ImportError: this Detectron2 has no Swin.
        ValueError: a setting that cannot be.
    """
    try:
        from detr_family.modeling.backbone.swin import Swin
    except ImportError as error:
        raise ImportError(
            f"Detectron2 {detectron2.__version__} has no SwinTransformer, which was added after 0.6: install a newer "
            "one (python tools/install_detectron2.py, see docs/install.md), or choose a ResNet in MODEL.BACKBONE.NAME"
        ) from error
    swin = cfg.MODEL.SWIN
    return Swin(
        in_channels=input_shape.channels,
        size=swin.SIZE,
        window_size=swin.WINDOW_SIZE,
        drop_path_rate=swin.DROP_PATH_RATE,
        out_features=swin.OUT_FEATURES,
        freeze_at=cfg.MODEL.BACKBONE.FREEZE_AT,
    )


@BACKBONE_REGISTRY.register()
def build_timm_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> Backbone:
    """Any backbone of timm (MODEL.TIMM): its stages by their strides, or a plain Vision Transformer as a pyramid.

    Raises:
        ImportError: timm is not installed, or Detectron2 has no simple feature pyramid.
        FileNotFoundError: the ImageNet weights cannot be fetched.
        ValueError: a setting that cannot be.
    """
    from detr_family.modeling.backbone.timm import TimmBackbone

    _nothing_frozen(cfg)
    timm = cfg.MODEL.TIMM
    backbone = TimmBackbone(
        name=timm.NAME,
        pretrained=timm.PRETRAINED,
        in_channels=input_shape.channels,
        out_features=timm.OUT_FEATURES,
        drop_path_rate=timm.DROP_PATH_RATE,
    )
    return _pyramid(cfg, backbone) if backbone.plain else backbone


@BACKBONE_REGISTRY.register()
def build_vit_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> Backbone:
    """Detectron2's plain Vision Transformer (MODEL.VIT) with its simple feature pyramid (MODEL.PYRAMID).

    Raises:
        ImportError: timm is not installed, or Detectron2 has no ViT.
        ValueError: a setting that cannot be.
    """
    _nothing_frozen(cfg)
    vit = cfg.MODEL.VIT
    backbone = _vit().vision_transformer(
        size=vit.SIZE,
        in_channels=input_shape.channels,
        patch_size=vit.PATCH_SIZE,
        window_size=vit.WINDOW_SIZE,
        image_size=vit.IMAGE_SIZE,
        drop_path_rate=vit.DROP_PATH_RATE,
    )
    return _pyramid(cfg, backbone)


def _pyramid(cfg: CfgNode, backbone: Backbone) -> Backbone:
    pyramid = cfg.MODEL.PYRAMID
    return _vit().simple_feature_pyramid(backbone, scales=pyramid.SCALES, channels=pyramid.CHANNELS, norm=pyramid.NORM)


def _vit() -> Any:
    try:
        from detr_family.modeling.backbone import pyramid
    except ImportError as error:
        raise ImportError(
            f"Detectron2 {detectron2.__version__} has no ViT and no simple feature pyramid, which came after 0.6: "
            "install a newer one (see docs/install.md), or choose another backbone in MODEL.BACKBONE.NAME"
        ) from error
    return pyramid


def _nothing_frozen(cfg: CfgNode) -> None:
    """Refuse a setting that would be without effect."""
    if cfg.MODEL.BACKBONE.FREEZE_AT:
        backbone = cfg.MODEL.BACKBONE
        raise ValueError(
            f"MODEL.BACKBONE.FREEZE_AT is {backbone.FREEZE_AT}, which {backbone.NAME} does not know: set it to 0, "
            "and name what is not to be trained in MODEL.DETR.FREEZE"
        )
