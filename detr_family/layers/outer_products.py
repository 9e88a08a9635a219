"""Sums of outer products, which gradients of weights are: many rows, for which MKL's kernels wait for memory.

A library in C++ (csrc/outer_products.cpp) packs rows that fit into the cache and fetches the next meanwhile. Without
it, and where it was not measured to be faster, torch's `addmm_` does the same.

    torch.ops.detr_family.add_outer_products_(sums, a, b) -> sums
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from detr_family.layers import libraries

LIBRARY = "_outer_products_cpu"
_HIGH, _WIDE = 8, 32  # what sums' sizes are multiples of in the library
_LEAST_ROWS, _LEAST_WIDTH = 128, 256  # with fewer, packing costs what is gained

_library = torch.library.Library("detr_family", "FRAGMENT")
_library.define("add_outer_products_(Tensor(a!) sums, Tensor a, Tensor b) -> Tensor(a!)")
_ops: Any = torch.ops.detr_family
_handle, missing_reason = libraries.load(LIBRARY, "outer products", "a C++ compiler")


def library_file() -> str | None:
    """Path of the loaded library; None where there is none."""
    return libraries.file_of(_handle)


def add(sums: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """sums += a^T b; no autograd.

    Args:
        sums: (M, N). The library takes contiguous ones, and is fastest where N is the larger.
        a: (K, M).
        b: (K, N).

    Returns:
        sums.
    """
    if _pays(sums, a, b):
        native: Tensor = _ops.add_outer_products_(sums, a.contiguous(), b.contiguous())
        return native
    return sums.addmm_(a.t(), b)


def _pays(sums: Tensor, a: Tensor, b: Tensor) -> bool:
    high, wide = sums.shape
    return (
        not missing_reason
        and torch.backends.cpu.get_cpu_capability() == "AVX512"  # with others it was not measured
        and sums.device.type == "cpu"
        and sums.dtype == a.dtype == b.dtype == torch.float32
        and sums.is_contiguous()
        and high % _HIGH == 0
        and wide % _WIDE == 0
        and wide >= _LEAST_WIDTH
        and len(a) >= _LEAST_ROWS
    )


__all__ = ["LIBRARY", "add", "library_file", "missing_reason"]
