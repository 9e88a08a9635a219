"""Winograd's 3x3 convolution and its filters' gradients in torch's own operators, where the library is not built.

Shapes are those of winograd.py, but that filters are (36, I, O). The native kernels are held to this file's numbers.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

_TILES = 256  # worked on at a time: their 36 values of each channel stay in the cache

# Where the tiles' polynomials are taken, beside infinity. The paper has 1 and 2 (section 4.3), whose transforms lose
# twice as much to rounding; these and their powers are exact in float32.
_POINTS = (0.0, 5 / 8, -5 / 8, 3 / 2, -3 / 2)


def _matrices() -> tuple[list[list[float]], list[list[float]], list[list[float]]]:
    """Toom and Cook's transforms of input (6, 6) and filter (6, 3), and the inverse one (4, 6)."""
    inputs, filters = [], []
    for i, point in enumerate(_POINTS):
        others = np.array([*_POINTS[:i], *_POINTS[i + 1 :]])
        inputs.append([*np.poly(others)[::-1].tolist(), 0.0])  # the polynomial that is 0 at the others
        filters.append([point**k / float(np.prod(point - others)) for k in range(3)])
    inputs.append(np.poly(_POINTS)[::-1].tolist())
    filters.append([0.0, 0.0, 1.0])
    inverse = [[*(point**k for point in _POINTS), float(k == 3)] for k in range(4)]
    return inputs, filters, inverse


_INPUT, _FILTER, _INVERSE = _matrices()


@torch.autocast("cpu", enabled=False)
def filters(weight: Tensor, backwards: bool) -> Tensor:
    """Filters (O, I, 3, 3) as (36, I, O), or those of the input's gradient as (36, O, I)."""
    weight = weight.flip(2, 3) if backwards else weight.transpose(0, 1)
    both = torch.kron(torch.tensor(_FILTER), torch.tensor(_FILTER))  # in one step: it is the memory that takes the time
    return (both @ weight.permute(2, 3, 0, 1).reshape(9, -1)).view(36, *weight.shape[:2])


@torch.autocast("cpu", enabled=False)
def weight(filters: Tensor) -> Tensor:
    """(O, I, 3, 3) of `filters` (36, I, O), which were transformed forwards."""
    back = torch.tensor(np.linalg.pinv(_FILTER), dtype=torch.float32)
    return _both_ways(back, filters.reshape(6, 6, -1)).view(3, 3, *filters.shape[1:]).permute(3, 2, 0, 1).contiguous()


@torch.autocast("cpu", enabled=False)  # bfloat16 has not the digits that the transforms cancel
def convolve(x: Tensor, filters: Tensor, bias: Tensor | None, relu: bool) -> Tensor:
    """The convolution of x (B, I, H, W), float32, with padding 1: (B, O, H, W) in channels-last layout."""
    batch, channels, height, width = x.shape
    out = filters.shape[2]
    if not x.numel():
        return x.new_zeros(batch, height, width, out).permute(0, 3, 1, 2)
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
def filter_gradients(grad: Tensor, x: Tensor) -> Tensor:
    """The filters' gradient (O, I, 3, 3) from that of the result (B, O, H, W) and x (B, I, H, W), float32."""
    out, channels = grad.shape[1], x.shape[1]
    batch, _, height, width = x.shape
    if not x.numel():
        return x.new_zeros(out, channels, 3, 3)
    rows, down, right = _padded(x)
    grad = F.pad(grad.permute(0, 2, 3, 1), (0, 0, 0, 4 * right - width, 0, 4 * down - height)).contiguous()
    inverse = torch.tensor(_INVERSE).t()
    of_filters = grad.new_zeros(36, out, channels)
    for start, count in _strips(batch, down, right):
        part = grad[:, 4 * start : 4 * (start + count)].view(batch, count, 4, right, 4, out)
        spread = _both_ways(inverse, part.permute(2, 4, 0, 1, 3, 5).reshape(4, 4, -1)).view(36, -1, out)
        of_filters.baddbmm_(spread.transpose(1, 2), _seen(rows, start, count, right).view(36, -1, channels))
    both = torch.kron(torch.tensor(_FILTER), torch.tensor(_FILTER))
    return (both.t() @ of_filters.view(36, -1)).view(3, 3, out, channels).permute(2, 3, 0, 1).contiguous()


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
