"""Swin Transformer (arXiv 2103.14030) as DINO's paper uses it: Detectron2's own, made fit for detectors of sets.

What differs from Detectron2's class:

- Sizes by name, and out-features by name, as a ResNet's are.
- No padding of the images is asked for: the patches and windows pad themselves, as in the papers' releases.
- Stochastic depth is torchvision's, so that it needs no further package.
- The index of relative positions, which follows from the window's size, is not part of a checkpoint.
- The mask of shifted windows, which is float32 there, has the weights' type: a Swin of 16 bits can run.

Parameter names are Detectron2's, which are those of the papers' releases and of the ImageNet weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from detectron2.modeling.backbone.swin import SwinTransformer
from torchvision.ops import StochasticDepth

# Table 7 of the paper: channels of the first stage, blocks and heads of each stage.
SIZES: dict[str, dict[str, Any]] = {
    "T": {"embed_dim": 96, "depths": (2, 2, 6, 2), "num_heads": (3, 6, 12, 24)},
    "S": {"embed_dim": 96, "depths": (2, 2, 18, 2), "num_heads": (3, 6, 12, 24)},
    "B": {"embed_dim": 128, "depths": (2, 2, 18, 2), "num_heads": (4, 8, 16, 32)},
    "L": {"embed_dim": 192, "depths": (2, 2, 18, 2), "num_heads": (6, 12, 24, 48)},
}
STAGES = ("p0", "p1", "p2", "p3")  # Detectron2's names of the stages' outputs, of strides 4, 8, 16 and 32


class Swin(SwinTransformer):
    """Swin T, S, B or L.

    Args:
        in_channels: channels of the images.
        size: "T", "S", "B" or "L".
        window_size: side of the attention windows, tokens; 7, or 12 for weights made at 384 pixels.
        drop_path_rate: stochastic depth: probability of leaving out a residual branch of the last block, rising
            linearly from 0 at the first.
        out_features: stages to return, of p0 to p3; each is normalised by a norm of its own.
        freeze_at: as for a ResNet: 0 freezes nothing, 1 the patch embedding, 2 the first stage too, and so on.

    Raises:
        ValueError: an unknown size or stage, or a number out of range; the key to change is named.
    """

    def __init__(
        self,
        *,
        in_channels: int,
        size: str,
        window_size: int,
        drop_path_rate: float,
        out_features: Sequence[str],
        freeze_at: int,
    ) -> None:
        if size not in SIZES:
            raise ValueError(f"MODEL.SWIN.SIZE is {size!r}; it may be one of {', '.join(SIZES)}")
        unknown = [name for name in out_features if name not in STAGES]
        if unknown or not out_features or list(out_features) != sorted(set(out_features)):
            raise ValueError(
                f"MODEL.SWIN.OUT_FEATURES is {list(out_features)}; it must hold some of {', '.join(STAGES)}, in order"
            )
        if window_size < 2:
            raise ValueError(f"MODEL.SWIN.WINDOW_SIZE is {window_size}; it must be at least 2")
        if not 0 <= drop_path_rate < 1:
            raise ValueError(f"MODEL.SWIN.DROP_PATH_RATE is {drop_path_rate}; it must be at least 0 and below 1")
        if not 0 <= freeze_at <= len(STAGES) + 1:
            raise ValueError(f"MODEL.BACKBONE.FREEZE_AT is {freeze_at}; for a Swin it may be 0 to {len(STAGES) + 1}")
        super().__init__(
            in_chans=in_channels,
            window_size=window_size,
            drop_path_rate=0.0,
            out_indices=tuple(STAGES.index(name) for name in out_features),
            frozen_stages=freeze_at or -1,
            **SIZES[size],
        )
        blocks = [block for layer in self.layers for block in layer.blocks]
        rates = torch.linspace(0, drop_path_rate, len(blocks)).tolist()
        for block, rate in zip(blocks, rates, strict=True):
            index = block.attn.relative_position_index
            block.attn.register_buffer("relative_position_index", index, persistent=False)
            block.attn.register_forward_pre_hook(_mask_in_weights_type, with_kwargs=True)
            if rate > 0:
                block.drop_path = StochasticDepth(rate, "row")

    @property
    def size_divisibility(self) -> int:
        """0: images of any size will do."""
        return 0

    def train(self, mode: bool = True) -> Swin:
        """Set the mode; what is frozen stays without stochastic depth."""
        super().train(mode)
        self._freeze_stages()
        return self


def _mask_in_weights_type(attention: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Before a window's attention: `mask` in the type of its weights."""
    mask = kwargs.get("mask")
    return args, kwargs if mask is None else {**kwargs, "mask": mask.to(attention.qkv.weight.dtype)}
