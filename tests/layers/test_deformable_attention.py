"""The operator's paths against one another and against float64; its packaging is in test_extension.py."""

import io
import math
import os
import subprocess
import sys
import warnings

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from detr_family.layers import MSDeformAttn, ms_deform_attn
from detr_family.layers import deformable_attention as module
from detr_family.layers import deformable_attention_ops as ops
from detr_family.layers.deformable_attention_torch import fused_inputs, ms_deform_attn_torch

SHAPES = [(9, 11), (5, 6), (1, 1)]  # L = 3, S = 130
STARTS = [0, 99, 129]
needs_native = pytest.mark.skipif(
    ops.library_file("cpu") is None, reason="the CPU library is not built (no C++ compiler when installing)"
)
needs_gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
    pytest.mark.skipif(ops.library_file("cuda") is None, reason="the CUDA library is not built"),
]
DEVICES = ["cpu", pytest.param("cuda", marks=needs_gpu)]
NATIVE_DEVICES = [pytest.param("cpu", marks=needs_native), DEVICES[1]]  # a GPU's tests ask for the CUDA library alone


def numbers(
    batch: int = 2,
    queries: int = 7,
    heads: int = 4,
    channels: int = 16,
    points: int = 5,
    shapes: list[tuple[int, int]] = SHAPES,
    dtype: torch.dtype = torch.float64,
    reach: float = 1.4,
) -> tuple[Tensor, Tensor, Tensor]:
    """Value, locations (some outside, none near where the derivative jumps) and weights."""
    generator = torch.Generator().manual_seed(batch + queries + channels + points)
    tokens = sum(height * width for height, width in shapes)
    value = torch.randn(batch, tokens, heads, channels, generator=generator, dtype=torch.float64)
    size = torch.tensor([(width, height) for height, width in shapes], dtype=torch.float64)[:, None]
    shape = (batch, queries, heads, len(shapes), points, 2)
    pixels = torch.rand(shape, generator=generator, dtype=torch.float64) * reach * size - 0.2 * size
    fraction = torch.rand(shape, generator=generator, dtype=torch.float64) * 0.8 + 0.1
    locations = (pixels.floor() + fraction + 0.5) / size
    weights = torch.randn(shape[:-1], generator=generator, dtype=torch.float64)
    return value.to(dtype), locations.to(dtype), weights.to(dtype)


def run(function, inputs, grad_output=None):
    """Output and gradients of `inputs`."""
    leaves = [item.detach().clone().requires_grad_() for item in inputs]
    output = function(*leaves)
    if grad_output is None:
        generator = torch.Generator().manual_seed(3)
        grad_output = torch.randn(output.shape, generator=generator, dtype=torch.float64)
    output.backward(grad_output.to(output))
    return [output.detach(), *(leaf.grad for leaf in leaves)]


def close(results, expected, tolerance):
    for name, result, reference in zip(("output", "value", "second", "third"), results, expected, strict=True):
        worst = (result.double().cpu() - reference).abs().max() / reference.abs().max()
        assert worst <= tolerance, f"{name}: {worst:.2e} > {tolerance}"


def native(value: Tensor, locations: Tensor, weights: Tensor) -> Tensor:
    return ms_deform_attn(value, SHAPES, STARTS, locations, weights)


def reference(value: Tensor, locations: Tensor, weights: Tensor) -> Tensor:
    return ms_deform_attn_torch(value, SHAPES, locations, weights)


def by_hand(value: Tensor, locations: Tensor, weights: Tensor) -> Tensor:
    """Equation 3 number by number."""
    batch, _, heads, channels = value.shape
    queries, points = locations.shape[1], locations.shape[4]
    output = torch.zeros(batch, queries, heads, channels, dtype=value.dtype)
    for b, q, m, level, p in torch.cartesian_prod(
        *(torch.arange(n) for n in (batch, queries, heads, len(SHAPES), points))
    ).tolist():
        height, width = SHAPES[level]
        x = float(locations[b, q, m, level, p, 0]) * width - 0.5
        y = float(locations[b, q, m, level, p, 1]) * height - 0.5
        for column in (math.floor(x), math.floor(x) + 1):
            for row in (math.floor(y), math.floor(y) + 1):
                if 0 <= column < width and 0 <= row < height:
                    weight = (1 - abs(x - column)) * (1 - abs(y - row)) * weights[b, q, m, level, p]
                    output[b, q, m] += weight * value[b, STARTS[level] + row * width + column, m]
    return output.flatten(2)


def test_pure_torch_is_equation_3():
    inputs = numbers(channels=3, heads=2, points=4)
    torch.testing.assert_close(reference(*inputs), by_hand(*inputs))


def test_exported_programs_run_where_no_library_was_built(monkeypatch: pytest.MonkeyPatch):
    """They hold the operators, whose schemas are there in any case; a device without kernels gets them in torch."""
    key = "XPU"  # of which this process has no other use
    monkeypatch.setattr(ops, "LIBRARIES", {key.lower(): ""})
    monkeypatch.setattr(ops, "_loaded", {key.lower(): (None, "not built")})
    ops.implement_missing(module._plain_forward, module._plain_fused_forward)
    monkeypatch.undo()
    for name in ("ms_deform_attn_forward", "ms_deform_attn_fused_forward"):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"detr_family::{name}", key)
    value, locations, weights = numbers(dtype=torch.float32)
    shapes, starts = torch.tensor(SHAPES), torch.tensor(STARTS)
    expected = reference(value, locations, weights)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.testing.assert_close(module._plain_forward(value, shapes, starts, locations, weights, False), expected)
        points = torch.full((2, 7, 3, 2), 0.4)
        fused = module._plain_fused_forward(value, shapes, starts, points, locations, weights, False)
    torch.testing.assert_close(fused, reference(value, *fused_inputs(shapes, points, locations, weights)))


@pytest.mark.parametrize("device", NATIVE_DEVICES)
@pytest.mark.parametrize("channels", [3, 16, 20, 32, 64])
@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 1e-2), (torch.float16, 1e-2)],
)
def test_equals_float64(device: str, channels: int, dtype: torch.dtype, tolerance: float):
    value, locations, weights = numbers(channels=channels)
    value = value.to(dtype)  # the 16-bit value itself is the input; coordinates stay wide
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    expected = run(reference, (value.double(), locations.to(wide).double(), weights.to(wide).double()))
    results = run(native, (value.to(device), locations.to(device, wide), weights.to(device, wide)))
    assert results[0].dtype == dtype and results[1].dtype == dtype and results[2].dtype == wide
    close(results, expected, tolerance)


@pytest.mark.parametrize("device", NATIVE_DEVICES)
@pytest.mark.parametrize("reference_dims", [2, 4])
@pytest.mark.parametrize(("points", "channels"), [(5, 16), (4, 32), (23, 8)])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_fused_equals_float64(device, reference_dims, points, channels, dtype, tolerance):
    value, locations, logits = numbers(points=points, channels=channels)
    generator = torch.Generator().manual_seed(5)
    anchors = torch.rand(2, 7, 3, reference_dims, generator=generator, dtype=torch.float64)
    # offsets that lead to those locations, which keep off the interpolation's knots
    size = torch.tensor([(width, height) for height, width in SHAPES], dtype=torch.float64)[:, None]
    away = locations - anchors[:, :, None, :, None, :2]
    if reference_dims == 2:
        offsets = away * size
    else:
        anchors[..., 2:] += 0.1
        offsets = away / (anchors[:, :, None, :, None, 2:] * 0.5 / points)

    def fused(value: Tensor, offsets: Tensor, logits: Tensor) -> Tensor:
        return module._fused(value, SHAPES, STARTS, anchors.to(value), offsets, logits, False)

    def unfused(value: Tensor, offsets: Tensor, logits: Tensor) -> Tensor:
        return reference(value, *fused_inputs(torch.tensor(SHAPES), anchors, offsets, logits))

    expected = run(unfused, (value, offsets, logits))
    close(run(fused, [item.to(device, dtype) for item in (value, offsets, logits)]), expected, tolerance)


@needs_native
@pytest.mark.parametrize("channels", [20, 32])
@pytest.mark.parametrize("points", [3, 4])
@pytest.mark.parametrize("queries", [1, 20, 60, 400])
def test_copies_of_no_levels_of_some_and_of_all(queries: int, points: int, channels: int):
    """On the CPU the number of points per token says of which levels a head makes a copy."""
    shapes, starts = [(20, 17), (9, 8), (4, 5), (1, 2)], [0, 340, 412, 432]
    inputs = numbers(queries=queries, points=points, channels=channels, shapes=shapes)
    expected = run(lambda value, *rest: ms_deform_attn_torch(value, shapes, *rest), inputs)
    before = torch.get_num_threads()
    try:
        for threads in (1, 20):  # a task is a head, or one of its levels
            torch.set_num_threads(threads)
            results = run(
                lambda value, *rest: ms_deform_attn(value, shapes, starts, *rest), [i.float() for i in inputs]
            )
            close(results, expected, 1e-5)
    finally:
        torch.set_num_threads(before)


@needs_native
def test_results_of_megabytes():
    """Huge pages are touched before anything is written: bit for bit the results of pieces smaller than a page."""
    shapes, starts = [(70, 64), (9, 8)], [0, 4480]
    value, *rest = numbers(batch=1, queries=9000, heads=8, channels=32, points=2, shapes=shapes)
    grad = torch.randn(1, 9000, 256, generator=torch.Generator().manual_seed(4), dtype=torch.float64)

    def of(queries: slice) -> list[Tensor]:
        inputs = (value, *(item[:, queries] for item in rest))
        return run(lambda v, *r: ms_deform_attn(v, shapes, starts, *r), inputs, grad[:, queries])

    whole = of(slice(None))
    assert all(result.nbytes >= 4 << 20 for result in whole[:3])  # a huge page is 2 MiB
    pieces = [of(slice(first, first + 500)) for first in range(0, 9000, 500)]
    for index in (0, 2, 3):  # output and the gradients of locations and weights
        assert torch.equal(whole[index], torch.cat([piece[index] for piece in pieces], 1))
    expected = run(lambda v, *r: ms_deform_attn_torch(v, shapes, *r), (value, *rest), grad)
    close(whole, expected, 1e-12)


@needs_native
@pytest.mark.parametrize("threads", [1, 3, 40])
def test_threads_change_nothing(threads: int):
    """One task per head, per level, and more threads than both."""
    inputs = numbers(queries=150, points=4, channels=32, dtype=torch.float32)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        expected = run(native, inputs)
        torch.set_num_threads(threads)
        for result, other in zip(run(native, inputs), expected, strict=True):
            torch.testing.assert_close(result, other, rtol=1e-6, atol=1e-5)
        anchors = torch.rand(2, 150, 3, 2)

        def fused(value: Tensor, offsets: Tensor, logits: Tensor) -> Tensor:
            return module._fused(value, SHAPES, STARTS, anchors, offsets, logits, False)

        offsets = torch.full_like(inputs[1], 1.3)
        results = run(fused, (inputs[0], offsets, inputs[2]))
        torch.set_num_threads(1)
        for result, other in zip(results, run(fused, (inputs[0], offsets, inputs[2])), strict=True):
            torch.testing.assert_close(result, other, rtol=1e-5, atol=1e-5)
    finally:
        torch.set_num_threads(before)


def check_16_bits(dtype: torch.dtype, channels: int, queries: int):
    """Values of 16 bits give, number for number, what the same in float32 give, rounded; so do their gradients."""
    value, locations, weights = (item.float() for item in numbers(queries=queries, channels=channels, points=4))
    magnitude = 10.0 ** torch.linspace(-9, 4, value.shape[1])[:, None, None]  # float16 has subnormal numbers below 6e-5
    value = (value * magnitude).to(dtype)
    value[0, ::11], value[0, 5], value[1, 9] = 0.0, torch.inf, torch.nan
    grad = torch.randn(2, queries, 4 * channels, generator=torch.Generator().manual_seed(5))
    grad = (grad * 10.0 ** torch.linspace(-9, 5, queries)[:, None]).clamp(-6e4, 6e4).to(dtype).double()
    found = run(native, (value, locations, weights), grad)
    assert found[0].dtype == found[1].dtype == dtype
    expected = run(native, (value.float(), locations, weights), grad)
    for result, other in zip(found, expected, strict=True):
        torch.testing.assert_close(result, other.to(result.dtype), rtol=0, atol=0, equal_nan=True)


@needs_native
@pytest.mark.parametrize("queries", [7, 70])
@pytest.mark.parametrize("channels", [3, 20, 32, 64])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bits_are_float32_rounded(dtype: torch.dtype, channels: int, queries: int):
    check_16_bits(dtype, channels, queries)


@needs_native
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_number_of_16_bits(dtype: torch.dtype):
    """One point in the middle of each token's pixel: what is read is what is written."""
    bits = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16)
    value = bits.view(dtype).view(1, 64 * 64, 1, 16)
    value = torch.where(value.isfinite(), value, torch.zeros_like(value))
    rows, columns = torch.meshgrid(torch.arange(64), torch.arange(64), indexing="ij")
    locations = ((torch.stack([columns, rows], -1) + 0.5) / 64).view(1, 4096, 1, 1, 1, 2)
    output = ms_deform_attn(value, [(64, 64)], [0], locations, torch.ones(1, 4096, 1, 1, 1))
    assert torch.equal(output.view(value.shape), value)


@needs_native
@pytest.mark.parametrize("instructions", ["generic", "avx2", "avx512"])
def test_every_set_of_instructions(instructions: str):
    """The choice is made once per process, so each runs in its own."""
    code = (
        "import sys, torch; sys.path.insert(0, sys.argv[1]); import test_deformable_attention as t\n"
        "for c, p, q in ((32, 4, 7), (20, 5, 7), (32, 4, 70)):\n"
        "    inputs = t.numbers(queries=q, channels=c, points=p)\n"
        "    t.close(t.run(t.native, [i.float() for i in inputs]), t.run(t.reference, inputs), 1e-5)\n"
        "for dtype in (torch.bfloat16, torch.float16):\n"
        "    for c in (20, 32):\n"
        "        t.check_16_bits(dtype, c, 70)\n"
        "print(t.ops.cpu_instructions())"
    )
    environment = {**os.environ, "DETR_FAMILY_CPU_INSTRUCTIONS": instructions}
    result = subprocess.run(
        [sys.executable, "-c", code, os.path.dirname(__file__)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    if result.stdout.split()[-1] != instructions:
        pytest.skip(f"this machine has no {instructions}")


@needs_native
@pytest.mark.parametrize("fused", [False, True])
def test_gradcheck(fused: bool):
    shapes, starts = [(2, 4), (3, 1), (1, 1)], [0, 8, 11]
    value, locations, weights = numbers(1, 3, 2, 5, points=2, shapes=shapes)
    anchors = torch.full((1, 3, 3, 2), 0.31, dtype=torch.float64)

    def function(value: Tensor, second: Tensor, third: Tensor) -> Tensor:
        if fused:
            return module._fused(value, shapes, starts, anchors, second, third, False)
        return ms_deform_attn(value, shapes, starts, second, third)

    second = torch.full_like(locations, 0.37) if fused else locations
    inputs = [item.requires_grad_() for item in (value, second, weights)]
    assert torch.autograd.gradcheck(function, inputs, eps=1e-6)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("pure", [False, True])
def test_points_outside_and_not_finite(device: str, pure: bool):
    """They sample nothing, get no gradient, and read nothing out of bounds."""
    value, locations, weights = numbers(channels=32)
    dtype = torch.float32
    wild = [math.nan, math.inf, -math.inf, 1e30, -1e30, 3e9, -5.0, 2.0**31, 1.0 + 1e-3, -1e-3]
    wild = torch.tensor(wild, dtype=torch.float64)
    far = locations.clone()
    far[0, :, :, :, 0, 0] = wild[torch.arange(7)][:, None, None]
    far[1, :, :, :, 1, 1] = wild[3 + torch.arange(7)][:, None, None]
    finite = far.nan_to_num(nan=-9.0).clamp(-9.0, 9.0)
    expected = run(reference, (value, finite, weights))
    inputs = [item.to(device, dtype) for item in (value, far, weights)]
    if pure:
        with module.pure_torch_path():
            results = run(native, inputs)
    else:
        results = run(native, inputs)
    assert all(result.isfinite().all() for result in results)
    close(results, expected, 1e-4)
    everywhere = torch.full_like(inputs[1], math.nan)
    assert (native(inputs[0], everywhere, inputs[2]) == 0).all()


@needs_native
def test_not_finite_values_stay_where_they_are():
    """A corner that lies outside is not read as zero times some pixel of the level."""
    value, locations, weights = numbers(channels=32, dtype=torch.float32)
    value[:, 0] = math.inf
    value[:, 99] = math.nan
    locations[:] = 0.97
    assert native(value, locations, weights).isfinite().all()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("batch", "queries"), [(0, 7), (2, 0)])
@pytest.mark.parametrize("pure", [False, True])
def test_empty(device: str, batch: int, queries: int, pure: bool):
    inputs = [item.float().to(device) for item in numbers(batch=batch, queries=queries)]
    if pure:
        with module.pure_torch_path():
            results = run(native, inputs)
    else:
        results = run(native, inputs)
    assert results[0].shape == (batch, queries, 64)
    for item, result in zip(inputs, results[1:], strict=True):
        assert result.shape == item.shape and (result == 0).all()


@pytest.mark.parametrize("device", DEVICES)
def test_not_contiguous(device: str):
    value, locations, weights = (item.float().to(device) for item in numbers(channels=32))
    expected = run(native, (value, locations, weights))
    value = value.permute(3, 2, 0, 1).contiguous().permute(2, 3, 1, 0)
    locations = torch.cat((locations, locations), -1)[..., :2]
    weights = weights.transpose(1, 4).contiguous().transpose(1, 4)
    grad = torch.randn(64, 2, 7, 2).permute(1, 2, 3, 0).flatten(2)
    assert not value.is_contiguous() and not locations.is_contiguous() and not weights.is_contiguous()
    results = run(native, (value, locations, weights), grad)
    for result, other in zip(results[:1], expected[:1], strict=True):
        torch.testing.assert_close(result, other)
    contiguous = [item.contiguous() for item in (value, locations, weights)]
    for result, other in zip(results, run(native, contiguous, grad), strict=True):
        torch.testing.assert_close(result, other)


@pytest.mark.parametrize("device", NATIVE_DEVICES)
@pytest.mark.parametrize("fused", [False, True])
def test_opcheck(device: str, fused: bool):
    value, locations, weights = numbers(channels=8, dtype=torch.float32)
    middle = [torch.rand(2, 7, 3, 4)] if fused else []
    shapes, starts = torch.tensor(SHAPES), torch.tensor(STARTS)
    arguments = [item.to(device) for item in (value, shapes, starts, *middle, locations, weights)]
    for index in (0, -2, -1):
        arguments[index] = arguments[index].requires_grad_()
    name = "ms_deform_attn_fused" if fused else "ms_deform_attn"
    forward = getattr(torch.ops.detr_family, f"{name}_forward").default
    backward = getattr(torch.ops.detr_family, f"{name}_backward").default
    torch.library.opcheck(forward, tuple(arguments), rtol=1e-4, atol=1e-5)
    grad = torch.randn(2, 7, 32, device=device)
    arguments = [item.detach() for item in arguments]
    torch.library.opcheck(backward, (grad, *arguments), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("device", NATIVE_DEVICES)
def test_autocast(device: str):
    value, locations, weights = (item.float().to(device) for item in numbers(channels=32))
    assert native(value, locations, weights).dtype == torch.float32
    with torch.autocast(device, dtype=torch.bfloat16):
        output = native(value, locations, weights)
        with module.pure_torch_path():
            pure = native(value, locations, weights)
    assert output.dtype == pure.dtype == torch.bfloat16
    # The value is rounded, the coordinates are not: at width 11 theirs would be off by several hundredths of
    # a pixel.
    exact = reference(value.bfloat16().double().cpu(), locations.double().cpu(), weights.double().cpu())
    assert (output.double().cpu() - exact).abs().max() < 2**-8 * exact.abs().max()


class Small(torch.nn.Module):
    """A module around the operator, for compile and export."""

    def __init__(self, shapes_as_list: bool) -> None:
        super().__init__()
        self.attention = MSDeformAttn(embed_dim=24, num_heads=3, num_levels=3, num_points=5)
        self.shapes_as_list = shapes_as_list

    def forward(self, query: Tensor, points: Tensor, tokens: Tensor, shapes: Tensor, starts: Tensor) -> Tensor:
        if self.shapes_as_list:
            return self.attention(query, points, tokens, SHAPES, STARTS)
        return self.attention(query, points, tokens, shapes, starts)


def small_arguments() -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(2, 7, 24, generator=generator)
    points = torch.rand(2, 7, 3, 2, generator=generator)
    tokens = torch.randn(2, 130, 24, generator=generator)
    return query, points, tokens, torch.tensor(SHAPES), torch.tensor(STARTS)


@pytest.mark.parametrize("shapes_as_list", [False, True])
def test_compile_fullgraph(shapes_as_list: bool):
    torch._dynamo.reset()
    model, arguments = Small(shapes_as_list), small_arguments()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    output = compiled(*arguments)
    torch.testing.assert_close(output, model(*arguments))
    output.sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize("shapes_as_list", [False, True])
def test_export(shapes_as_list: bool):
    model, arguments = Small(shapes_as_list).eval(), small_arguments()
    program = torch.export.export(model, arguments)
    torch.testing.assert_close(program.module()(*arguments), model(*arguments))
    targets = {str(node.target) for node in program.graph.nodes}
    if ops.library_file("cpu"):
        assert any("detr_family.ms_deform_attn" in target for target in targets)


def test_export_of_plain_operators():
    model, arguments = Small(True).eval(), small_arguments()
    with module.pure_torch_path():
        program = torch.export.export(model, arguments)
    targets = {str(node.target) for node in program.graph.nodes}
    assert not any("detr_family" in target for target in targets)
    assert any("grid_sampler" in target for target in targets)
    torch.testing.assert_close(program.module()(*arguments), model(*arguments))


def test_trace_takes_plain_operators():
    model, arguments = Small(True).eval(), small_arguments()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(model, arguments, check_trace=False)
    assert "detr_family::" not in str(traced.inlined_graph)
    torch.testing.assert_close(traced(*arguments), model(*arguments))


@pytest.mark.filterwarnings("ignore")  # the exporter warns of much that does not concern us
@pytest.mark.parametrize("dynamo", [False, True])
@pytest.mark.parametrize("reference_dims", [2, 4])
def test_onnx(reference_dims: int, dynamo: bool):
    onnx = pytest.importorskip("onnx")
    onnxruntime = pytest.importorskip("onnxruntime")
    if dynamo:
        pytest.importorskip("onnxscript")
    torch.manual_seed(0)
    model = Small(True).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    query, points, tokens, *_ = small_arguments()
    points = torch.cat((points, points.flip(0)), -1)[..., :reference_dims].contiguous()
    arguments = (query, points, tokens, torch.tensor(SHAPES), torch.tensor(STARTS))
    with module.pure_torch_path():
        if dynamo:
            graph = torch.onnx.export(model, arguments, dynamo=True, verbose=False).model_proto
        else:
            file = io.BytesIO()
            torch.onnx.export(model, arguments, file, dynamo=False, opset_version=16, input_names=list("qptsi"))
            graph = onnx.load_from_string(file.getvalue())
    onnx.checker.check_model(graph)
    assert {node.domain for node in graph.graph.node} == {""}  # no custom operators
    assert "GridSample" in {node.op_type for node in graph.graph.node}
    session = onnxruntime.InferenceSession(graph.SerializeToString(), providers=["CPUExecutionProvider"])
    # other inputs than those of the export, lest something be kept as a constant
    others = (query.flip(0) + 0.1, points.flip(1), tokens.flip(1))
    names = [item.name for item in session.get_inputs()]  # without dynamo, shapes and starts are constants
    feeds = {name: item.numpy() for name, item in zip(names, (*others, *arguments[3:]), strict=False)}
    output = torch.from_numpy(session.run(None, feeds)[0])
    with torch.no_grad():
        expected = model(*others, *arguments[3:])
    torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: {**a, "value": a["value"][0]}, r"value must be \(B, S, M, D\), not \(130, 4, 16\)"),
        (lambda a: {**a, "value": a["value"].long()}, "value must be float32.*int64"),
        (lambda a: {**a, "spatial_shapes": [(9, 11), (5, 6), (2, 1)]}, "131 tokens, but value has S = 130"),
        (lambda a: {**a, "spatial_shapes": torch.tensor([(9, 11), (5, 6), (2, 1)])}, "131 tokens"),
        (lambda a: {**a, "spatial_shapes": [(9, 11), (31, 1), (0, 1)]}, "level without pixels"),
        (lambda a: {**a, "spatial_shapes": torch.ones(3)}, r"spatial_shapes must be \(L, 2\) integers"),
        (lambda a: {**a, "level_start_index": [0, 99, 128]}, r"level_start_index is \[0, 99, 128\]"),
        (lambda a: {**a, "level_start_index": [0, 99]}, "2 entries for 3 levels"),
        (lambda a: {**a, "locations": a["locations"][..., 0]}, "sampling_locations must be"),
        (lambda a: {**a, "locations": a["locations"][:, :, :3]}, r"sampling_locations.*\(2, 7, 3, 3, 5, 2\)"),
        (lambda a: {**a, "weights": a["weights"][:, :6]}, r"attention_weights.*not \(2, 6, 4, 3, 5\)"),
        (lambda a: {**a, "weights": a["weights"].int()}, "attention_weights must be of a floating type"),
    ],
)
def test_bad_input(change, message: str):
    value, locations, weights = numbers(dtype=torch.float32)
    arguments = {
        "value": value,
        "spatial_shapes": SHAPES,
        "level_start_index": STARTS,
        "locations": locations,
        "weights": weights,
    }
    with pytest.raises(ValueError, match=message):
        ms_deform_attn(*change(arguments).values())


@needs_native
def test_bad_input_to_the_operator_itself():
    value, locations, weights = numbers(dtype=torch.float32)
    shapes = torch.tensor([(9, 11), (5, 6), (4, 1)])
    with pytest.raises(RuntimeError, match="133 tokens"):
        torch.ops.detr_family.ms_deform_attn_forward(value, shapes, torch.tensor([0, 99, 129]), locations, weights)


OPERANDS = ["ms_deform_attn_backward", "ms_deform_attn_fused_backward"]


def backward_operands(name: str) -> tuple[Tensor, ...]:
    """grad_output and the operands of a backward operator."""
    value, numbers_, weights = numbers(dtype=torch.float32, channels=32)
    middle = [torch.rand(2, 7, 3, 4)] if "fused" in name else []
    return torch.randn(2, 7, 128), value, torch.tensor(SHAPES), torch.tensor(STARTS), *middle, numbers_, weights


@needs_native
@pytest.mark.parametrize("name", OPERANDS)
@pytest.mark.parametrize("shape", [(2, 7, 64), (2, 6, 128), (1, 7, 128), (2, 896), (2, 7, 128, 1)])
def test_bad_gradient_to_the_operator_itself(name: str, shape: tuple[int, ...]):
    _, *rest = backward_operands(name)
    with pytest.raises(RuntimeError, match="the shape of grad_output does not fit"):
        getattr(torch.ops.detr_family, name)(torch.randn(shape), *rest)


@needs_native
@pytest.mark.parametrize("name", OPERANDS)
@pytest.mark.parametrize("index", [0, 2, -1])
def test_operands_elsewhere_are_not_read(name: str, index: int):
    """A gradient, sizes or weights without memory on the device; redispatch: the dispatcher would go with the other."""
    operands = list(backward_operands(name))
    operands[index] = operands[index].to("meta")
    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)
    with pytest.raises(RuntimeError, match="all tensors must be on the device of value"):
        getattr(torch.ops.detr_family, name).default.redispatch(keys, *operands)


@pytest.mark.parametrize("capturing", [False, True])
def test_sizes_reach_the_device_without_pageable_memory(capturing: bool, monkeypatch: pytest.MonkeyPatch):
    """What a graph captures is launches alone: a copy would read, at each replay, memory that is gone."""
    copies: list[str] = []
    pinned: list[bool] = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if any(name in str(function) for name in ("_to_copy", "copy_")) and args[0].device.type == "cpu":
                copies.append(str(function))
            return function(*args, **(kwargs or {}))

    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
    plain = torch.tensor

    def tensor(*args, pin_memory: bool = False, **kwargs):  # there is no pinned memory without a driver
        pinned.append(pin_memory)
        return plain(*args, **kwargs)

    monkeypatch.setattr(torch, "tensor", tensor)
    rows = plain(SHAPES)
    for given in (SHAPES, STARTS, rows):
        with FakeTensorMode(allow_non_fake_inputs=True), Watch():
            made = module._as_tensor(given, torch.device("cuda"))
        assert made.device.type == "cuda" and made.dtype == torch.int64
        assert tuple(made.shape) == ((3,) if given is STARTS else (3, 2))
    assert (copies == [] and pinned == []) if capturing else pinned == [True] * 3
    assert module._filled([list(pair) for pair in SHAPES], torch.device("cpu")).tolist() == [list(p) for p in SHAPES]
    assert module._filled(STARTS, torch.device("cpu")).tolist() == STARTS


# ------------------------------------------------------------------------------------------------ the module
def test_module_has_the_release_s_names_and_start():
    layer = MSDeformAttn(embed_dim=256, num_heads=8, num_levels=4, num_points=4)
    shapes = {name: tuple(item.shape) for name, item in layer.state_dict().items()}
    assert shapes == {
        "sampling_offsets.weight": (256, 256),
        "sampling_offsets.bias": (256,),
        "attention_weights.weight": (128, 256),
        "attention_weights.bias": (128,),
        "value_proj.weight": (256, 256),
        "value_proj.bias": (256,),
        "output_proj.weight": (256, 256),
        "output_proj.bias": (256,),
    }
    bias = layer.sampling_offsets.bias.view(8, 4, 4, 2)
    directions = [(1, 0), (1, 1), (0, 1), (-1, 1), (-1, 0), (-1, -1), (0, -1), (1, -1)]
    for point in range(4):
        expected = torch.tensor(directions, dtype=torch.float32) * (point + 1)
        for level in range(4):
            torch.testing.assert_close(bias[:, level, point], expected, atol=1e-5, rtol=0)
    assert not layer.sampling_offsets.weight.any() and not layer.attention_weights.weight.any()
    assert not layer.attention_weights.bias.any() and not layer.value_proj.bias.any()


@pytest.mark.parametrize("reference_dims", [2, 4])
@pytest.mark.parametrize("pure", [False, True])
def test_module_is_its_formula(reference_dims: int, pure: bool):
    layer = MSDeformAttn(embed_dim=24, num_heads=3, num_levels=3, num_points=5).double()
    generator = torch.Generator().manual_seed(1)
    for parameter in layer.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.3
    query, _, tokens, shapes, starts = (
        item.double() if item.is_floating_point() else item for item in small_arguments()
    )
    anchors = torch.rand(2, 7, 3, reference_dims, generator=generator, dtype=torch.float64)
    mask = torch.zeros(2, 130, dtype=torch.bool)
    mask[1, 40:70] = True
    value = layer.value_proj(tokens).masked_fill(mask[..., None], 0).view(2, 130, 3, 8)
    offsets = layer.sampling_offsets(query).view(2, 7, 3, 3, 5, 2)
    weights = layer.attention_weights(query).view(2, 7, 3, 15).softmax(-1).view(2, 7, 3, 3, 5)
    if reference_dims == 2:
        locations = anchors[:, :, None, :, None] + offsets / shapes.flip(-1)[:, None]
    else:
        box = anchors[:, :, None, :, None]
        locations = box[..., :2] + offsets / 5 * box[..., 2:] * 0.5
    expected = layer.output_proj(reference(value, locations, weights))
    anchors.requires_grad_(pure)
    if pure:
        with module.pure_torch_path():
            result = layer(query, anchors, tokens, shapes, starts, mask)
    else:
        result = layer(query, anchors, tokens, shapes, starts, mask)
    torch.testing.assert_close(result, expected)
    other = tokens.clone()
    other[1, 40:70] = math.pi
    torch.testing.assert_close(layer(query, anchors, other, shapes, starts, mask), expected)


@pytest.mark.parametrize("wants", [False, True])
def test_gradients_of_the_module(wants: bool):
    """Of every parameter; of the reference points, too, where they ask for one (as they do not in DINO)."""
    layer = MSDeformAttn(embed_dim=24, num_heads=3, num_levels=3, num_points=5).double()
    torch.nn.init.normal_(layer.attention_weights.weight, std=0.3)
    query, anchors, tokens, shapes, starts = (
        item.double() if item.is_floating_point() else item for item in small_arguments()
    )
    anchors = anchors.requires_grad_(wants)
    results = []
    for pure in (False, True):
        layer.zero_grad()
        anchors.grad = None
        if pure:
            with module.pure_torch_path():
                layer(query, anchors, tokens, shapes, starts).square().sum().backward()
        else:
            layer(query, anchors, tokens, shapes, starts).square().sum().backward()
        results.append([parameter.grad.clone() for parameter in layer.parameters()] + [anchors.grad])
    assert (results[0][-1] is not None) == wants
    for result, other in zip(*results, strict=True):
        if result is not None:
            torch.testing.assert_close(result, other)


def test_bad_input_to_the_module():
    with pytest.raises(ValueError, match="embed_dim must be a multiple of num_heads, not 25 of 3"):
        MSDeformAttn(embed_dim=25, num_heads=3, num_levels=3, num_points=5)
    with pytest.raises(ValueError, match="must be positive, not 0 and 5"):
        MSDeformAttn(embed_dim=24, num_heads=3, num_levels=0, num_points=5)
    layer = MSDeformAttn(embed_dim=24, num_heads=3, num_levels=3, num_points=5)
    query, anchors, tokens, shapes, starts = small_arguments()
    with pytest.raises(ValueError, match=r"query must be \(B, Q, C\) with C = 24"):
        layer(query[..., :23], anchors, tokens, shapes, starts)
    with pytest.raises(ValueError, match="reference_points must be"):
        layer(query, anchors[:, :, :2], tokens, shapes, starts)
    with pytest.raises(ValueError, match=r"padding_mask must be bool \(B, S\)"):
        layer(query, anchors, tokens, shapes, starts, torch.zeros(2, 130))


# ------------------------------------------------------------------------------------------------- the rest
def test_warns_once_with_the_reason(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(ops._loaded, "cpu", (None, "the cpu library was not built; with a C++ compiler ..."))
    ops._missing_reason.cache_clear()
    ops.warn_slow.cache_clear()
    inputs = numbers(dtype=torch.float32)
    try:
        with pytest.warns(RuntimeWarning, match="slow pure-torch path: the cpu library was not built"):
            native(*inputs)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            torch.testing.assert_close(native(*inputs), reference(*inputs))
    finally:
        ops._missing_reason.cache_clear()
        ops.warn_slow.cache_clear()


def test_arches():
    assert ops.arch_runs_on(["7.5", "8.0", "9.0+PTX"], (8, 6))
    assert ops.arch_runs_on(["7.5", "8.0", "9.0+PTX"], (12, 0))
    assert not ops.arch_runs_on(["7.5", "8.0", "9.0"], (12, 0))
    assert not ops.arch_runs_on(["9.0"], (8, 0))
    assert not ops.arch_runs_on(["9.0a"], (10, 0)) and ops.arch_runs_on(["9.0a"], (9, 0))
    assert not ops.arch_runs_on(["9.0a+PTX"], (10, 0))
    assert ops.arch_runs_on(["10.0f"], (10, 0)) and ops.arch_runs_on(["10.0f"], (10, 3))
    assert not ops.arch_runs_on(["10.3f"], (10, 0)) and not ops.arch_runs_on(["10.0f+PTX"], (12, 0))
    assert ops.arch_runs_on(["12.0"], (12, 1)) and not ops.arch_runs_on(["12.0"], (10, 0))


class Handle:
    """A loaded CUDA library that says of itself what a test wants it to."""

    def __init__(self, problem: str | None) -> None:
        def arches() -> bytes:
            return b"9.0"

        def ask(device: int) -> bytes:
            assert device == 3
            return (problem or "").encode()

        self.detr_family_cuda_arches = arches
        if problem is not None:
            self.detr_family_cuda_problem = ask


@pytest.mark.parametrize(
    ("problem", "reason"),
    [
        ("", ""),
        ("was built by CUDA 13.0, the driver ...", "the cuda library was built by CUDA 13.0, the driver ..."),
        (None, "the cuda library is older than this code; run pip install"),
    ],
)
def test_a_library_that_would_not_start_is_not_chosen(problem, reason, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(ops._loaded, "cuda", (Handle(problem), ""))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, 0))
    ops._missing_reason.cache_clear()
    try:
        assert ops.missing_reason("cuda", 3, torch.float32).startswith(reason)
        assert bool(ops.missing_reason("cuda", 3, torch.float32)) == bool(reason)
    finally:
        ops._missing_reason.cache_clear()


def test_tests_on_a_gpu_do_not_ask_for_the_cpu_s_library():
    """Where there is no C++ compiler but a CUDA library, they are to run."""
    found = 0
    for name, function in globals().items():
        marks = getattr(function, "pytestmark", [])
        devices = [mark for mark in marks if mark.name == "parametrize" and mark.args[0] == "device"]
        if not name.startswith("test_") or not devices:
            continue
        found += 1
        assert needs_native.mark not in marks, name
        on_gpu = next(item for item in devices[0].args[1] if not isinstance(item, str) and item.values == ("cuda",))
        assert needs_native not in on_gpu.marks, name  # a param keeps marks as they were given
    assert found >= 7


def test_alert(monkeypatch: pytest.MonkeyPatch):
    before = torch.are_deterministic_algorithms_enabled()
    try:
        torch.use_deterministic_algorithms(True)
        with pytest.raises(RuntimeError, match=r"not have a deterministic.*Pass deterministic=True"):
            ops.alert_nondeterministic(False, "cuda")
        ops.alert_nondeterministic(True, "cuda")
        ops.alert_nondeterministic(False, "cpu")
        torch.use_deterministic_algorithms(True, warn_only=True)
        with pytest.warns(UserWarning, match="deterministic"):
            ops.alert_nondeterministic(False, "cuda")
    finally:
        torch.use_deterministic_algorithms(before)


@needs_native
def test_backward_on_the_cpu_is_deterministic():
    inputs = numbers(queries=90, channels=32, dtype=torch.float32)
    torch.use_deterministic_algorithms(True)
    try:
        first, second = run(native, inputs), run(native, inputs)
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


@needs_native
def test_forward_keeps_its_inputs_only():
    inputs = [item.requires_grad_() for item in numbers(dtype=torch.float32)]
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda item: saved.append(item) or item, lambda item: item):
        native(*inputs)
    pointers = {item.data_ptr() for item in inputs}
    large = [item for item in saved if item.numel() > 2 * len(SHAPES)]
    assert len(large) == 3 and {item.data_ptr() for item in large} == pointers


@needs_native
@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads the process's peak as Linux gives it")
def test_peak_memory():
    """A forward + backward at the encoder's size stays below 110 MiB beyond its inputs (see docs)."""
    code = (
        "from detr_family.benchmarks.deformable_attention import peak_memory; "
        "print(peak_memory('encoder', 'detr_family', 1))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(result.stdout.split()[-1]) < 110 * 2**20


def test_grid_sample_convention():
    """Pixel centres at (i + 0.5) / size: a location there gives that pixel alone."""
    value = torch.arange(99.0).view(1, 99, 1, 1)
    location = torch.tensor([(4 + 0.5) / 11, (6 + 0.5) / 9]).view(1, 1, 1, 1, 1, 2)
    output = ms_deform_attn(value, [(9, 11)], [0], location, torch.ones(1, 1, 1, 1, 1))
    torch.testing.assert_close(output.flatten(), torch.tensor([6 * 11 + 4.0]))
    grid = (2 * location - 1).view(1, 1, 1, 2)
    sampled = F.grid_sample(value.view(1, 1, 9, 11), grid, align_corners=False)
    torch.testing.assert_close(sampled.flatten(), output.flatten())


# ----------------------------------------------------------------------------------------------------- CUDA
@pytest.mark.parametrize("device", [DEVICES[1]])
def test_a_graph_can_be_captured_with_sizes_as_lists(device: str):
    inputs = [item.float().to(device) for item in numbers(channels=32)]
    expected = native(*inputs)  # warms up
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = native(*inputs)
    torch.empty(1 << 20).fill_(-1.0)
    graph.replay()
    torch.testing.assert_close(output, expected)


@pytest.mark.parametrize("device", [DEVICES[1]])
def test_deterministic_variant_and_alert_on_cuda(device: str):
    value, locations, weights = (item.float().to(device) for item in numbers(queries=130, channels=32))

    def function(value: Tensor, locations: Tensor, weights: Tensor) -> Tensor:
        return ms_deform_attn(value, SHAPES, STARTS, locations, weights, deterministic=True)

    expected = run(reference, [item.double().cpu() for item in (value, locations, weights)])
    torch.use_deterministic_algorithms(True)
    try:
        first, second = (run(function, (value, locations, weights)) for _ in range(2))
        close(first, expected, 1e-5)
        assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))
        with pytest.raises(RuntimeError, match="deterministic"):
            run(native, (value, locations, weights))
    finally:
        torch.use_deterministic_algorithms(False)
