"""3x3 convolutions by Winograd's minimal filtering, F(4x4, 3x3) (arXiv 1509.09308, sections 3 and 4), and gradients.

4x4 results are had from 6x6 inputs by 36 products in place of 144. The products are matrix products over the channels;
what comes before and after them costs as much as some 64 channels' worth of them, so it pays for more than these.
Gradients take the same steps backwards: the gradient is transformed once for both, and makes 6x6 gradients of the
input, which overlap and are summed.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from detr_family.layers.prepared import Prepared

CHANNELS = 128  # at least, of input and result, for which it pays
_TILES = 256  # worked on at a time: their 36 values of each channel stay in the cache
_TOO_MUCH = 1.3  # times as many results in tiles as are wanted
_CHANNELS_A_TILE = 5  # with more of them the transform of the filters takes what is gained

# The paper's matrices, section 4.3: input, filter, inverse transform.
_INPUT = (
    (4.0, 0.0, -5.0, 0.0, 1.0, 0.0),
    (0.0, -4.0, -4.0, 1.0, 1.0, 0.0),
    (0.0, 4.0, -4.0, -1.0, 1.0, 0.0),
    (0.0, -2.0, -1.0, 2.0, 1.0, 0.0),
    (0.0, 2.0, -1.0, -2.0, 1.0, 0.0),
    (0.0, 4.0, 0.0, -5.0, 0.0, 1.0),
)
_FILTER = (
    (1 / 4, 0.0, 0.0),
    (-1 / 6, -1 / 6, -1 / 6),
    (-1 / 6, 1 / 6, -1 / 6),
    (1 / 24, 1 / 12, 1 / 6),
    (1 / 24, -1 / 12, 1 / 6),
    (0.0, 0.0, 1.0),
)
_INVERSE = (
    (1.0, 1.0, 1.0, 1.0, 1.0, 0.0),
    (0.0, 1.0, -1.0, 2.0, -2.0, 0.0),
    (0.0, 1.0, 1.0, 4.0, 4.0, 0.0),
    (0.0, 1.0, -1.0, 8.0, -8.0, 1.0),
)


def pays(x: Tensor, weight: Tensor) -> bool:
    """Whether a training's convolution of (B, I, H, W) with (O, I, 3, 3) is faster so, with gradients and filters."""
    channels = weight.shape[:2]
    tiles = len(x) * -(-x.shape[2] // 4) * -(-x.shape[3] // 4)
    return (
        torch.backends.cpu.get_cpu_capability().startswith("AVX")  # elsewhere it was not measured
        and min(channels) >= CHANNELS
        and max(channels) <= _CHANNELS_A_TILE * tiles
        and 16 * tiles <= _TOO_MUCH * len(x) * x.shape[2] * x.shape[3]
    )


@torch.autocast("cpu", enabled=False)
def transformed(weight: Tensor) -> Tensor:
    """Filters (O, I, 3, 3) as (36, O, I)."""
    both = torch.kron(torch.tensor(_FILTER), torch.tensor(_FILTER))  # in one step: it is the memory that takes the time
    return (both @ weight.permute(2, 3, 0, 1).reshape(9, -1)).view(36, *weight.shape[:2])


@torch.autocast("cpu", enabled=False)  # bfloat16 has not the digits that the transforms cancel
def convolve(x: Tensor, filters: Tensor, bias: Tensor | None, *, relu: bool) -> Tensor:
    """A convolution with padding 1; no autograd.

    Args:
        x: (B, I, H, W).
        filters: (36, I, O).
        bias: (O,).
        relu: apply ReLU to the result.

    Returns:
        (B, O, H, W) in channels-last layout.
    """
    batch, channels, height, width = x.shape
    out = filters.shape[2]
    rows, down, right = _padded(x)
    inverse = torch.tensor(_INVERSE)
    result = rows.new_empty(batch, height, width, out)
    for start, count in _strips(batch, down, right):
        products = torch.bmm(_seen(rows, start, count, right).view(36, -1, channels), filters)
        y = _both_ways(inverse, products.view(6, 6, -1)).view(4, 4, batch, count, right, out)
        if bias is not None:
            y += bias
        if relu:
            y.relu_()
        y = y.permute(2, 3, 0, 4, 1, 5).reshape(batch, 4 * count, 4 * right, out)
        stop = min(4 * (start + count), height)
        result[:, 4 * start : stop] = y[:, : stop - 4 * start, :width]
    return result.permute(0, 3, 1, 2)


@torch.autocast("cpu", enabled=False)
def gradients(
    grad: Tensor, x: Tensor, weight: Tensor, wants_x: bool, wants_weight: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of a convolution's input and weight; no autograd.

    Args:
        grad: (B, O, H, W) of the result.
        x: (B, I, H, W).
        weight: (O, I, 3, 3).
        wants_x, wants_weight: which are computed.

    Returns:
        (B, I, H, W) in channels-last layout, and (O, I, 3, 3).
    """
    out, channels = weight.shape[:2]
    batch, _, height, width = x.shape
    rows, down, right = _padded(x)
    grad = F.pad(grad.permute(0, 2, 3, 1), (0, 0, 0, 4 * right - width, 0, 4 * down - height)).contiguous()
    backwards, inverse = torch.tensor(_INPUT).t(), torch.tensor(_INVERSE).t()
    filters = transformed(weight) if wants_x else None
    # A tile's input reaches two rows and columns into the next ones.
    of_x = grad.new_zeros(batch, down + 1, 4, right + 1, 4, channels) if wants_x else None
    of_filters = grad.new_zeros(36, out, channels) if wants_weight else None
    for start, count in _strips(batch, down, right):
        part = grad[:, 4 * start : 4 * (start + count)].view(batch, count, 4, right, 4, out)
        spread = _both_ways(inverse, part.permute(2, 4, 0, 1, 3, 5).reshape(4, 4, -1)).view(36, -1, out)
        if of_filters is not None:
            of_filters.baddbmm_(spread.transpose(1, 2), _seen(rows, start, count, right).view(36, -1, channels))
        if of_x is not None and filters is not None:
            tiles = _both_ways(backwards, torch.bmm(spread, filters).view(6, 6, -1))
            tiles = tiles.view(6, 6, batch, count, right, channels).permute(2, 3, 0, 4, 1, 5)
            stop = start + count
            of_x[:, start:stop, :, :right] += tiles[:, :, :4, :, :4]
            of_x[:, start + 1 : stop + 1, :2, :right] += tiles[:, :, 4:, :, :4]
            of_x[:, start:stop, :, 1:, :2] += tiles[:, :, :4, :, 4:]
            of_x[:, start + 1 : stop + 1, :2, 1:, :2] += tiles[:, :, 4:, :, 4:]
    grad_x = grad_weight = None
    if of_x is not None:
        grad_x = of_x.view(batch, 4 * down + 4, 4 * right + 4, channels)[:, 1 : height + 1, 1 : width + 1]
        grad_x = grad_x.permute(0, 3, 1, 2).contiguous(memory_format=torch.channels_last)
    if of_filters is not None:
        both = torch.kron(torch.tensor(_FILTER), torch.tensor(_FILTER))
        grad_weight = (both.t() @ of_filters.view(36, -1)).view(3, 3, out, channels).permute(2, 3, 0, 1).contiguous()
    return grad_x, grad_weight


def _padded(x: Tensor) -> tuple[Tensor, int, int]:
    """(B, I, H, W) as (B, H', W', I) with zeros around it, and how many tiles that is down and to the right."""
    x = x.permute(0, 2, 3, 1)
    _, height, width, _ = x.shape
    down, right = -(-height // 4), -(-width // 4)
    return F.pad(x, (0, 0, 1, 4 * right + 1 - width, 1, 4 * down + 1 - height)).contiguous(), down, right


def _strips(batch: int, down: int, right: int) -> Iterator[tuple[int, int]]:
    """First and number of the rows of tiles that are worked on at a time."""
    at_once = max(1, _TILES // (batch * right))
    for start in range(0, down, at_once):
        yield start, min(at_once, down - start)


def _seen(rows: Tensor, start: int, count: int, right: int) -> Tensor:
    """The 6x6 inputs of some rows of tiles, transformed: (6, 6, B * count * right * I)."""
    batch, channels = len(rows), rows.shape[-1]
    image, row, column, _ = rows.stride()
    shape, strides = (6, 6, batch, count, right, channels), (row, column, image, 4 * row, 4 * column, 1)
    tiles = rows.as_strided(shape, strides, 4 * start * row)
    return _both_ways(torch.tensor(_INPUT), tiles.reshape(6, 6, -1))


def _both_ways(matrix: Tensor, tiles: Tensor) -> Tensor:
    """matrix @ tile @ matrix^T for tiles (n, n, ...) and a matrix of m x n: (m, m, ...)."""
    m, n = matrix.shape
    half = (matrix @ tiles.view(n, -1)).view(m, n, -1)
    return torch.bmm(matrix.expand(m, m, n), half)


class WinogradConv2d(Prepared):
    """A 3x3 convolution of stride 1 and padding 1 in float32, in channels-last layout; weights take 4 times the room.

    Results differ from a direct convolution's by some 5 times the rounding of float32.

    Args:
        weight: (O, I, 3, 3).
        bias: (O,) or None.
        relu: apply ReLU to the result.
    """

    packed: Tensor
    bias: Tensor | None

    def __init__(self, weight: Tensor, bias: Tensor | None, *, relu: bool = False) -> None:
        super().__init__()
        self.relu = relu
        self.out_channels = len(weight)
        self.dtype = torch.float32
        filters = torch.tensor(_FILTER, dtype=torch.float64)
        packed = torch.empty(6, 6, weight.shape[1], self.out_channels)
        for i in range(0, self.out_channels, 32):  # a few at a time, lest all of them be there in float64
            some = weight[i : i + 32].detach().double()
            packed[..., i : i + 32] = torch.einsum("ij,ocjk,lk->ilco", filters, some, filters)
        packed = packed.flatten(0, 1)
        self.register_buffer("packed", packed, persistent=False)  # 36 x I x O
        self.register_buffer("bias", None if bias is None else bias.detach().float(), persistent=False)
        self.training = False

    def forward(self, x: Tensor) -> Tensor:
        """(B, I, H, W) -> (B, O, H, W) in channels-last layout."""
        return convolve(x.float(), self.packed, self.bias, relu=self.relu)
