"""3x3 convolutions by Winograd's minimal filtering, F(4x4, 3x3) (arXiv 1509.09308, sections 3 and 4), and gradients.

4x4 results are had from 6x6 inputs by 36 products in place of 144: matrix products over the channels, before and after
which tiles are transformed. The input's gradient is a convolution of the result's with the filters turned round; the
filters' gradient sums products of transformed inputs and gradients. A result's rounding is 2 to 4 times a direct
convolution's.

A library in C++ (csrc/winograd.cpp) does all of it while tiles are in the cache; without it, and for channels that are
no multiples of 32, torch's operators do (winograd_torch.py), which gains less.

    torch.ops.detr_family.winograd_filters(weight, backwards) -> filters
    torch.ops.detr_family.winograd_convolve(x, filters, bias, relu) -> y
    torch.ops.detr_family.winograd_add_(sums, x, filters, bias, relu) -> sums
    torch.ops.detr_family.winograd_filter_gradients(grad, x) -> weight's gradient
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from detr_family.layers import libraries, winograd_torch
from detr_family.layers.prepared import Prepared

LIBRARY = "_winograd_cpu"
_PANEL = 32  # channels are multiples of it in the library
_LEAST_WORK = 5e8  # multiplications of a direct convolution from which on a training takes the method

_library = torch.library.Library("detr_family", "FRAGMENT")
_library.define("winograd_filters(Tensor weight, bool backwards) -> Tensor")
_CONVOLUTION = "Tensor x, Tensor filters, Tensor? bias, bool relu"
_library.define(f"winograd_convolve({_CONVOLUTION}) -> Tensor")
_library.define(f"winograd_add_(Tensor(a!) sums, {_CONVOLUTION}) -> Tensor(a!)")
_library.define("winograd_filter_gradients(Tensor grad, Tensor x) -> Tensor")
_ops: Any = torch.ops.detr_family
_handle, missing_reason = libraries.load(LIBRARY, "winograd", "a C++ compiler")


def library_file() -> str | None:
    """Path of the loaded library; None where there is none."""
    return libraries.file_of(_handle)


def is_native(*channels: int) -> bool:
    """Whether the library is there and takes these channels of input and result."""
    return not missing_reason and all(number % _PANEL == 0 for number in channels)


def least_channels(*channels: int) -> int:
    """How many channels of input and result it takes to be faster than a direct convolution, of such as these."""
    return 32 if is_native(*channels) else 128


def pays(x: Tensor, weight: Tensor) -> bool:
    """Whether a training's convolution of (B, I, H, W) with (O, I, 3, 3) is faster so, with gradients and filters.

    Of small ones it is not said, as those of a batch of two images of 300x300 are: there is little time to gain, and
    the gradient of so few pixels can turn on one ReLU whose input is within a rounding of 0. Direct convolutions here
    and where references were computed round alike.
    """
    channels = weight.shape[:2]
    pixels = len(x) * x.shape[2] * x.shape[3]
    tiles = len(x) * -(-x.shape[2] // 4) * -(-x.shape[3] // 4)
    native, processor = is_native(*channels), torch.backends.cpu.get_cpu_capability()
    return (
        processor.startswith("AVX")  # on others it was not measured
        and min(channels) >= least_channels(*channels)
        and pixels * weight.numel() >= _LEAST_WORK
        and 16 * tiles <= (1.6 if native else 1.3) * pixels  # the rest is results beyond the rim
        # Filters are transformed in each step, which a number of tiles must outweigh.
        and (tiles >= 12 if native and processor == "AVX512" else 5 * tiles >= max(channels))
    )


def filters(weight: Tensor, *, backwards: bool = False) -> Tensor:
    """Filters (O, I, 3, 3), float32, transformed for `convolve`.

    Args:
        weight: no autograd.
        backwards: those of the input's gradient, which convolve the result's.

    Returns:
        In an order of the path's own that computes these channels.
    """
    weight = weight.detach()
    if is_native(*weight.shape[:2]):
        native: Tensor = _ops.winograd_filters(weight.contiguous(), backwards)
        return native
    return winograd_torch.filters(weight, backwards)


def convolve(
    x: Tensor, filters: Tensor, bias: Tensor | None, *, relu: bool = False, sums: Tensor | None = None
) -> Tensor:
    """A convolution with padding 1; no autograd.

    Args:
        x: (B, I, H, W), float32 or bfloat16.
        filters: of `filters`.
        bias: (O,), float32.
        relu: apply ReLU to the result.
        sums: (B, O, H, W) of x's type, added to the result before ReLU; in channels-last layout it is overwritten. It
            must not share memory with x.

    Returns:
        (B, O, H, W) of x's type in channels-last layout.
    """
    if sums is not None:
        sums = sums.contiguous(memory_format=torch.channels_last)
    if filters.ndim == 4:  # the library's
        rows = x.permute(0, 2, 3, 1).contiguous()
        native: Tensor
        if sums is None:
            native = _ops.winograd_convolve(rows, filters, bias, relu)
            return native.permute(0, 3, 1, 2)
        native = _ops.winograd_add_(sums.permute(0, 2, 3, 1), rows, filters, bias, relu)
        return native.permute(0, 3, 1, 2)
    y = winograd_torch.convolve(x.float(), filters, bias, relu and sums is None).to(x.dtype)
    if sums is None:
        return y
    sums.add_(y)
    return sums.relu_() if relu else sums


def gradients(
    grad: Tensor, x: Tensor, weight: Tensor, wants_x: bool, wants_weight: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of a convolution's input and weight; no autograd.

    Args:
        grad: (B, O, H, W) of the result, float32.
        x: (B, I, H, W), float32.
        weight: (O, I, 3, 3).
        wants_x, wants_weight: which are computed.

    Returns:
        (B, I, H, W) in channels-last layout, and (O, I, 3, 3).
    """
    grad_x = convolve(grad, filters(weight, backwards=True), None) if wants_x else None
    if not wants_weight:
        return grad_x, None
    if is_native(*weight.shape[:2]):
        native: Tensor = _ops.winograd_filter_gradients(*(t.permute(0, 2, 3, 1).contiguous() for t in (grad, x)))
        return grad_x, native
    return grad_x, winograd_torch.filter_gradients(grad, x)


class WinogradConv2d(Prepared):
    """A 3x3 convolution of stride 1 and padding 1 in channels-last layout; weights take 4 times the room.

    Args:
        weight: (O, I, 3, 3).
        bias: (O,) or None.
        relu: apply ReLU to the result.
        dtype: of the result, float32 or bfloat16; what is computed in is float32.
    """

    packed: Tensor
    bias: Tensor | None

    @property
    def weight(self) -> Tensor:
        """(O, I, 3, 3), for reading; the norm is in it."""
        u = self.packed
        if u.ndim == 4:  # the library's: 36 x O/32 x I x 32
            u = u.transpose(1, 2).flatten(2)
        return winograd_torch.weight(u)

    def __init__(
        self, weight: Tensor, bias: Tensor | None, *, relu: bool = False, dtype: torch.dtype = torch.float32
    ) -> None:
        super().__init__()
        self.relu = relu
        self.out_channels = len(weight)
        self.dtype = dtype
        self.register_buffer("packed", filters(weight.float()), persistent=False)
        self.register_buffer("bias", None if bias is None else bias.detach().float(), persistent=False)
        self.training = False

    def forward(self, x: Tensor, add: Tensor | None = None) -> Tensor:
        """Convolve.

        Args:
            x: (B, I, H, W).
            add: (B, O, H, W) of `dtype`, added to the result before ReLU; it may be overwritten.

        Returns:
            (B, O, H, W) in channels-last layout.
        """
        return convolve(x.to(self.dtype), self.packed, self.bias, relu=self.relu, sums=add)


__all__ = [
    "WinogradConv2d",
    "convolve",
    "filters",
    "gradients",
    "is_native",
    "least_channels",
    "library_file",
    "missing_reason",
    "pays",
]
