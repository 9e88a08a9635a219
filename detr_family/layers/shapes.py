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
