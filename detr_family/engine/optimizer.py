"""AdamW with a learning rate of its own for the backbone (DETR, section 4), and for parameters by their names."""

from __future__ import annotations

import re

from detectron2.config import CfgNode
from detectron2.solver.build import maybe_add_gradient_clipping
from torch import nn
from torch.optim import AdamW, Optimizer

OF_BACKBONE = ("backbone.", "position_encoding.")  # what has the backbone's learning rate


def build_optimizer(cfg: CfgNode, model: nn.Module) -> Optimizer:
    """AdamW over a group for each learning rate, weight decay on every parameter, frozen parameters left out.

    Args:
        cfg: reads SOLVER.BASE_LR, BACKBONE_MULTIPLIER, LR_FACTORS, WEIGHT_DECAY and CLIP_GRADIENTS. The clip type
            "full_model" is the training step's work, the others are Detectron2's.
        model: whose parameters under `backbone.` have the backbone's rate, and those of a learned spatial encoding: the
            releases hold it in the backbone.

    Raises:
        ValueError: everything is frozen, or SOLVER.LR_FACTORS has an entry that is no pair of a regular expression
            and a factor, or one that no parameter's name matches.
    """
    base = cfg.SOLVER.BASE_LR
    factors = _lr_factors(cfg, model)
    groups: dict[float, list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            rate = base * cfg.SOLVER.BACKBONE_MULTIPLIER if name.startswith(OF_BACKBONE) else base
            rate *= next((factor for expression, factor in factors if expression.search(name)), 1.0)
            groups.setdefault(rate, []).append(parameter)
    params = [{"params": members, "lr": rate} for rate, members in groups.items()]
    if not params:
        raise ValueError("no parameter is left to train: lower MODEL.BACKBONE.FREEZE_AT, shorten MODEL.DETR.FREEZE")
    # On a CPU torch's default takes a parameter at a time in ten passes over it, four times as long.
    fused = True if all(p.device.type == "cpu" for group in groups.values() for p in group) else None
    optimizer = AdamW(params, lr=base, weight_decay=cfg.SOLVER.WEIGHT_DECAY, fused=fused)
    if clips_full_model(cfg):
        return optimizer
    return maybe_add_gradient_clipping(cfg, optimizer)


def _lr_factors(cfg: CfgNode, model: nn.Module) -> list[tuple[re.Pattern[str], float]]:
    factors = []
    for entry in cfg.SOLVER.LR_FACTORS:
        try:
            text, factor = entry
            expression, factor = re.compile(text), float(factor)
        except (TypeError, ValueError, re.error) as error:
            raise ValueError(
                f"SOLVER.LR_FACTORS has {entry!r}; each entry must be [regular expression, factor]: {error}"
            ) from error
        if not any(expression.search(name) for name, _ in model.named_parameters()):
            raise ValueError(f"SOLVER.LR_FACTORS has {text!r}, which no parameter's name matches")
        factors.append((expression, factor))
    return factors


def clips_full_model(cfg: CfgNode) -> bool:
    """Whether the norm of the whole gradient is clipped, which Detectron2 itself does not know."""
    return cfg.SOLVER.CLIP_GRADIENTS.ENABLED and cfg.SOLVER.CLIP_GRADIENTS.CLIP_TYPE == "full_model"
