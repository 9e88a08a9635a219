"""Class and box heads of the papers after DETR, and how they start.

The releases make them when the transformer has its starting values, so the loop that gives Xavier's to every matrix of
the transformer does not reach them, whether its decoder holds them or not.

Letters: B images, Q queries, D channels, N decoder layers, K classes.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from detr_family.layers.mlp import MLP

PRIOR_BIAS = -math.log((1 - 0.01) / 0.01)  # every class starts at a probability of 0.01 (arXiv 1708.02002, 4.1)


def focal_heads(dim: int, num_classes: int) -> tuple[nn.Linear, MLP]:
    """A class head for the focal loss and a box head, D -> K and D -> 4.

    They start from the values that torch gives to linear layers, but every class at a probability of 0.01 and every box
    where its reference is.
    """
    class_head, box_head = nn.Linear(dim, num_classes), MLP(dim, dim, 4, num_layers=3)
    nn.init.constant_(class_head.bias, PRIOR_BIAS)
    box_head.zero_last_layer()
    return class_head, box_head


def per_layer(head: nn.Module, count: int, *, share: bool) -> nn.ModuleList:
    """One name per decoder layer for a head, as in the releases.

    Args:
        head: how all of them start.
        count: N.
        share: one module behind all names; False: one each, which start alike.
    """
    return nn.ModuleList(head if share or i == 0 else copy.deepcopy(head) for i in range(count))


def draw_apart(class_heads: Iterable[nn.Module], box_heads: Iterable[nn.Module]) -> None:
    """Xavier's uniform values (Glorot and Bengio, 2010) for every head's matrices, each drawn for itself, in place.

    Biases stay as they are, and so do the zeros of the box heads' last matrices.

    Args:
        class_heads: linear layers.
        box_heads: MLPs.
    """
    linears = [*class_heads]
    for head in box_heads:
        linears += [module for module in head.modules() if isinstance(module, nn.Linear)][:-1]
    for linear in linears:
        nn.init.xavier_uniform_(linear.get_parameter("weight"))


def apply_per_layer(heads: nn.ModuleList, outputs: Tensor) -> Tensor:
    """Every decoder layer's output through its own head, all at once where the heads are one.

    Args:
        heads: one per layer, possibly all the same; more than layers are not looked at.
        outputs: (N, B, Q, D).

    Returns:
        (N, B, Q, ...).
    """
    used = list(heads)[: len(outputs)]
    if len(set(used)) == 1:
        return used[0](outputs)
    return torch.stack([head(x) for head, x in zip(used, outputs, strict=True)])
