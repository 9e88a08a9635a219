"""Multi-scale deformable attention in plain torch calls (Deformable DETR, arXiv 2010.04159, equation 3).

The path that runs on every device and that exports: `grid_sample` once per level, nothing of our own below
it. The native kernels (csrc/) are held to the numbers of this file.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

Shapes = Sequence[tuple[int, int]]


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The type in which coordinates and sums are kept for values of type `dtype`: float64 for itself, else
    float32.

    At a feature width of 167 a bfloat16 coordinate would step by 0.65 pixel.
    """
    return torch.float64 if dtype == torch.float64 else torch.float32


def ms_deform_attn_torch(
    value: Tensor, spatial_shapes: Shapes, sampling_locations: Tensor, attention_weights: Tensor
) -> Tensor:
    """Sums, over levels and points, the attention weight times the bilinearly sampled value.

    Args:
        value: (B, S, M, D), the levels one after another, each row by row.
        spatial_shapes: L pairs (height, width) of ints (symbolic ones too), S = sum of height * width.
        sampling_locations: (B, Q, M, L, P, 2) as (x, y), 0 and 1 being a level's outer edges.
        attention_weights: (B, Q, M, L, P).

    Returns:
        (B, Q, M*D) in the type of `value`. Outside of a level the value is zero; a point with a NaN
        coordinate counts as outside.
    """
    batch, _, heads, channels = value.shape
    queries, points = sampling_locations.shape[1], sampling_locations.shape[4]
    dtype = compute_dtype(value.dtype)
    # Anything from one level's size outside on is as far as -1 or 2 are: samples nothing, and fits an int.
    locations = sampling_locations.to(dtype).nan_to_num(nan=-1.0).clamp(-1.0, 2.0)
    grids = (2.0 * locations - 1.0).permute(3, 0, 2, 1, 4, 5).flatten(1, 2)  # L x B*M x Q x P x 2
    weights = attention_weights.to(dtype).permute(0, 2, 1, 3, 4).flatten(0, 1)  # B*M x Q x L x P
    levels = value.to(dtype).split([height * width for height, width in spatial_shapes], dim=1)
    if queries == 0 or batch == 0:  # grid_sample takes no empty batch; keep the graph
        nothing = sum(level.sum() for level in levels) + locations.sum() + weights.sum()
        return (nothing * value.new_zeros(batch, queries, heads * channels)).to(value.dtype)
    output = value.new_zeros((), dtype=dtype)
    for index, ((height, width), level) in enumerate(zip(spatial_shapes, levels, strict=True)):
        feature = level.permute(0, 2, 3, 1).reshape(batch * heads, channels, height, width)
        sampled = F.grid_sample(
            feature, grids[index], mode="bilinear", padding_mode="zeros", align_corners=False
        )  # B*M x D x Q x P
        output = output + (sampled * weights[:, None, :, index]).sum(-1)  # B*M x D x Q
    output = output.view(batch, heads * channels, queries).transpose(1, 2)
    assert points == weights.shape[-1]
    return output.to(value.dtype).contiguous()  # B x Q x M*D


def fused_inputs(
    spatial_shapes: Tensor, reference_points: Tensor, sampling_offsets: Tensor, attention_logits: Tensor
) -> tuple[Tensor, Tensor]:
    """Turns what the query's two linear layers give into sampling locations and attention weights.

    For reference points (x, y): location = reference + offset / (width, height) of the level: offsets in
    pixels. For reference boxes (x, y, w, h): location = (x, y) + offset / P * (w, h) / 2: offsets in half
    boxes.

    Args:
        spatial_shapes: (L, 2) as (height, width).
        reference_points: (B, Q, L, 2 or 4), normalised.
        sampling_offsets: (B, Q, M, L, P, 2).
        attention_logits: (B, Q, M, L, P); the softmax runs over levels and points together.

    Returns:
        sampling_locations (B, Q, M, L, P, 2) and attention_weights (B, Q, M, L, P), float32 (or float64).
    """
    dtype = torch.float64 if reference_points.dtype == torch.float64 else torch.float32
    reference = reference_points.to(dtype)[:, :, None, :, None]  # B x Q x 1 x L x 1 x (2 or 4)
    offsets = sampling_offsets.to(dtype)
    if reference.shape[-1] == 2:
        size = spatial_shapes.flip(-1).to(dtype)[:, None]  # L x 1 x 2
        locations = reference + offsets / size
    else:
        points = offsets.shape[4]
        locations = reference[..., :2] + offsets * (reference[..., 2:] * (0.5 / points))
    weights = attention_logits.to(dtype).flatten(3).softmax(-1).view(attention_logits.shape)
    return locations, weights
