"""3x3 convolutions by Winograd's minimal filtering, F(4x4, 3x3) (arXiv 1509.09308, sections 3 and 4), for inference.

4x4 results are had from 6x6 inputs by 36 products in place of 144. The products are matrix products over the channels;
what comes before and after them costs as much as some 64 channels' worth of them, so it pays for more than these.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from detr_family.layers.prepared import Prepared

_TILES = 256  # worked on at a time: their 36 values of each channel stay in the cache

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
    before: Tensor
    after: Tensor

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
        before, after = torch.tensor(_INPUT), torch.tensor(_INVERSE)
        self.register_buffer("before", torch.kron(before, before), persistent=False)  # 36 x 36
        self.register_buffer("after", torch.kron(after, after), persistent=False)  # 16 x 36
        self.training = False

    @torch.autocast("cpu", enabled=False)  # bfloat16 has not the digits that the transforms cancel
    def forward(self, x: Tensor) -> Tensor:
        """(B, I, H, W) -> (B, O, H, W) in channels-last layout."""
        x = x.float().permute(0, 2, 3, 1)  # B x H x W x I
        batch, height, width, channels = x.shape
        down, right = -(-height // 4), -(-width // 4)  # tiles
        x = F.pad(x, (0, 0, 1, 4 * right + 1 - width, 1, 4 * down + 1 - height)).contiguous()
        image, row, column, _ = x.stride()
        result = x.new_empty(batch, height, width, self.out_channels)
        at_once = max(1, _TILES // (batch * right))
        for start in range(0, down, at_once):
            count = min(at_once, down - start)
            tiles = x.as_strided(
                (6, 6, batch, count, right, channels),
                (row, column, image, 4 * row, 4 * column, 1),
                4 * start * row,
            )
            products = torch.bmm((self.before @ tiles.reshape(36, -1)).view(36, -1, channels), self.packed)
            y = (self.after @ products.view(36, -1)).view(4, 4, batch, count, right, self.out_channels)
            if self.bias is not None:
                y += self.bias
            if self.relu:
                y.relu_()
            y = y.permute(2, 3, 0, 4, 1, 5).reshape(batch, 4 * count, 4 * right, self.out_channels)
            stop = min(4 * (start + count), height)
            result[:, 4 * start : stop] = y[:, : stop - 4 * start, :width]
        return result.permute(0, 3, 1, 2)
