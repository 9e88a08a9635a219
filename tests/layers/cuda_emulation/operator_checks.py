"""What only the CUDA code does, on the emulated library; test_cuda_emulation.py runs this file in its own process."""

from __future__ import annotations

import ctypes
import math

import pytest
import torch
from torch import Tensor

from detr_family.layers import deformable_attention as module
from detr_family.layers import deformable_attention_ops as ops
from detr_family.layers import ms_deform_attn
from detr_family.layers.deformable_attention_torch import ms_deform_attn_torch

SHAPES, STARTS = [(9, 11), (5, 6), (1, 1)], [0, 99, 129]
operators = torch.ops.detr_family


def operands(
    queries: int = 7, heads: int = 4, channels: int = 32, points: int = 4, shapes: list[tuple[int, int]] = SHAPES
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Value, locations, weights and the output's gradient, float32."""
    generator = torch.Generator().manual_seed(0)
    tokens = sum(height * width for height, width in shapes)
    value = torch.randn(2, tokens, heads, channels, generator=generator)
    locations = torch.rand(2, queries, heads, len(shapes), points, 2, generator=generator) * 1.2 - 0.1
    weights = torch.randn(locations.shape[:-1], generator=generator)
    return value, locations, weights, torch.randn(2, queries, heads * channels, generator=generator)


def counts() -> tuple[int, int]:
    """Shuffles and 16-byte reductions since the last call."""
    numbers = (ctypes.c_uint64 * 2)()
    ops._loaded["cpu"][0].emu_counts(numbers)
    return numbers[0], numbers[1]


def test_this_is_the_emulated_library() -> None:
    assert ops.cpu_instructions() == "emulated"


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize(
    ("shapes", "starts"),
    [
        (SHAPES, [0, 99, 128]),  # overlaps
        (SHAPES, [0, 0, 129]),
        (SHAPES, [1, 99, 129]),
        (SHAPES, [99, 0, 129]),
        ([(9, 11), (5, 5), (1, 1)], [0, 99, 124]),  # less than value has
        ([(9, 11), (5, 6), (2, 1)], [0, 99, 129]),  # more
        ([(9, 11), (-5, -6), (1, 1)], [0, 99, 129]),
        ([(0, 11), (5, 6), (10, 10)], [0, 0, 30]),
    ],
)
def test_levels_that_are_not_the_value_s_stop_the_kernel(shapes, starts, backward: bool) -> None:
    value, locations, weights, grad = operands(queries=130)  # as many as tokens: tiled
    rest = (value, torch.tensor(shapes), torch.tensor(starts), locations, weights)
    with pytest.raises(RuntimeError, match="an emulated kernel trapped"):
        if backward:
            operators.ms_deform_attn_backward(grad, *rest)
        else:
            operators.ms_deform_attn_forward(*rest)


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("channels", [32, 5])
def test_a_gradient_that_is_not_finite_stays_where_it_is(bad: float, channels: int) -> None:
    value, locations, weights, grad = operands(channels=channels)
    grad[1, 3, 2 * channels + 1] = bad
    rest = (value, torch.tensor(SHAPES), torch.tensor(STARTS), locations, weights)
    exact, *_ = operators.ms_deform_attn_backward(grad, *rest, False)
    found, *_ = operators.ms_deform_attn_backward(grad, *rest, True)
    reached = ~exact.isfinite()
    assert 0 < reached.sum() <= 4 * 3 * 4  # the corners of one query's points, in one channel of one head
    assert torch.equal(~found.isfinite(), reached)
    torch.testing.assert_close(found[~reached], exact[~reached], rtol=1e-4, atol=1e-5)


def test_the_deterministic_sum_is_the_same_in_any_order() -> None:
    value, locations, weights, grad = operands(queries=130, heads=3)
    rest = (grad, value, torch.tensor(SHAPES), torch.tensor(STARTS), locations, weights)
    plain = [operators.ms_deform_attn_backward(*rest, False)[0] for _ in range(3)]
    fixed = [operators.ms_deform_attn_backward(*rest, True)[0] for _ in range(3)]
    assert not all(torch.equal(plain[0], other) for other in plain)  # threads do run in another order
    assert all(torch.equal(fixed[0], other) for other in fixed)


@pytest.mark.parametrize("fused", [False, True])
def test_more_points_than_fit_into_48_kib(fused: bool) -> None:
    value, locations, weights, grad = operands(queries=3, heads=1, points=800)
    anchors = torch.full((2, 3, 3, 2), 0.5)
    leaves = [value.requires_grad_(), locations.requires_grad_(), weights.requires_grad_()]
    if fused:
        output = module._fused(value, SHAPES, STARTS, anchors, locations, weights, False)
    else:
        output = ms_deform_attn(value, SHAPES, STARTS, locations, weights)
        expected = ms_deform_attn_torch(value, SHAPES, locations, weights)
        torch.testing.assert_close(output, expected, rtol=1e-3, atol=1e-3)
    assert all(item.isfinite().all() for item in torch.autograd.grad(output, leaves, grad))


def test_more_points_than_any_block_holds() -> None:
    value, locations, weights, _ = operands(queries=1, heads=1, points=5000)
    with pytest.raises(RuntimeError, match=r"3 levels of 5000 points need \d+ bytes of shared memory, this device has"):
        ms_deform_attn(value, SHAPES, STARTS, locations, weights)


def backward_of(variants: int, *operands: Tensor) -> tuple[tuple[Tensor, ...], int]:
    """The gradients of one call with those variants of kernels, and how many 16-byte reductions it took."""
    library = ops._loaded["cpu"][0]
    assert library.detr_family_cuda_variants(variants) == 0
    try:
        counts()
        return operators.ms_deform_attn_backward(*operands), counts()[1]
    finally:
        library.detr_family_cuda_variants(0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("near", [True, False])
def test_what_goes_to_one_token_leaves_a_block_once(near: bool, dtype: torch.dtype) -> None:
    """As many reductions as distinct tokens, and no more than without where a block's table has too few slots."""
    shapes, starts = [(48, 56)], [0]
    value, locations, weights, grad = operands(queries=48 * 56, heads=1, points=16, shapes=shapes)
    if near:  # around the queries' own pixels
        y, x = torch.meshgrid((torch.arange(48) + 0.5) / 48, (torch.arange(56) + 0.5) / 56, indexing="ij")
        centres = torch.stack((x, y), -1).view(1, -1, 1, 1, 1, 2)
        locations = centres + (locations - 0.5) * 0.1
    given = (grad.to(dtype), value.to(dtype), torch.tensor(shapes), torch.tensor(starts), locations, weights)
    expected, each = backward_of(0, *given)
    found, combined = backward_of(1, *given)
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)
    if each:  # of 16 bytes, which sm_80 has not
        assert combined <= (each / 4 if near else each)


def test_few_points_are_not_worked_through_as_sixteen() -> None:
    used = {}
    for points in (4, 16):
        value, locations, weights, grad = operands(points=points, shapes=[(9, 11)])
        counts()
        operators.ms_deform_attn_backward(grad, value, torch.tensor([(9, 11)]), torch.tensor([0]), locations, weights)
        used[points] = counts()[0]
    assert used[4] <= used[16] / 2


def test_a_driver_older_than_the_toolkit_is_seen() -> None:
    library = ops._loaded["cpu"][0]
    library.detr_family_cuda_problem.restype = ctypes.c_char_p
    problem = library.detr_family_cuda_problem
    assert problem(0) == b""
    assert b"does not start on this device: invalid device ordinal" in problem(7)
    try:
        for driver, text in ((12080, b"built by CUDA 13.0, the driver serves no later than 12.8"), (13010, b"")):
            library.emu_set_driver(driver)
            assert text in problem(0) and bool(text) == bool(problem(0))
    finally:
        library.emu_set_driver(13000)
