"""torchvision's ResNet, built from Detectron2's blocks."""

from __future__ import annotations

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
