"""A detector made ready for inference on a CPU: the same results to rounding, in less time and no more memory.

- Frozen batch norms become part of their convolutions, ReLU and the residual sum part of the kernel, activations lie
  channels-last. Blocks add to their input's memory, and the stem is pooled strip by strip: pages that are touched for
  the first time cost as much as the arithmetic.
- Most 3x3 convolutions of stride 1 are Winograd's, where that is faster on this processor; in float32 1x1 convolutions
  are linear layers.
- Linear layers keep their weights in oneDNN's layout where that is faster on this processor; feed-forward networks run
  a few tokens at a time, so that the hidden layer stays in the cache.
- The encoding of positions is kept for each size of image that is not padded.

The weights are taken over, not copied: the detector that was given is the one that is returned.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import logging
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from detectron2.layers import Conv2d, FrozenBatchNorm2d
from detectron2.modeling.backbone.resnet import BasicBlock, BasicStem, BottleneckBlock
from torch import Tensor, nn

from detr_family.layers import winograd
from detr_family.layers.attention import ProjectedAttention
from detr_family.layers.position_encoding import SinePositionEncoding
from detr_family.layers.prepared import (
    PreparedAttention,
    PreparedConv2d,
    PreparedFeedForward,
    PreparedLinear,
    PreparedPointwise,
    PreparedProjectedAttention,
    PreparedStem,
    kernels_work,
)
from detr_family.modeling.set_detector import SetDetector

PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_KEPT_ENCODINGS = 8  # sizes of images
_WINOGRAD_BYTES = 70 << 20  # more weights than before, at most: what a large image's norms took, which are gone

_logger = logging.getLogger(__name__)


def optimize(model: SetDetector, *, precision: str = "float32") -> SetDetector:
    """Prepare a detector, in place, for inference on the CPU.

    Args:
        model: on the CPU. It can be neither trained, saved nor moved any more: that is an error. A layer's `weight`
            can be read.
        precision: "float32": results equal the plain detector's to rounding (scores within 1e-4). "bfloat16":
            convolutions and linear layers compute in it (Winograd's in float32 between maps of it), boxes and scores
            are predicted in float32.

    Returns:
        The same model, in evaluation mode.

    Raises:
        ValueError: a model elsewhere than on the CPU or with other weights than float32, or another precision.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"precision is {precision!r}; it may be {' or '.join(map(repr, PRECISIONS))}")
    if model.device.type != "cpu":
        raise ValueError(f"the detector is on {model.device}; it is prepared for the CPU: call .cpu() first")
    if model.dtype != torch.float32:
        raise ValueError(
            f"the detector's weights are {model.dtype}; it is prepared from float32: leave out .half(), .bfloat16() or "
            ".double(), and set precision"
        )
    model.eval()
    if not kernels_work():
        _logger.info("This torch has not oneDNN's prepacked operators: the detector stays as it is.")
        return model
    dtype = PRECISIONS[precision]
    if dtype == torch.bfloat16 and not _has_bfloat16():
        _logger.warning("This processor has no instructions for bfloat16: float32 is likely to be faster.")
    packed_linear = dtype == torch.bfloat16 or _packed_linear_is_faster()
    with torch.no_grad():
        _prepare_backbone(model.backbone, dtype)
        _prepare(model, dtype, packed_linear, in_head=False, done={})
    _give_back_freed_memory()
    return model


def _give_back_freed_memory() -> None:
    """The weights that were laid out anew leave holes, tens of megabytes, which glibc would keep."""
    if sys.platform == "linux":
        with contextlib.suppress(AttributeError, OSError):  # another C library
            ctypes.CDLL(None).malloc_trim(0)


def _prepare_backbone(backbone: nn.Module, dtype: torch.dtype) -> None:
    """Residual blocks, stems and what else is a convolution, with their norms."""
    by_winograd = _winograd_convolutions(backbone, dtype)
    followers = {
        id(block) for stage in backbone.modules() if isinstance(stage, nn.Sequential) for block in list(stage)[1:]
    }
    module: Any
    for module in list(backbone.modules()):
        if isinstance(module, BottleneckBlock):
            _replace_forward(module, _bottleneck, ("conv1", "conv2", "conv3"), dtype, by_winograd)
        elif isinstance(module, BasicBlock):
            _replace_forward(module, _basic_block, ("conv1", "conv2"), dtype, by_winograd)
        elif isinstance(module, BasicStem) and _foldable(module.conv1) and _is_square(module.conv1):
            weight, bias = _folded(module.conv1)
            module.conv1 = PreparedStem(weight, bias, module.conv1.stride[0], module.conv1.padding[0], dtype=dtype)
            module.forward = module.conv1.forward
        if id(module) in followers:  # what a block before it in its stage gave is nobody else's
            module.overwrites = True


def _winograd_convolutions(backbone: nn.Module, dtype: torch.dtype) -> set[int]:
    """Ids of the convolutions of residual blocks that become Winograd's, those with the fewest weights first."""
    narrow = dtype != torch.float32
    if narrow and (_has_tiles() or not torch.backends.cpu.get_cpu_capability().startswith("AVX")):
        return set()  # bfloat16's direct convolution was measured against it on AVX512-BF16 alone
    wanted: list[Any] = []
    for block in backbone.modules():
        if isinstance(block, BottleneckBlock):
            wanted.append(block.conv2)
        elif isinstance(block, BasicBlock):
            wanted += [block.conv1, block.conv2]
    wanted = [
        conv
        for conv in wanted
        if isinstance(conv, nn.Conv2d)
        and _foldable(conv)
        and (conv.kernel_size, conv.stride, conv.padding, conv.dilation) == ((3, 3), (1, 1), (1, 1), (1, 1))
        and conv.groups == 1
        and min(conv.in_channels, conv.out_channels) >= winograd.least_channels(conv.in_channels, conv.out_channels)
        and (not narrow or winograd.is_native(conv.in_channels, conv.out_channels))
    ]
    chosen, room = set(), _WINOGRAD_BYTES
    for conv in sorted(wanted, key=lambda conv: conv.weight.numel()):
        room -= 3 * conv.weight.numel() * 4
        if room >= 0:
            chosen.add(id(conv))
    return chosen if chosen and _winograd_is_faster() else set()


def _replace_forward(
    block: nn.Module, forward: Callable[..., Tensor], relus: tuple[str, ...], dtype: torch.dtype, by_winograd: set[int]
) -> None:
    """Give a block of Detectron2's a forward whose convolutions do the ReLU, where all its norms can be folded."""
    names = [name for name in (*relus, "shortcut") if getattr(block, name, None) is not None]
    if not all(_foldable(getattr(block, name)) for name in names):
        return
    for name in names:
        conv = getattr(block, name)
        if id(conv) in by_winograd:
            weight, bias = _folded(conv)
            setattr(block, name, winograd.WinogradConv2d(weight, bias, relu=True, dtype=dtype))
        else:
            setattr(block, name, _prepared_conv(conv, dtype, relu=name in relus))
    block.forward = functools.partial(forward, block)


def _sum_starts_from(block: Any, x: Tensor) -> Tensor:
    """What a block's last convolution adds to, and overwrites."""
    if block.shortcut is not None:
        shortcut: Tensor = block.shortcut(x)
        return shortcut
    return x if getattr(block, "overwrites", False) else x.clone()


def _bottleneck(block: Any, x: Tensor) -> Tensor:
    x = x.to(block.conv3.dtype)
    y = block.conv2(block.conv1(x))
    last: Tensor = block.conv3(y, add=_sum_starts_from(block, x))
    return last


def _basic_block(block: Any, x: Tensor) -> Tensor:
    x = x.to(block.conv2.dtype)
    y = block.conv1(x)
    last: Tensor = block.conv2(y, add=_sum_starts_from(block, x))
    return last


def _is_square(conv: Any) -> bool:
    """Whether a convolution does the same in both directions, plainly."""
    pairs = (conv.kernel_size, conv.stride, conv.padding)
    return all(a == b for a, b in pairs) and conv.dilation == (1, 1) and conv.groups == 1


def _foldable(conv: nn.Module) -> bool:
    """A convolution whose norm, if any, is a fixed scale and shift of each channel."""
    norm = getattr(conv, "norm", None)
    return (
        isinstance(conv, nn.Conv2d)
        and type(conv) in (nn.Conv2d, Conv2d)  # others do something else with their weights or input
        and conv.padding_mode == "zeros"
        and not isinstance(conv.padding, str)
        and getattr(conv, "activation", None) is None
        and (norm is None or isinstance(norm, (FrozenBatchNorm2d, nn.BatchNorm2d)))
    )


def _folded(conv: Any) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of a convolution with its norm."""
    weight, bias, norm = conv.weight, conv.bias, getattr(conv, "norm", None)
    if norm is not None:
        scale = norm.weight * (norm.running_var + norm.eps).rsqrt()
        shift = norm.bias - norm.running_mean * scale
        weight = weight * scale[:, None, None, None]
        bias = shift if bias is None else bias * scale + shift
    return weight, bias


def _prepared_conv(conv: Any, dtype: torch.dtype, relu: bool = False) -> PreparedConv2d | PreparedPointwise:
    weight, bias = _folded(conv)
    linear = conv.kernel_size == (1, 1) and _is_square(conv) and conv.padding == (0, 0) and _packed_linear_is_faster()
    # In bfloat16 the layouts are one but where there is a stride, and oneDNN's own sums are not rounded between.
    if linear and (dtype == torch.float32 or conv.stride != (1, 1)):
        return PreparedPointwise(weight, bias, conv.stride[0], relu=relu, dtype=dtype)
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
    if type(layer) is ProjectedAttention:
        return PreparedProjectedAttention(layer, dtype=dtype) if packed_linear else None
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
        kept = self._kept.get(size)
        if kept is None:
            kept = self.encoding(mask[:1])
            if len(self._kept) >= _KEPT_ENCODINGS:
                self._kept.pop(next(iter(list(self._kept))), None)  # another thread may have been faster
            self._kept[size] = kept
        return kept.expand(len(mask), -1, -1, -1)


@functools.cache
def _processor() -> str:
    """What the system says of the processor; "" where it says nothing."""
    description = Path("/proc/cpuinfo")
    return description.read_text(errors="replace") if description.is_file() else ""


def _has_bfloat16() -> bool:
    """Whether the processor multiplies bfloat16; True where that is not known."""
    return not _processor() or any(word in _processor() for word in ("avx512_bf16", "amx_bf16", " bf16"))


def _has_tiles() -> bool:
    """Whether it multiplies whole tiles of bfloat16 at a time (AMX)."""
    return "amx_bf16" in _processor()


@functools.cache
def _packed_linear_is_faster() -> bool:
    """Whether a linear layer of a transformer's size is faster in oneDNN's layout."""
    linear = nn.Linear(256, 1024)
    x = torch.randn(1024, 256, generator=torch.Generator().manual_seed(0))
    return _is_faster(PreparedLinear(linear), linear, x)


@functools.cache
def _winograd_is_faster() -> bool:
    """Whether a convolution of a ResNet's is faster by Winograd's method."""
    conv = nn.Conv2d(256, 256, 3, padding=1)
    x = torch.randn(1, 256, 32, 48, generator=torch.Generator().manual_seed(0)).to(memory_format=torch.channels_last)
    return _is_faster(winograd.WinogradConv2d(conv.weight, conv.bias), _prepared_conv(conv, torch.float32), x)


@torch.no_grad()
def _is_faster(layer: nn.Module, other: nn.Module, x: Tensor) -> bool:
    """Whether a layer is faster than another: it is with AVX2 and AVX-512; elsewhere the fastest of eight calls counts.

    What is known is not measured anew: processes that share a task would choose differently and round differently.
    """
    if torch.backends.cpu.get_cpu_capability().startswith("AVX"):
        return True
    best = [float("inf"), float("inf")]
    for _ in range(8):
        for i, each in enumerate((layer, other)):
            start = time.perf_counter()
            each(x)
            best[i] = min(best[i], time.perf_counter() - start)
    _logger.debug("%s takes %.2g s, %s %.2g s", type(layer).__name__, best[0], type(other).__name__, best[1])
    return best[0] < best[1]


__all__ = ["KeptEncoding", "optimize"]
