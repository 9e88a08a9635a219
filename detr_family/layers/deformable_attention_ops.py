"""torch.ops.detr_family: schemas, shape functions, derivatives and the libraries with the kernels.

    ms_deform_attn_forward(value, spatial_shapes, level_start_index, sampling_locations, attention_weights,
                           deterministic) -> output
    ms_deform_attn_backward(grad_output, ... the same ...) -> (grad_value, grad_locations, grad_weights)
    ms_deform_attn_fused_forward(value, spatial_shapes, level_start_index, reference_points, sampling_offsets,
                                 attention_logits, deterministic) -> output
    ms_deform_attn_fused_backward(grad_output, ... the same ...) -> (grad_value, grad_offsets, grad_logits)

The fused pair takes what the query's linear layers give, so that softmax and location arithmetic happen in
registers; it has no derivative with respect to the reference points. Shapes are those of `ms_deform_attn`
(deformable_attention.py). Every tensor of numbers may be float32, float16, bfloat16 or float64; whatever
they come in, coordinates, weights and sums are float32 (float64 where the value is), the output has value's
type and a gradient its input's. The forward keeps its inputs for the backward and nothing else.

The kernels live in two shared libraries (libraries.py). Either may be missing: `missing_reason` says why.
"""

import ctypes
import os
import platform
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor

from detr_family.layers import libraries
from detr_family.layers.libraries import REBUILD

LIBRARIES = {"cpu": "_ms_deform_attn_cpu", "cuda": "_ms_deform_attn_cuda"}
NATIVE_DTYPES = {
    "cpu": (torch.float32, torch.float64, torch.float16, torch.bfloat16),
    "cuda": (torch.float32, torch.float64, torch.float16, torch.bfloat16),
}

_INPUTS = "Tensor value, Tensor spatial_shapes, Tensor level_start_index, "
_PLAIN = _INPUTS + "Tensor sampling_locations, Tensor attention_weights, bool deterministic=False"
_FUSED = _INPUTS + "Tensor reference_points, Tensor sampling_offsets, Tensor attention_logits, bool deterministic=False"
_library = torch.library.Library("detr_family", "FRAGMENT")
for _name, _arguments in (("ms_deform_attn", _PLAIN), ("ms_deform_attn_fused", _FUSED)):
    _library.define(f"{_name}_forward({_arguments}) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))
    _library.define(
        f"{_name}_backward(Tensor grad_output, {_arguments}) -> (Tensor, Tensor, Tensor)",
        tags=(torch.Tag.pt2_compliant_tag,),
    )
_ops = torch.ops.detr_family


# ---------------------------------------------------------------------------------------------- libraries
_NEEDS = {"cpu": "a C++ compiler", "cuda": "the CUDA toolkit (nvcc)"}
_loaded = {kind: libraries.load(library, kind, _NEEDS[kind]) for kind, library in LIBRARIES.items()}


def library_file(kind: str) -> str | None:
    """Path of the loaded library, kind being "cpu" or "cuda"; None where there is none."""
    return libraries.file_of(_loaded[kind][0])


def _text(kind: str, symbol: str, *arguments: int) -> str:
    handle = _loaded[kind][0]
    if handle is None:
        return ""
    function = getattr(handle, symbol)
    function.restype = ctypes.c_char_p
    return str(function(*arguments).decode())


def cpu_instructions() -> str:
    """What the CPU kernels run with here: "avx512", "avx2" or "generic"; "" without the library."""
    return _text("cpu", "detr_family_cpu_instructions")


def cuda_arches() -> list[str]:
    """What the CUDA library was built for, as in TORCH_CUDA_ARCH_LIST: ["7.5", "9.0+PTX"]; [] without it."""
    return [arch for arch in _text("cuda", "detr_family_cuda_arches").split(";") if arch]


VARIANTS = {"combine": 1, "heads": 2}  # bits of detr_family_cuda_variants


def _choose_variants(names: list[str]) -> list[str]:
    """Takes these variants of the CUDA kernels and no others from now on; returns those taken before.

    Raises:
        ValueError: an unknown name, or a library that has none.
    """
    unknown = [name for name in names if name not in VARIANTS]
    if unknown:
        raise ValueError(f"DETR_FAMILY_CUDA_VARIANTS: no variant {unknown[0]!r}; there are {', '.join(VARIANTS)}")
    choose = getattr(_loaded["cuda"][0], "detr_family_cuda_variants", None)
    if choose is None:
        if names:
            raise ValueError(f"no variant {names[0]!r} without a cuda library of this version; run {REBUILD}")
        return []
    before = choose(sum(VARIANTS[name] for name in names))
    return [name for name, bit in VARIANTS.items() if before & bit]


@contextmanager
def cuda_variants(*names: str) -> Iterator[None]:
    """Inside, the CUDA kernels' variants of these names are taken where there are such, and no others.

    What they do: docs/deformable_attention.md. Those of DETR_FAMILY_CUDA_VARIANTS are taken from the start. They are
    the process's, not the thread's: of several threads that choose, the last one is heard.
    """
    before = _choose_variants(list(names))
    try:
        yield
    finally:
        _choose_variants(before)


if os.environ.get("DETR_FAMILY_CUDA_VARIANTS"):
    _choose_variants(os.environ["DETR_FAMILY_CUDA_VARIANTS"].split())


def cuda_problem(device_index: int) -> str:
    """Why the CUDA library's kernels would not start on a device (a driver older than its CUDA, say); "" if they do."""
    try:
        problem = _text("cuda", "detr_family_cuda_problem", device_index)
    except AttributeError:
        return f"the cuda library is older than this code; run {REBUILD}"
    return f"the cuda library {problem}" if problem else ""


def arch_runs_on(arches: list[str], capability: tuple[int, int]) -> bool:
    """Whether code built for `arches` runs on a device: same major and no newer minor, or PTX no newer.

    9.0a runs on 9.0 only, 10.0f on its family (the same major) only, their PTX likewise.
    """
    for arch in arches:
        number = arch.removesuffix("+PTX")
        major, minor = (int(part) for part in number.rstrip("af").split("."))
        if number.endswith("a"):
            runs = (major, minor) == capability
        else:
            runs = major == capability[0] and minor <= capability[1]
            runs = runs or (arch.endswith("+PTX") and not number.endswith("f") and (major, minor) <= capability)
        if runs:
            return True
    return False


@torch.compiler.assume_constant_result  # torch.compile asks once, and does not look inside
def missing_reason(device_type: str, device_index: int | None, dtype: torch.dtype) -> str:
    """Why such values take the pure-torch path, in one line; "" where a kernel serves them."""
    return _missing_reason(device_type, device_index, dtype)


@cache
def _missing_reason(device_type: str, device_index: int | None, dtype: torch.dtype) -> str:
    if device_type not in LIBRARIES:
        return f"there is no kernel for devices of type {device_type!r}"
    if _loaded[device_type][0] is None:
        return _loaded[device_type][1]
    if dtype not in NATIVE_DTYPES[device_type]:
        return f"there is no {device_type} kernel for {dtype}"
    if device_type == "cuda":
        capability = torch.cuda.get_device_capability(device_index)
        if not arch_runs_on(cuda_arches(), capability):
            wanted = "{}.{}".format(*capability)
            return (
                f"the cuda library holds code for {', '.join(cuda_arches())}, the device is {wanted}; "
                f"run TORCH_CUDA_ARCH_LIST={wanted} {REBUILD}"
            )
        return cuda_problem(torch.cuda.current_device() if device_index is None else device_index)
    return ""


@cache  # one warning, once
def warn_slow(reason: str) -> None:
    """Says, the first time only, that deformable attention is on its slow path and why."""
    warnings.warn(f"ms_deform_attn runs on its slow pure-torch path: {reason}", RuntimeWarning, stacklevel=4)


def describe() -> dict[str, str]:
    """What `python -m detr_family.collect_env` prints about the operator."""
    cpu = cpu_instructions()
    arches = ", ".join(cuda_arches())
    return {
        "ms_deform_attn on CPU": (
            f"native, {cpu} of {platform.machine()}" if cpu else f"pure torch: {_loaded['cpu'][1]}"
        ),
        "ms_deform_attn on CUDA": (f"native, built for {arches}" if arches else f"pure torch: {_loaded['cuda'][1]}"),
    }


def implement_missing(forward: Callable[..., Tensor], fused_forward: Callable[..., Tensor]) -> None:
    """Forwards in plain torch for devices without a library: exported programs call the operators themselves."""
    for kind in LIBRARIES:
        if _loaded[kind][0] is None:
            _library.impl("ms_deform_attn_forward", forward, kind.upper())
            _library.impl("ms_deform_attn_fused_forward", fused_forward, kind.upper())


# ------------------------------------------------------------------------------------- shapes, without data
def _fake_forward(value: Tensor, shapes: Tensor, starts: Tensor, first: Tensor, *rest: Any) -> Tensor:
    return value.new_empty(value.shape[0], first.shape[1], value.shape[2] * value.shape[3])


def _fake_backward(grad_output: Tensor, value: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    first, second = [item for item in rest if isinstance(item, Tensor)][-2:]
    return value.new_empty(value.shape), first.new_empty(first.shape), second.new_empty(second.shape)


for _name in ("ms_deform_attn", "ms_deform_attn_fused"):
    torch.library.register_fake(f"detr_family::{_name}_forward", _fake_forward, lib=_library)
    torch.library.register_fake(f"detr_family::{_name}_backward", _fake_backward, lib=_library)


# --------------------------------------------------------------------------------------------- derivatives
def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.deterministic = inputs
    ctx.save_for_backward(*tensors)


def alert_nondeterministic(deterministic: bool, device_type: str) -> None:
    """Raises (or warns, as asked) under torch.use_deterministic_algorithms when the sums' order is open.

    On CUDA grad_value is summed by atomic additions of floats, whose order differs from run to run. The
    variant of `deterministic=True` sums integers; on the CPU the order is fixed anyway.
    """
    if deterministic or device_type != "cuda" or not torch.are_deterministic_algorithms_enabled():
        return
    message = (
        "ms_deform_attn_backward on CUDA does not have a deterministic implementation with "
        "deterministic=False, but you set 'torch.use_deterministic_algorithms(True)'. "
        "Pass deterministic=True to ms_deform_attn or MSDeformAttn."
    )
    if not torch.is_deterministic_algorithms_warn_only_enabled():
        raise RuntimeError(message)
    warnings.warn(message, UserWarning, stacklevel=2)


def _backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
    alert_nondeterministic(ctx.deterministic, grad_output.device.type)
    value, shapes, starts, *rest = ctx.saved_tensors
    backward = _ops.ms_deform_attn_backward if len(rest) == 2 else _ops.ms_deform_attn_fused_backward
    grad_value, first, second = backward(grad_output, value, shapes, starts, *rest, ctx.deterministic)
    reference = (None,) * (len(rest) - 2)
    return grad_value, None, None, *reference, first, second, None


for _name in ("ms_deform_attn", "ms_deform_attn_fused"):
    torch.library.register_autograd(
        f"detr_family::{_name}_forward", _backward, setup_context=_setup_context, lib=_library
    )


# ------------------------------------------------------------------------------------------------ autocast
def _register_autocast(name: str, device_type: str, key: str) -> None:
    """Autocast's rule: the value goes to the 16-bit type, coordinates and weights stay as they are.

    The kernels compute with both in float32 whatever they come in.
    """
    operator = getattr(_ops, name)
    keys = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))

    def cast(value: Tensor, *rest: Any) -> Tensor:
        if value.dtype != torch.float64:
            value = value.to(torch.get_autocast_dtype(device_type))
        with torch._C._ExcludeDispatchKeyGuard(keys):
            return operator(value, *rest)

    _library.impl(name, cast, key)


for _name in ("ms_deform_attn_forward", "ms_deform_attn_fused_forward"):
    _register_autocast(_name, "cpu", "AutocastCPU")
    _register_autocast(_name, "cuda", "AutocastCUDA")
