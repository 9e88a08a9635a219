"""Backbones as the papers use them, by the names that MODEL.BACKBONE.NAME takes."""

from __future__ import annotations

import detectron2
from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY
from detectron2.modeling.backbone import Backbone

from detr_family.modeling.backbone.resnet import build_torchvision_resnet_backbone

__all__ = ["build_swin_backbone", "build_torchvision_resnet_backbone"]


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
