"""Spatial encodings of a feature map: fixed sine and learned (DETR, section 3.2 and table 3)."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


def sine_waves(angle: Tensor, dim: int, temperature: float) -> Tensor:
    """Sines and cosines in turn, of wavelengths that grow geometrically from 2 pi to 2 pi * temperature.

    Args:
        angle: (...) radians.
        dim: channels of the result, even.
        temperature: see above.

    Returns:
        (..., dim).
    """
    channel = torch.arange(dim // 2, dtype=torch.float32, device=angle.device)
    angle = angle[..., None] / temperature ** (2 * channel / dim)  # ... x dim/2
    return torch.stack([angle.sin(), angle.cos()], dim=-1).flatten(-2)


def sine_of_coordinates(coordinates: Tensor, dim: int, temperature: float) -> Tensor:
    """The encoding of points or boxes, in the order y, x(, w, h) of the releases.

    Args:
        coordinates: (..., 2) as x, y or (..., 4) as x, y, w, h, in [0, 1].
        dim: channels for each coordinate, even.
        temperature: longest wavelength in units of 2 pi.

    Returns:
        (..., 2 * dim) or (..., 4 * dim) float32.
    """
    waves = sine_waves(coordinates.float() * (2 * math.pi), dim, temperature)  # ... x n x dim
    order = [1, 0, 2, 3][: coordinates.shape[-1]]
    return waves[..., order, :].flatten(-2)


class SinePositionEncoding(nn.Module):
    """Sine and cosine of the absolute position, half of the channels for y and half for x.

    Positions count the unpadded pixels of each image and are scaled to (0, 2 pi], so that an image's
    encoding does not depend on what it is batched with.

    Args:
        dim: channels of the encoding, a multiple of 4.
        temperature_x: the largest wavelength, in units of 2 pi, of the x half (10000 in DETR, 20 in DAB-DETR).
        temperature_y: the same for the y half.
        offset: added to the count of pixels, which begins with 1: -0.5 in Deformable DETR, 0 in the others.

    Raises:
        ValueError: `dim` is no multiple of 4.
    """

    def __init__(self, dim: int, *, temperature_x: float, temperature_y: float, offset: float = 0.0) -> None:
        super().__init__()
        if dim % 4:
            raise ValueError(f"a sine encoding needs channels in multiples of 4, got {dim} (MODEL.DETR.HIDDEN_DIM)")
        self.dim = dim
        self.temperature_x = temperature_x
        self.temperature_y = temperature_y
        self.offset = offset

    def forward(self, mask: Tensor) -> Tensor:
        """(B, H, W) bool, True = padding -> (B, H, W, D) float32."""
        valid = ~mask
        y = valid.cumsum(1, dtype=torch.float32)
        x = valid.cumsum(2, dtype=torch.float32)
        # The releases' eps: keeps fully padded rows and columns finite.
        y = (y + self.offset) / (y[:, -1].unsqueeze(1) + 1e-6) * (2 * math.pi)
        x = (x + self.offset) / (x[:, :, -1].unsqueeze(2) + 1e-6) * (2 * math.pi)
        half = self.dim // 2
        return torch.cat([sine_waves(y, half, self.temperature_y), sine_waves(x, half, self.temperature_x)], dim=3)


class LearnedPositionEncoding(nn.Module):
    """One learned vector per column and per row of the feature map, x half first.

    Args:
        dim: channels of the encoding, even.
        size: the most rows and columns that a feature map may have (50 in DETR).

    Raises:
        ValueError: in `forward`, a feature map larger than `size`.
    """

    def __init__(self, dim: int, *, size: int) -> None:
        super().__init__()
        self.row_embed = nn.Embedding(size, dim // 2)
        self.col_embed = nn.Embedding(size, dim // 2)
        nn.init.uniform_(self.row_embed.weight)
        nn.init.uniform_(self.col_embed.weight)

    def forward(self, mask: Tensor) -> Tensor:
        """(B, H, W) bool, of which only the size counts -> (B, H, W, D)."""
        batch, height, width = mask.shape
        size = self.row_embed.num_embeddings
        if max(height, width) > size:
            raise ValueError(
                f"a feature map of {height}x{width} is larger than the learned encoding's {size} rows and columns: "
                "raise MODEL.DETR.SPATIAL_ENCODING.LEARNED_SIZE or lower INPUT.MAX_SIZE_TRAIN/TEST"
            )
        x = self.col_embed.weight[:width].expand(height, -1, -1)
        y = self.row_embed.weight[:height, None].expand(-1, width, -1)
        return torch.cat([x, y], dim=-1).expand(batch, -1, -1, -1)
