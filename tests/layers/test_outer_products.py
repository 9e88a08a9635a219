"""Sums of outer products against torch's in float64, in each instruction set and with any number of threads."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor

from detr_family.layers import fused, outer_products

needs_library = pytest.mark.skipif(bool(outer_products.missing_reason), reason="the library is not built")


@pytest.fixture(autouse=True)
def everything_pays(monkeypatch: pytest.MonkeyPatch) -> None:
    """On any processor, and small ones."""
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    monkeypatch.setattr(outer_products, "_LEAST_ROWS", 0)
    monkeypatch.setattr(outer_products, "_LEAST_WIDTH", 0)


def problem(k: int, m: int, n: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(*size, generator=generator) for size in ((m, n), (k, m), (k, n)))  # type: ignore[return-value]


SIZES = [(1, 8, 32), (383, 8, 64), (384, 40, 32), (385, 16, 96), (1000, 24, 160), (0, 8, 32), (30, 0, 32), (9, 8, 0)]


@pytest.mark.parametrize("size", [*SIZES, (50, 12, 40)])  # the last is torch's
@pytest.mark.parametrize("missing", ["", "not built"])
def test_equals_the_product(size: tuple[int, int, int], missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outer_products, "missing_reason", outer_products.missing_reason or missing)
    sums, a, b = problem(*size)
    expected = sums.double() + a.double().t() @ b.double()
    found = outer_products.add(sums, a, b)
    assert found.data_ptr() == sums.data_ptr()
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-6 * size[0] ** 0.5 * 5)


@pytest.mark.parametrize("which", [(False, True, True), (True, False, False)])
def test_what_is_not_contiguous(which: tuple[bool, ...]) -> None:
    tensors = problem(30, 8, 32)
    expected = tensors[0] + tensors[1].t() @ tensors[2]
    found = outer_products.add(*(x.t().contiguous().t() if turn else x for x, turn in zip(tensors, which, strict=True)))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("threads", [2, 5])
def test_threads_change_nothing(threads: int) -> None:
    before = torch.get_num_threads()
    found = []
    try:
        for number in (1, threads):
            torch.set_num_threads(number)
            found.append(outer_products.add(*problem(800, 24, 7 * 32)))
    finally:
        torch.set_num_threads(before)
    assert outer_products.missing_reason or torch.equal(*found)


_COMPARE = """
import torch
from detr_family.layers import outer_products
from detr_family.layers.deformable_attention_ops import cpu_instructions
g = torch.Generator().manual_seed(0)
a, b = torch.randn(500, 24, generator=g), torch.randn(500, 96, generator=g)
found = torch.ops.detr_family.add_outer_products_(torch.ones(24, 96), a, b)
print(cpu_instructions(), float((found - 1 - a.t() @ b).abs().max()))
"""


@needs_library
@pytest.mark.parametrize("instructions", ["generic", "avx2", "avx512"])
def test_every_instruction_set_computes_the_same(instructions: str) -> None:
    environment = {**os.environ, "DETR_FAMILY_CPU_INSTRUCTIONS": instructions}
    ran = subprocess.run([sys.executable, "-c", _COMPARE], env=environment, capture_output=True, text=True, check=True)
    taken, difference = ran.stdout.split()
    if taken != instructions:
        pytest.skip(f"this processor has no {instructions}")
    assert float(difference) < 1e-4


@needs_library
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda sums, a, b: (sums, a[1:], b), "have no product"),
        (lambda sums, a, b: (sums, a, b[:, :32].contiguous()), "have no product"),
        (lambda sums, a, b: (sums[:4], a[:, :4].contiguous(), b), "4 x 64 is not a multiple of 8 x 32"),
        (lambda sums, a, b: (sums.double(), a, b), "sums must be float32"),
        (lambda sums, a, b: (sums, a, b.half()), "b must be float32"),
        (lambda sums, a, b: (sums, a.t().contiguous().t(), b), "a must be contiguous"),
        (lambda sums, a, b: (sums, a[None], b), "a must be contiguous, on the CPU, and of 2 dimensions"),
    ],
)
def test_what_the_library_does_not_take(change: Any, message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        torch.ops.detr_family.add_outer_products_(*change(*problem(30, 8, 64)))


@pytest.mark.parametrize("size", [(200, 64, 256), (200, 256, 64)])  # the smaller one is to the left
def test_gradients_of_weights(size: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    add = outer_products.add
    monkeypatch.setattr(outer_products, "add", lambda *tensors: seen.append(tensors[0].shape) or add(*tensors))
    _, grad, x = problem(*size)
    torch.testing.assert_close(fused._weight_gradient(grad, x), grad.t() @ x, rtol=0, atol=1e-4)
    assert seen == [(64, 256)]


@pytest.mark.parametrize(
    ("size", "dtype", "pays"),
    [
        ((600, 64, 256), torch.float32, True),
        ((600, 64, 256), torch.float64, False),
        ((600, 60, 256), torch.float32, False),
        ((600, 64, 272), torch.float32, False),
        ((600, 64, 128), torch.float32, False),  # packing outweighs
        ((100, 64, 256), torch.float32, False),
    ],
)
def test_where_it_pays(
    size: tuple[int, int, int], dtype: torch.dtype, pays: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()
    tensors = [tensor.to(dtype) for tensor in problem(*size)]
    for missing in ("", "not built"):
        for processor in ("AVX512", "AVX2"):
            monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda name=processor: name)
            monkeypatch.setattr(outer_products, "missing_reason", missing)
            assert outer_products._pays(*tensors) == (pays and not missing and processor == "AVX512")
