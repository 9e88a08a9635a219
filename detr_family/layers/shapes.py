"""Sizes as tensors, also where they are not numbers yet: while a graph is traced or exported."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def int_tensor(rows: Sequence[Any], device: torch.device) -> Tensor:
    """int64 tensor of ints, or of rows of ints, on `device`.

    torch.jit.trace has sizes as tensors of no dimension, which torch.tensor would freeze.

    Args:
        rows: n ints, or n rows of m ints each.
        device: where it goes, without waiting for it.
    """
    nested = [list(row) if isinstance(row, Sequence) else row for row in rows]
    if not torch.jit.is_tracing():
        return torch.tensor(nested, dtype=torch.int64).to(device, non_blocking=True)
    stacked = [int_tensor(row, device) if isinstance(row, list) else torch.as_tensor(row) for row in nested]
    return torch.stack([x.to(device, torch.int64) for x in stacked])


def at_most(most: int, size: Any) -> Any:
    """The smaller one, also where the size is not a number yet: a comparison would make it one.

    Args:
        most: a number.
        size: an int; one that torch.export or torch.compile keeps open; in torch.jit.trace a tensor of no dimension.
    """
    if isinstance(size, Tensor):
        return size.clamp(max=most)
    return torch.sym_min(most, size)


def nearest(mask: Tensor, size: Sequence[Any]) -> Tensor:
    """A mask at a smaller size by the nearest pixel.

    Written out in whole numbers, so that every runtime takes the same pixels: a resizing node divides by the float of
    size / full, and of 120 rows made 8, onnxruntime takes row 104 for 105. F.interpolate gives the same where a stride
    is a power of two and the size rounded up, as in the releases; of some other sizes it takes the pixel before.

    Args:
        mask: (B, H, W).
        size: h and w, also where they are not numbers yet.

    Returns:
        (B, h, w) of the mask's type.
    """
    for dim, count in enumerate(size, 1):
        places = torch.arange(count, device=mask.device) * mask.shape[dim] // count
        mask = mask.index_select(dim, places)
    return mask
