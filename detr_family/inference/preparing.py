"""A detector made ready for inference on a CPU: the same results to rounding, in less time and no more memory.

- Frozen batch norms become part of their convolutions, ReLU and the residual sum part of the kernel, activations lie
  channels-last.
- Linear layers keep their weights in oneDNN's layout where that is faster on this processor; feed-forward networks run
  a few tokens at a time, so that the hidden layer stays in the cache.
- The encoding of positions is kept for each size of image that is not padded.

The weights are taken over, not copied: the detector that was given is the one that is returned.
"""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from detectron2.layers import FrozenBatchNorm2d
from detectron2.modeling.backbone.resnet import BasicBlock, BasicStem, BottleneckBlock
from torch import Tensor, nn

from detr_family.layers.position_encoding import SinePositionEncoding
from detr_family.layers.prepared import (
    PreparedAttention,
    PreparedConv2d,
    PreparedFeedForward,
    PreparedLinear,
    kernels_work,
)
from detr_family.modeling.set_detector import SetDetector

PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_KEPT_ENCODINGS = 8  # sizes of images

_logger = logging.getLogger(__name__)


def optimize(model: SetDetector, *, precision: str = "float32") -> SetDetector:
    """Prepare a detector, in place, for inference on the CPU.

    Args:
        model: on the CPU. It can be neither trained nor saved any more.
        precision: "float32": results equal the plain detector's to rounding (scores within 1e-4). "bfloat16":
            convolutions and linear layers compute in it, boxes and scores are predicted in float32.

    Returns:
        The same model, in evaluation mode.

    Raises:
        ValueError: a model elsewhere than on the CPU, or another precision.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"precision is {precision!r}; it may be {' or '.join(map(repr, PRECISIONS))}")
    if model.device.type != "cpu":
        raise ValueError(f"the detector is on {model.device}; it is prepared for the CPU: call .cpu() first")
    model.eval()
    if not kernels_work():
        _logger.warning("This torch has not oneDNN's prepacked operators: the detector stays as it is.")
        return model
    dtype = PRECISIONS[precision]
    if dtype == torch.bfloat16 and not _has_bfloat16():
        _logger.warning("This processor has no instructions for bfloat16: float32 is likely to be faster.")
    packed_linear = dtype == torch.bfloat16 or _packed_linear_is_faster()
    with torch.no_grad():
        _prepare_backbone(model.backbone, dtype)
        _prepare(model, dtype, packed_linear, in_head=False, done={})
    return model


def _prepare_backbone(backbone: nn.Module, dtype: torch.dtype) -> None:
    """Residual blocks, stems and what else is a convolution, with their norms."""
    for module in list(backbone.modules()):
        if isinstance(module, BottleneckBlock):
            _replace_forward(module, _bottleneck, ("conv1", "conv2", "conv3"), dtype)
        elif isinstance(module, BasicBlock):
            _replace_forward(module, _basic_block, ("conv1", "conv2"), dtype)
        elif isinstance(module, BasicStem):
            _replace_forward(module, _stem, ("conv1",), dtype)


def _replace_forward(
    block: nn.Module, forward: Callable[..., Tensor], relus: tuple[str, ...], dtype: torch.dtype
) -> None:
    """Give a block of Detectron2's a forward whose convolutions do the ReLU, where all its norms can be folded."""
    names = [name for name in (*relus, "shortcut") if getattr(block, name, None) is not None]
    if not all(_foldable(getattr(block, name)) for name in names):
        return
    for name in names:
        setattr(block, name, _prepared_conv(getattr(block, name), dtype, relu=name in relus))
    block.forward = functools.partial(forward, block)


def _bottleneck(block: Any, x: Tensor) -> Tensor:
    shortcut = x.to(block.conv1.dtype).clone() if block.shortcut is None else block.shortcut(x)
    y: Tensor = block.conv3(block.conv2(block.conv1(x)), add=shortcut)
    return y


def _basic_block(block: Any, x: Tensor) -> Tensor:
    shortcut = x.to(block.conv1.dtype).clone() if block.shortcut is None else block.shortcut(x)
    y: Tensor = block.conv2(block.conv1(x), add=shortcut)
    return y


def _stem(stem: Any, x: Tensor) -> Tensor:
    return F.max_pool2d(stem.conv1(x), kernel_size=3, stride=2, padding=1)


def _foldable(conv: nn.Module) -> bool:
    """A convolution whose norm, if any, is a fixed scale and shift of each channel."""
    norm = getattr(conv, "norm", None)
    return (
        isinstance(conv, nn.Conv2d)
        and conv.padding_mode == "zeros"
        and not isinstance(conv.padding, str)
        and getattr(conv, "activation", None) is None
        and (norm is None or isinstance(norm, (FrozenBatchNorm2d, nn.BatchNorm2d)))
    )


def _prepared_conv(conv: Any, dtype: torch.dtype, relu: bool = False) -> PreparedConv2d:
    weight, bias, norm = conv.weight, conv.bias, getattr(conv, "norm", None)
    if norm is not None:
        scale = norm.weight * (norm.running_var + norm.eps).rsqrt()
        shift = norm.bias - norm.running_mean * scale
        weight = weight * scale[:, None, None, None]
        bias = shift if bias is None else bias * scale + shift
    return PreparedConv2d(weight, bias, conv.stride, conv.padding, conv.dilation, conv.groups, relu=relu, dtype=dtype)


# What predicts classes and boxes: few operations, whose rounding is seen.
_HEADS = ("class_embed", "bbox_embed", "enc_out_class_embed", "enc_out_bbox_embed")


def _prepare(module: nn.Module, dtype: torch.dtype, packed_linear: bool, in_head: bool, done: dict[int, Any]) -> None:
    """Replace the layers below a module, from the outside in; one that stands in several places stays one.

    Args:
        module: whose children are replaced.
        dtype: what is computed in outside of heads.
        packed_linear: replace linear layers.
        in_head: whether the module is part of a head.
        done: by id, what was seen with what stands in for it (kept, so that no id is given anew).
    """
    for name, child in list(module._modules.items()):
        if child is None:
            continue
        if id(child) not in done:
            head = in_head or name in _HEADS
            other = _stand_in(child, torch.float32 if head else dtype, packed_linear)
            done[id(child)] = child, other
            if other is None:
                if packed_linear and _is_feed_forward(child):
                    layer: Any = child
                    layer.linear2 = PreparedFeedForward(layer.linear1, layer.activation, layer.linear2, dtype=dtype)
                    layer.linear1 = layer.activation = nn.Identity()
                _prepare(child, dtype, packed_linear, head, done)
        other = done[id(child)][1]
        if other is not None:
            setattr(module, name, other)


def _stand_in(layer: nn.Module, dtype: torch.dtype, packed_linear: bool) -> nn.Module | None:
    """What replaces a layer; None for what stays or is looked into."""
    if isinstance(layer, SinePositionEncoding):
        return KeptEncoding(layer)
    if isinstance(layer, nn.MultiheadAttention):
        usual = layer.in_proj_weight is not None and layer.batch_first and layer.bias_k is None
        return PreparedAttention(layer, dtype=dtype) if packed_linear and usual else None
    if type(layer) is nn.Linear:
        return PreparedLinear(layer, dtype=dtype) if packed_linear else None
    return _prepared_conv(layer, dtype) if _foldable(layer) else None


def _is_feed_forward(layer: nn.Module) -> bool:
    """Whether a transformer layer calls linear2(activation(linear1(x))) by these names."""
    parts = [getattr(layer, name, None) for name in ("linear1", "activation", "linear2")]
    return type(parts[0]) is nn.Linear and isinstance(parts[1], nn.Module) and type(parts[2]) is nn.Linear


class KeptEncoding(nn.Module):
    """A position encoding that keeps what it gave for images without padding, by their size.

    Args:
        encoding: (B, H, W) mask -> (B, H, W, D).
    """

    def __init__(self, encoding: nn.Module) -> None:
        super().__init__()
        self.encoding = encoding
        self._kept: dict[tuple[int, ...], Tensor] = {}

    def forward(self, mask: Tensor) -> Tensor:
        """(B, H, W) bool, True = padding -> (B, H, W, D) float32."""
        if mask.any():
            encoded: Tensor = self.encoding(mask)
            return encoded
        size = tuple(mask.shape[1:])
        if size not in self._kept:
            if len(self._kept) >= _KEPT_ENCODINGS:
                self._kept.pop(next(iter(self._kept)))
            self._kept[size] = self.encoding(mask[:1])
        return self._kept[size].expand(len(mask), -1, -1, -1)


@functools.cache
def _has_bfloat16() -> bool:
    """Whether the processor multiplies bfloat16 (read from the system's description; True where there is none)."""
    description = Path("/proc/cpuinfo")
    if not description.is_file():
        return True
    text = description.read_text(errors="replace")
    return any(word in text for word in ("avx512_bf16", "amx_bf16", " bf16"))


@functools.cache
def _packed_linear_is_faster() -> bool:
    """Time a linear layer of a transformer's size in both forms, in turn; oneDNN's must win."""
    linear = nn.Linear(256, 1024)
    x = torch.randn(1024, 256, generator=torch.Generator().manual_seed(0))
    packed = PreparedLinear(linear)
    best = {"plain": float("inf"), "packed": float("inf")}
    with torch.no_grad():
        for _ in range(8):
            for name, layer in (("plain", linear), ("packed", packed)):
                start = time.perf_counter()
                layer(x)
                best[name] = min(best[name], time.perf_counter() - start)
    _logger.debug("a linear layer of 1024 tokens, plain and in oneDNN's layout: %s s", best)
    return best["packed"] < best["plain"]


__all__ = ["KeptEncoding", "optimize"]
