"""torchvision's ResNet, built from Detectron2's blocks."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from detectron2.config import CfgNode
from detectron2.layers import Conv2d, FrozenBatchNorm2d, ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY
from detectron2.modeling.backbone import Backbone, build_resnet_backbone
from detectron2.modeling.backbone.resnet import BasicBlock, BasicStem, BottleneckBlock
from torch import Tensor, nn

from detr_family.layers.fused import FoldedConv, fused_kernels_apply, is_bare, residual_block


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
    fuse_blocks(backbone)
    return backbone


def fuse_blocks(backbone: nn.Module) -> None:
    """Let the stem and the residual blocks of Detectron2's kinds train by the kernels of `layers.fused`, in place.

    Nothing but their class changes, for one that computes the same.
    """
    for module in backbone.modules():
        fused = _FUSED.get(type(module))
        if fused is not None:
            module.__class__ = fused


def _folded(*convs: Any) -> list[FoldedConv] | None:
    """Convolutions with their frozen norms; None where one is something else."""
    if not all(
        type(conv) is Conv2d
        and isinstance(conv.norm, FrozenBatchNorm2d)
        and conv.bias is None
        and conv.activation is None
        and conv.padding_mode == "zeros"
        and conv.weight.dtype == torch.float32
        and is_bare(conv, conv.norm)
        for conv in convs
    ):
        return None
    result = []
    for conv in convs:
        norm = conv.norm
        scale = norm.weight * (norm.running_var + norm.eps).rsqrt()
        geometry = [*conv.padding], [*conv.stride], [*conv.dilation], conv.groups
        result.append(FoldedConv(conv.weight, scale, norm.bias - norm.running_mean * scale, geometry))
    return result


class _FusedBottleneck(BottleneckBlock):
    def forward(self, x: Tensor) -> Tensor:
        return _block(self, BottleneckBlock, x, self.conv1, self.conv2, self.conv3)


class _FusedBasicBlock(BasicBlock):
    def forward(self, x: Tensor) -> Tensor:
        return _block(self, BasicBlock, x, self.conv1, self.conv2)


class _FusedStem(BasicStem):
    def forward(self, x: Tensor) -> Tensor:
        trained = x.requires_grad or self.conv1.weight.requires_grad
        folded = None if trained or not (self.training and fused_kernels_apply(x)) else _folded(self.conv1)
        if folded is None:
            return super().forward(x)
        with torch.no_grad():
            y = folded[0](x.contiguous(memory_format=torch.channels_last), folded[0].folded(), relu=True)
            return F.max_pool2d(y, kernel_size=3, stride=2, padding=1)


def _block(block: Any, plain: type[nn.Module], x: Tensor, *convs: nn.Module) -> Tensor:
    if block.training and fused_kernels_apply(x):
        shortcut = [] if block.shortcut is None else [block.shortcut]
        folded = _folded(*convs, *shortcut)
        if folded is not None:
            return residual_block(x, folded[: len(convs)], folded[-1] if shortcut else None)
    result: Tensor = plain.forward(block, x)
    return result


_FUSED: dict[type[nn.Module], type[nn.Module]] = {
    BasicStem: _FusedStem,
    BottleneckBlock: _FusedBottleneck,
    BasicBlock: _FusedBasicBlock,
}
