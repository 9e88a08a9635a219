"""Winograd's convolution and its gradients against the direct ones, in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from detr_family.layers import winograd

SIZES = [(1, 1, 1), (2, 4, 8), (2, 13, 6), (3, 9, 70)]


def problem(size: tuple[int, int, int]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    batch, height, width = size
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(batch, 3, height, width, generator=generator)
    grad = torch.randn(batch, 5, height, width, generator=generator)
    return x, torch.randn(5, 3, 3, 3, generator=generator), torch.randn(5, generator=generator), grad


def check(found: Tensor | None, expected: Tensor) -> None:
    assert found is not None
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=2e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("relu", [True, False])
def test_convolution_equals_direct_one(size: tuple[int, int, int], relu: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(winograd, "_TILES", 12)
    x, weight, bias, _ = problem(size)
    expected = F.conv2d(x.double(), weight.double(), bias.double(), padding=1)
    found = winograd.convolve(x, winograd.transformed(weight).transpose(1, 2), bias, relu=relu)
    check(found, expected.relu() if relu else expected)
    assert found.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("size", SIZES)
def test_gradients_equal_direct_ones(size: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(winograd, "_TILES", 12)
    x, weight, _, grad = problem(size)
    leaves = [x.double().requires_grad_(), weight.double().requires_grad_()]
    expected = torch.autograd.grad(F.conv2d(*leaves, padding=1), leaves, grad.double())
    for found, want in zip(winograd.gradients(grad, x, weight, True, True), expected, strict=True):
        check(found, want)
    grad_x, grad_weight = winograd.gradients(grad, x, weight, True, False)
    check(grad_x, expected[0])
    assert grad_weight is None
    grad_x, grad_weight = winograd.gradients(grad, x, weight, False, True)
    check(grad_weight, expected[1])
    assert grad_x is None


@pytest.mark.skipif(not torch.backends.cpu.get_cpu_capability().startswith("AVX"), reason="not measured here")
@pytest.mark.parametrize(
    ("size", "channels", "pays"),
    [
        ((1, 60, 80), 128, True),
        ((1, 60, 80), 64, False),  # the transforms outweigh the products
        ((1, 30, 40), 256, True),
        ((1, 15, 20), 512, False),  # the filters outweigh the images
        ((2, 25, 34), 512, True),
        ((9, 13, 13), 128, False),  # half of the tiles' results are beyond the rim
    ],
)
def test_where_it_pays(size: tuple[int, int, int], channels: int, pays: bool) -> None:
    batch, height, width = size
    x = torch.empty(batch, channels, height, width)
    assert winograd.pays(x, torch.empty(channels, channels, 3, 3)) == pays


def test_autocast_leaves_it_alone() -> None:
    x, weight, bias, grad = problem((2, 13, 6))
    filters = winograd.transformed(weight)
    expected = [
        winograd.convolve(x, filters.transpose(1, 2), bias, relu=True),
        *winograd.gradients(grad, x, weight, True, True),
    ]
    with torch.autocast("cpu", torch.bfloat16):
        found = [
            winograd.convolve(x, winograd.transformed(weight).transpose(1, 2), bias, relu=True),
            *winograd.gradients(grad, x, weight, True, True),
        ]
    for a, b in zip(found, expected, strict=True):
        assert a is not None and b is not None and torch.equal(a, b)
