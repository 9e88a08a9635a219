"""Backbones as the papers use them: torchvision's ResNet and Swin, built from Detectron2's blocks."""

from __future__ import annotations

import detectron2
from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY
from detectron2.modeling.backbone import Backbone, build_resnet_backbone


@BACKBONE_REGISTRY.register()
def build_torchvision_resnet_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> Backbone:
    """Detectron2's ResNet, with torchvision's meaning of a dilated last stage.

    With MODEL.RESNETS.RES5_DILATION 2 (the papers' DC5) Detectron2 dilates all blocks of res5. torchvision's
    first block keeps the dilation of the stage before it, 1, and only the later ones have 2; published DC5
    weights were trained so and lose about 4 AP otherwise.
    """
    backbone = build_resnet_backbone(cfg, input_shape)
    if cfg.MODEL.RESNETS.RES5_DILATION == 2 and hasattr(backbone, "res5"):
        first = backbone.res5[0].conv2
        first.dilation = first.padding = (1, 1)
    return backbone


@BACKBONE_REGISTRY.register()
def build_swin_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> Backbone:
    """Swin T, S, B or L (MODEL.SWIN), its outputs p0 to p3 of strides 4 to 32; see `detr_family.swin.Swin`.

    Raises:
        ImportError: this Detectron2 has no Swin.
        ValueError: a setting that cannot be.
    """
    try:
        from detr_family.swin import Swin
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
