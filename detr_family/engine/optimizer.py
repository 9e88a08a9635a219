"""AdamW with a learning rate of its own for the backbone (DETR, section 4)."""

from __future__ import annotations

from detectron2.config import CfgNode
from detectron2.solver.build import maybe_add_gradient_clipping
from torch import nn
from torch.optim import AdamW, Optimizer


def build_optimizer(cfg: CfgNode, model: nn.Module) -> Optimizer:
    """AdamW over two groups, weight decay on every parameter, frozen parameters left out.

    Args:
        cfg: reads SOLVER.BASE_LR, BACKBONE_MULTIPLIER, WEIGHT_DECAY and CLIP_GRADIENTS. The clip type
            "full_model" is the training step's work, the others are Detectron2's.
        model: whose parameters under `backbone.` form the second group.

    Raises:
        ValueError: everything is frozen.
    """
    groups: dict[bool, list[nn.Parameter]] = {False: [], True: []}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups[name.startswith("backbone.")].append(parameter)
    base = cfg.SOLVER.BASE_LR
    params = [
        {"params": members, "lr": base * cfg.SOLVER.BACKBONE_MULTIPLIER if backbone else base}
        for backbone, members in groups.items()
        if members
    ]
    if not params:
        raise ValueError("no parameter is left to train: lower MODEL.BACKBONE.FREEZE_AT, shorten MODEL.DETR.FREEZE")
    optimizer = AdamW(params, lr=base, weight_decay=cfg.SOLVER.WEIGHT_DECAY)
    if clips_full_model(cfg):
        return optimizer
    return maybe_add_gradient_clipping(cfg, optimizer)


def clips_full_model(cfg: CfgNode) -> bool:
    """Whether the norm of the whole gradient is clipped, which Detectron2 itself does not know."""
    return cfg.SOLVER.CLIP_GRADIENTS.ENABLED and cfg.SOLVER.CLIP_GRADIENTS.CLIP_TYPE == "full_model"
