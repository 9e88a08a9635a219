"""Winograd's convolution and its gradients against the direct ones, in float64."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from detr_family.layers import winograd, winograd_torch
from detr_family.layers.deformable_attention_ops import cpu_instructions

SIZES = [(1, 1, 1), (2, 4, 8), (2, 13, 6), (3, 9, 70), (5, 29, 31)]  # the last has two strips of tiles for gradients
CHANNELS = [(3, 5), (32, 96), (64, 32)]  # the first is torch's operators', the others the library's


@pytest.fixture(autouse=True)
def strips(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(winograd_torch, "_TILES", 12)


def problem(size: tuple[int, int, int], channels: tuple[int, int] = (3, 5)) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    batch, height, width = size
    into, out = channels
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(batch, into, height, width, generator=generator)
    grad = torch.randn(batch, out, height, width, generator=generator)
    weight, bias = torch.randn(out, into, 3, 3, generator=generator), torch.randn(out, generator=generator)
    return x, weight, bias, grad


def check(found: Tensor | None, expected: Tensor) -> None:
    assert found is not None
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=2e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("channels", CHANNELS)
@pytest.mark.parametrize("relu", [True, False])
def test_convolution_equals_direct_one(size: tuple[int, int, int], channels: tuple[int, int], relu: bool) -> None:
    x, weight, bias, _ = problem(size, channels)
    expected = F.conv2d(x.double(), weight.double(), bias.double(), padding=1)
    found = winograd.convolve(x, winograd.filters(weight), bias, relu=relu)
    check(found, expected.relu() if relu else expected)
    assert found.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("channels", [(256, 248), (256, 256)])  # torch's operators, and the library's
def test_rounding_is_as_said(channels: tuple[int, int]) -> None:
    x, weight, _, grad = problem((1, 16, 32), channels)
    y = winograd.convolve(x, winograd.filters(weight), None)
    grad_x, grad_weight = winograd.gradients(grad, x, weight, True, True)

    def direct(dtype: torch.dtype) -> tuple[Tensor, ...]:
        inputs, filters = x.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_()
        result = F.conv2d(inputs, filters, padding=1)
        return result.detach(), *torch.autograd.grad(result, (inputs, filters), grad.to(dtype))

    for found, exact in zip((y, grad_x, grad_weight), direct(torch.float64), strict=True):
        assert found is not None
        lost = (found - exact).square().mean().sqrt() / exact.square().mean().sqrt()
        assert lost < 1.6e-6  # with the paper's points 2.3e-6


@pytest.mark.parametrize("channels", CHANNELS)
@pytest.mark.parametrize("relu", [True, False])
def test_sums_are_added_to(channels: tuple[int, int], relu: bool) -> None:
    x, weight, bias, sums = problem((2, 13, 6), channels)
    expected = F.conv2d(x.double(), weight.double(), bias.double(), padding=1) + sums
    given = sums.contiguous(memory_format=torch.channels_last)
    found = winograd.convolve(x, winograd.filters(weight), bias, relu=relu, sums=given)
    check(found, expected.relu() if relu else expected)
    assert found.data_ptr() == given.data_ptr()
    found = winograd.convolve(x, winograd.filters(weight), bias, relu=relu, sums=sums)  # in the usual layout
    check(found, expected.relu() if relu else expected)


@pytest.mark.parametrize("channels", CHANNELS)
def test_bfloat16_is_rounded_and_no_more(channels: tuple[int, int]) -> None:
    x, weight, bias, sums = (t.bfloat16() for t in problem((2, 13, 6), channels))
    weight, bias = weight.float(), bias.float()
    found = winograd.convolve(x, winograd.filters(weight), bias)
    assert found.dtype == torch.bfloat16
    expected = F.conv2d(x.double(), weight.double(), bias.double(), padding=1)
    torch.testing.assert_close(found.double(), expected, rtol=2**-8, atol=1e-4 * float(expected.abs().max()))
    given = sums.contiguous(memory_format=torch.channels_last)
    found = winograd.convolve(x, winograd.filters(weight), bias, sums=given)
    torch.testing.assert_close(found.double(), expected + sums, rtol=2**-7, atol=2**-8 * float(expected.abs().max()))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("channels", CHANNELS)
def test_gradients_equal_direct_ones(size: tuple[int, int, int], channels: tuple[int, int]) -> None:
    x, weight, _, grad = problem(size, channels)
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


def test_the_library_is_taken() -> None:
    if winograd.missing_reason:
        assert cpu_instructions() == "", "the libraries are built together"
        pytest.skip(winograd.missing_reason)
    x, weight, _, grad = problem((1, 4, 4), (32, 32))
    with torch.profiler.profile() as profile:
        winograd.convolve(x, winograd.filters(weight), None)
        winograd.gradients(grad, x, weight, True, True)
    names = [event.name for event in profile.events() if event.name.startswith("detr_family::")]
    assert sorted(set(names)) == [f"detr_family::winograd_{n}" for n in ("convolve", "filter_gradients", "filters")]


@pytest.mark.skipif(bool(winograd.missing_reason), reason="the library is not built")
def test_the_library_refuses_what_it_would_misread() -> None:
    ops = torch.ops.detr_family
    x, filters = torch.zeros(1, 4, 4, 32), torch.zeros(36, 1, 32, 32)
    for call, message in (
        (lambda: ops.winograd_convolve(x.transpose(1, 2), filters, None, False), "x must be contiguous"),
        (lambda: ops.winograd_convolve(x[0], filters, None, False), "of 4 dimensions"),
        (lambda: ops.winograd_convolve(x.double(), filters, None, False), "x must be float32, not Double"),
        (lambda: ops.winograd_convolve(x[..., :31].contiguous(), filters, None, False), "has 31 channels"),
        (lambda: ops.winograd_convolve(torch.zeros(1, 4, 4, 64), filters, None, False), "other channels"),
        (lambda: ops.winograd_convolve(x, filters, torch.zeros(31), False), "bias is for other channels"),
        (lambda: ops.winograd_add_(x[:, :3].contiguous(), x, filters, None, False), "sums must have the shape"),
        (lambda: ops.winograd_add_(x, x, filters, None, False), "sums must not share memory with x"),
        (lambda: ops.winograd_filters(torch.zeros(32, 32, 1, 1), False), "filters must be 3x3"),
        (lambda: ops.winograd_filters(torch.zeros(32, 33, 3, 3), False), "weight has 33 channels"),
        (lambda: ops.winograd_filter_gradients(x, torch.zeros(1, 4, 5, 32)), "of another size than x"),
        (lambda: ops.winograd_filter_gradients(x.bfloat16(), x), "gradients are of float32"),
    ):
        with pytest.raises(RuntimeError, match=message):
            call()
    for empty in (torch.zeros(0, 4, 4, 32), torch.zeros(1, 0, 4, 32)):
        assert ops.winograd_convolve(empty, filters, None, False).shape == empty.shape
        assert not ops.winograd_filter_gradients(empty, empty).any()


@pytest.mark.parametrize("channels", CHANNELS)
def test_no_images_give_no_results(channels: tuple[int, int]) -> None:
    x, weight, bias, grad = problem((0, 4, 4), channels)
    assert winograd.convolve(x, winograd.filters(weight), bias).shape == grad.shape
    grad_x, grad_weight = winograd.gradients(grad, x, weight, True, True)
    assert grad_x is not None and grad_x.shape == x.shape
    assert grad_weight is not None and grad_weight.shape == weight.shape and not grad_weight.any()


@pytest.mark.parametrize("channels", CHANNELS)
def test_weights_can_be_read(channels: tuple[int, int]) -> None:
    _, weight, bias, _ = problem((1, 1, 1), channels)
    torch.testing.assert_close(winograd.WinogradConv2d(weight, bias).weight, weight, atol=1e-5, rtol=1e-5)


_COMPARE = """
import torch
from detr_family.layers import winograd, winograd_torch
from detr_family.layers.deformable_attention_ops import cpu_instructions
g = torch.Generator().manual_seed(0)
x, grad = torch.randn(2, 32, 9, 14, generator=g), torch.randn(2, 64, 9, 14, generator=g)
weight, bias = torch.randn(64, 32, 3, 3, generator=g), torch.randn(64, generator=g)
y = winograd.convolve(x, winograd.filters(weight), bias, relu=True)
found = y, *winograd.gradients(grad, x, weight, True, True)
want = (
    winograd_torch.convolve(x, winograd_torch.filters(weight, False), bias, True),
    winograd_torch.convolve(grad, winograd_torch.filters(weight, True), None, False),
    winograd_torch.filter_gradients(grad, x),
)
print(cpu_instructions(), max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(found, want)))
"""


@pytest.mark.skipif(bool(winograd.missing_reason), reason="the library is not built")
@pytest.mark.parametrize("instructions", ["generic", "avx2", "avx512"])
def test_every_instruction_set_computes_the_same(instructions: str) -> None:
    environment = {**os.environ, "DETR_FAMILY_CPU_INSTRUCTIONS": instructions}
    ran = subprocess.run([sys.executable, "-c", _COMPARE], env=environment, capture_output=True, text=True, check=True)
    taken, difference = ran.stdout.split()
    if taken != instructions:
        pytest.skip(f"this processor has no {instructions}")
    assert float(difference) < 2e-5


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_threads_change_nothing(threads: int) -> None:
    x, weight, bias, grad = problem((3, 9, 70), (32, 64))
    before = torch.get_num_threads()
    found = []
    try:
        for number in (1, threads):
            torch.set_num_threads(number)
            y = winograd.convolve(x, winograd.filters(weight), bias)
            found.append((y, *winograd.gradients(grad, x, weight, True, True)))
    finally:
        torch.set_num_threads(before)
    for a, b in zip(*found, strict=True):
        assert a is not None and b is not None and torch.equal(a, b)


@pytest.mark.parametrize(
    ("size", "channels", "native", "otherwise"),
    [
        ((1, 60, 80), 128, True, True),
        ((1, 60, 80), 136, True, True),  # no multiple of 32
        ((1, 60, 80), 100, False, False),
        ((2, 36, 42), 128, False, False),  # too little work
        ((1, 120, 160), 64, True, False),  # the transforms outweigh the products
        ((1, 320, 320), 16, False, False),
        ((1, 15, 20), 512, "AVX512", False),  # the filters outweigh the images
        ((1, 8, 12), 1024, False, False),
        ((25, 13, 13), 128, True, False),  # a third of the tiles' results is beyond the rim
        ((50, 9, 9), 128, False, False),
    ],
)
def test_where_it_pays(
    size: tuple[int, int, int], channels: int, native: bool | str, otherwise: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch, height, width = size
    x, weight = torch.empty(batch, channels, height, width), torch.empty(channels, channels, 3, 3)
    for processor in ("AVX512", "AVX2"):
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda name=processor: name)
        for missing, pays in (("", native), ("not built", otherwise)):
            monkeypatch.setattr(winograd, "missing_reason", missing)
            assert winograd.pays(x, weight) == (pays is True or pays == processor)


@pytest.mark.parametrize("channels", CHANNELS)
def test_autocast_leaves_it_alone(channels: tuple[int, int]) -> None:
    x, weight, bias, grad = problem((2, 13, 6), channels)

    def compute() -> tuple[Tensor | None, ...]:
        filters = winograd.filters(weight)
        y = winograd.convolve(x, filters, bias, relu=True)
        return y, winograd.WinogradConv2d(weight, bias).weight, *winograd.gradients(grad, x, weight, True, True)

    expected = compute()
    with torch.autocast("cpu", torch.bfloat16):
        found = compute()
    for a, b in zip(found, expected, strict=True):
        assert a is not None and b is not None and torch.equal(a, b)
