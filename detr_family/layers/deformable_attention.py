"""Multi-scale deformable attention (Deformable DETR, arXiv 2010.04159, section 4.1), function and module.

Instead of comparing a query with every token, each head of a query samples P points on each of L feature
levels, at places that the query itself predicts relative to a reference point, and sums them with weights it
also predicts:

    MSDeformAttn(z, p, {x^l}) = sum_m W_m [ sum_l sum_k A_mlqk * W'_m x^l(phi_l(p) + dp_mlqk) ]   (equation 3)

Three paths give the same numbers: native CPU, CUDA (both in csrc/) and plain torch
(deformable_attention_torch.py), which runs everywhere and exports. The first two exist where their libraries
were built; where a slower path is taken, one warning names the reason.

Letters: B batch, S tokens of all levels, Q queries, M heads, D channels of one head, L levels, P points.
"""

import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from detr_family.layers import deformable_attention_ops as ops
from detr_family.layers.deformable_attention_torch import Shapes, fused_inputs, ms_deform_attn_torch
from detr_family.layers.shapes import int_tensor

__all__ = ["MSDeformAttn", "ms_deform_attn", "pure_torch_path"]

# value, spatial_shapes (L, 2), level_start_index (L,), sampling_locations, attention_weights -> (B, Q, M*D)
StandIn = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]

_force_torch = os.environ.get("DETR_FAMILY_MS_DEFORM_ATTN", "") == "torch"
_stand_in: StandIn | None = None


@contextmanager
def pure_torch_path(stand_in: StandIn | None = None) -> Iterator[None]:
    """Takes the pure-torch path inside: to export a graph without custom operators, or to compare.

    An ONNX export and torch.jit.trace take it by themselves, and the environment variable
    DETR_FAMILY_MS_DEFORM_ATTN=torch takes it from the start.

    Args:
        stand_in: is called in place of the sampling and summing, as for an operator that only the exported graph has.
    """
    global _force_torch, _stand_in
    before = _force_torch, _stand_in
    _force_torch, _stand_in = True, stand_in
    try:
        yield
    finally:
        _force_torch, _stand_in = before


def _use_torch(value: Tensor) -> bool:
    """Whether `value` takes the pure-torch path; warns, once, if that is for want of a kernel."""
    if _force_torch or torch.jit.is_tracing() or torch.onnx.is_in_onnx_export():
        return True
    dtype = value.dtype
    reason = ops.missing_reason(value.device.type, value.device.index, dtype)
    if reason and not torch.compiler.is_compiling():
        ops.warn_slow(reason)
    return bool(reason)


def _check(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(f"ms_deform_attn: {message}")


def _check_levels(spatial_shapes: Any, level_start_index: Any, tokens: int) -> None:
    """Compares the levels' sizes with the number of tokens, wherever that needs no copy from a device."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return
    shapes = _on_host(spatial_shapes)
    if shapes is None:
        return
    _check(
        all(height >= 1 and width >= 1 for height, width in shapes),
        f"spatial_shapes has a level without pixels: {shapes}",
    )
    sizes = [height * width for height, width in shapes]
    _check(
        sum(sizes) == tokens,
        f"spatial_shapes {shapes} are {sum(sizes)} tokens, but value has S = {tokens}",
    )
    starts = _on_host(level_start_index)
    expected = [sum(sizes[:index]) for index in range(len(sizes))]
    _check(
        starts is None or starts == expected,
        f"level_start_index is {starts}, but spatial_shapes {shapes} start at {expected}",
    )


def _on_host(numbers: Any) -> Any:
    """Numbers as nested lists, None where reading them would wait for a device (or there is no data)."""
    if isinstance(numbers, Tensor):
        plain = type(numbers) is Tensor and numbers.device.type == "cpu"
        return numbers.tolist() if plain else None
    items = [list(item) if isinstance(item, Sequence) else item for item in numbers]
    flat = [part for item in items for part in (item if isinstance(item, list) else [item])]
    return items if all(type(part) is int for part in flat) else None


def _as_tensor(numbers: Any, device: torch.device) -> Tensor:
    """(L, 2) or (L,) int64 on `device`.

    A graph that is captured would copy again from host memory that is long gone by then: there the numbers travel
    in the launches of fills. Otherwise pinned memory, so that the host need not wait.
    """
    on_host = not isinstance(numbers, Tensor) or numbers.device.type == "cpu"
    if device.type == "cuda" and on_host and not torch.compiler.is_compiling():
        rows = _rows(numbers.tolist() if isinstance(numbers, Tensor) else numbers)
        if torch.cuda.is_current_stream_capturing():
            return _filled(rows, device)
        return torch.tensor(rows, dtype=torch.int64, pin_memory=True).to(device, non_blocking=True)
    if not isinstance(numbers, Tensor):
        return int_tensor(numbers, device)
    return numbers.to(device=device, dtype=torch.int64, non_blocking=True)


def _rows(numbers: Any) -> list[Any]:
    return [list(item) if isinstance(item, Sequence) else item for item in numbers]


def _filled(rows: list[Any], device: torch.device) -> Tensor:
    """The rows as a tensor that no copy from the host makes."""
    flat = [number for row in rows for number in (row if isinstance(row, list) else [row])]
    made = torch.stack([torch.full((), number, dtype=torch.int64, device=device) for number in flat])
    return made.view(len(rows), -1) if isinstance(rows[0], list) else made


def _as_shapes(spatial_shapes: Any) -> Shapes:
    """L pairs of ints; of a tensor on a device this waits for the device."""
    pairs = spatial_shapes.tolist() if isinstance(spatial_shapes, Tensor) else spatial_shapes
    return [(height, width) for height, width in pairs]


def _level_count(spatial_shapes: Any) -> int:
    if isinstance(spatial_shapes, Tensor):
        integers = not spatial_shapes.is_floating_point()
        _check(
            integers and spatial_shapes.dim() == 2 and spatial_shapes.shape[1] == 2,
            f"spatial_shapes must be (L, 2) integers, (height, width) of each level, not "
            f"{tuple(spatial_shapes.shape)} {spatial_shapes.dtype}",
        )
    return len(spatial_shapes)


def _check_value(value: Tensor, spatial_shapes: Any, level_start_index: Any) -> int:
    """Checks what both entries share and returns L."""
    _check(value.dim() == 4, f"value must be (B, S, M, D), not {tuple(value.shape)}")
    _check(
        value.is_floating_point() and value.element_size() >= 2,
        f"value must be float32, float64, float16 or bfloat16, not {value.dtype}",
    )
    levels = _level_count(spatial_shapes)
    _check(
        len(level_start_index) == levels,
        f"level_start_index has {len(level_start_index)} entries for {levels} levels",
    )
    _check_levels(spatial_shapes, level_start_index, value.shape[1])
    return levels


def _check_operand(name: str, tensor: Tensor, shape: tuple[int, ...], letters: str, value: Tensor) -> None:
    _check(
        tensor.dim() == len(shape) and tuple(tensor.shape) == shape,
        f"{name} must be ({letters}) = {shape}, not {tuple(tensor.shape)}",
    )
    _check(tensor.is_floating_point(), f"{name} must be of a floating type, not {tensor.dtype}")
    _check(
        tensor.device == value.device,
        f"{name} is on {tensor.device}, value on {value.device}",
    )


def ms_deform_attn(
    value: Tensor,
    spatial_shapes: Tensor | Shapes,
    level_start_index: Tensor | Sequence[int],
    sampling_locations: Tensor,
    attention_weights: Tensor,
    *,
    deterministic: bool = False,
) -> Tensor:
    """The sum in equation 3: each head's values, sampled bilinearly, times its attention weights.

        output[b, q, m] = sum_l sum_p attention_weights[b, q, m, l, p] * value_l[b, m](sampling_locations[b,
        q, m, l, p])

    A location is (x, y) in units of the level: 0 and 1 are its outer edges, so pixel i's centre lies at
    (i + 0.5) / size (align_corners=False); outside, the value is zero. A point with a NaN coordinate counts
    as outside. Coordinates, weights and sums are float32 also for 16-bit values (float64 for float64), and
    autocast leaves coordinates alone.

    Args:
        value: (B, S, M, D), the levels one after another, each row by row; float32, float16, bfloat16,
            float64.
        spatial_shapes: (L, 2), (height, width) of each level in tokens: integer tensor or a list of pairs. A
            list, or a tensor on the CPU, is checked; one on the GPU is not (that would wait for the GPU),
            and a level that does not fit in S stops the kernel.
        level_start_index: (L,), the token at which each level starts: the running sum of height * width.
        sampling_locations: (B, Q, M, L, P, 2).
        attention_weights: (B, Q, M, L, P); need not sum to one.
        deterministic: on CUDA, sum grad_value in an order-free way (slower). Otherwise its last bits differ
            between runs, and torch.use_deterministic_algorithms(True) raises. The CPU is deterministic
            anyway.

    Returns:
        (B, Q, M*D) in the type of `value`.

    Raises:
        ValueError: where a shape, type or device does not fit, naming the argument and its value.
    """
    levels = _check_value(value, spatial_shapes, level_start_index)
    _check(
        sampling_locations.dim() == 6,
        f"sampling_locations must be (B, Q, M, L, P, 2), not {tuple(sampling_locations.shape)}",
    )
    batch, _, heads, _ = value.shape
    queries, points = sampling_locations.shape[1], sampling_locations.shape[4]
    shape = (batch, queries, heads, levels, points)
    _check_operand("sampling_locations", sampling_locations, (*shape, 2), "B, Q, M, L, P, 2", value)
    _check_operand("attention_weights", attention_weights, shape, "B, Q, M, L, P", value)
    if _stand_in is not None:
        shapes, starts = (_as_tensor(x, value.device) for x in (spatial_shapes, level_start_index))
        return _stand_in(value, shapes, starts, sampling_locations, attention_weights)
    if _use_torch(value):
        if torch.is_autocast_enabled(value.device.type) and value.dtype != torch.float64:
            value = value.to(torch.get_autocast_dtype(value.device.type))
        return ms_deform_attn_torch(value, _as_shapes(spatial_shapes), sampling_locations, attention_weights)
    return torch.ops.detr_family.ms_deform_attn_forward(
        value,
        _as_tensor(spatial_shapes, value.device),
        _as_tensor(level_start_index, value.device),
        sampling_locations,
        attention_weights,
        deterministic,
    )


def _fused(
    value: Tensor,
    spatial_shapes: Tensor | Shapes,
    level_start_index: Tensor | Sequence[int],
    reference_points: Tensor,
    sampling_offsets: Tensor,
    attention_logits: Tensor,
    deterministic: bool,
) -> Tensor:
    """ms_deform_attn with softmax and location arithmetic in the kernel where that can be (see
    fused_inputs)."""
    differentiable = torch.is_grad_enabled() and reference_points.requires_grad
    if differentiable or _use_torch(value):
        shapes = _as_tensor(spatial_shapes, value.device)
        locations, weights = fused_inputs(shapes, reference_points, sampling_offsets, attention_logits)
        return ms_deform_attn(value, spatial_shapes, level_start_index, locations, weights, deterministic=deterministic)
    levels = _check_value(value, spatial_shapes, level_start_index)
    batch, queries = reference_points.shape[:2]
    shape = (batch, queries, value.shape[2], levels, sampling_offsets.shape[4])
    _check_operand("sampling_offsets", sampling_offsets, (*shape, 2), "B, Q, M, L, P, 2", value)
    _check_operand("attention_logits", attention_logits, shape, "B, Q, M, L, P", value)
    return torch.ops.detr_family.ms_deform_attn_fused_forward(
        value,
        _as_tensor(spatial_shapes, value.device),
        _as_tensor(level_start_index, value.device),
        reference_points,
        sampling_offsets,
        attention_logits,
        deterministic,
    )


def _plain_forward(
    value: Tensor, shapes: Tensor, starts: Tensor, locations: Tensor, weights: Tensor, deterministic: bool = False
) -> Tensor:
    """The operator of a program that was exported with it, where it is not built."""
    ops.warn_slow(ops.missing_reason(value.device.type, value.device.index, value.dtype))
    return ms_deform_attn_torch(value, _as_shapes(shapes), locations, weights)


def _plain_fused_forward(
    value: Tensor,
    shapes: Tensor,
    starts: Tensor,
    reference_points: Tensor,
    sampling_offsets: Tensor,
    attention_logits: Tensor,
    deterministic: bool = False,
) -> Tensor:
    """The same of the fused operator."""
    locations, weights = fused_inputs(shapes, reference_points, sampling_offsets, attention_logits)
    return _plain_forward(value, shapes, starts, locations, weights)


ops.implement_missing(_plain_forward, _plain_fused_forward)


class MSDeformAttn(nn.Module):
    """Multi-scale deformable attention with its four linear layers (arXiv 2010.04159, section 4.1 and
    appendix A.2).

    Parameters are named as in the paper's release: sampling_offsets, attention_weights, value_proj,
    output_proj. At the start a query attends evenly to points on rays around its reference point: one
    direction per head, the p-th point p pixels out along the square ring (weights of both query layers zero,
    the offsets in the bias).
    """

    def __init__(
        self, *, embed_dim: int, num_heads: int, num_levels: int, num_points: int, deterministic: bool = False
    ) -> None:
        super().__init__()
        if embed_dim < 1 or num_heads < 1 or embed_dim % num_heads:
            raise ValueError(f"MSDeformAttn: embed_dim must be a multiple of num_heads, not {embed_dim} of {num_heads}")
        if num_levels < 1 or num_points < 1:
            raise ValueError(
                f"MSDeformAttn: num_levels and num_points must be positive, not {num_levels} and {num_points}"
            )
        self.embed_dim = embed_dim
        self.num_heads = num_heads
        self.num_levels = num_levels
        self.num_points = num_points
        self.deterministic = deterministic
        samples = num_heads * num_levels * num_points
        self.sampling_offsets = nn.Linear(embed_dim, samples * 2)
        self.attention_weights = nn.Linear(embed_dim, samples)
        self.value_proj = nn.Linear(embed_dim, embed_dim)
        self.output_proj = nn.Linear(embed_dim, embed_dim)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Sets the starting values that the class describes."""
        angle = torch.arange(self.num_heads, dtype=torch.float32) * (2.0 * math.pi / self.num_heads)
        direction = torch.stack((angle.cos(), angle.sin()), -1)
        direction = direction / direction.abs().amax(-1, keepdim=True)  # M x 2, on the square of half width 1
        radius = torch.arange(1, self.num_points + 1, dtype=torch.float32)
        ring = direction[:, None, None] * radius[:, None]  # M x 1 x P x 2
        with torch.no_grad():
            self.sampling_offsets.bias.copy_(ring.expand(-1, self.num_levels, -1, -1).flatten())
        nn.init.zeros_(self.sampling_offsets.weight)
        nn.init.zeros_(self.attention_weights.weight)
        nn.init.zeros_(self.attention_weights.bias)
        for layer in (self.value_proj, self.output_proj):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)

    def extra_repr(self) -> str:
        """The sizes that the linear layers' own lines do not tell."""
        return f"num_heads={self.num_heads}, num_levels={self.num_levels}, num_points={self.num_points}"

    def forward(
        self,
        query: Tensor,
        reference_points: Tensor,
        tokens: Tensor,
        spatial_shapes: Tensor | Shapes,
        level_start_index: Tensor | Sequence[int],
        padding_mask: Tensor | None = None,
    ) -> Tensor:
        """Attends from each query to the tokens around its reference point.

        Args:
            query: (B, Q, C), the position encoding added.
            reference_points: (B, Q, L, 2) as (x, y), or (B, Q, L, 4) as (x, y, w, h), in [0, 1] of each
                level as it lies in `tokens`, padding included. Of points the offsets are in pixels of the
                level, of boxes in halves of the box divided by P. Where it asks for a gradient, the unfused
                operator runs.
            tokens: (B, S, C), the levels one after another.
            spatial_shapes: (L, 2), (height, width) of each level.
            level_start_index: (L,).
            padding_mask: (B, S), True = padding: such a token's value is zero.

        Returns:
            (B, Q, C).

        Raises:
            ValueError: where a shape or type does not fit.
        """
        for name, tensor in (("query", query), ("tokens", tokens)):
            if tensor.dim() != 3 or tensor.shape[-1] != self.embed_dim:
                raise ValueError(
                    f"MSDeformAttn: {name} must be (B, {'Q' if name == 'query' else 'S'}, C) with "
                    f"C = {self.embed_dim}, not {tuple(tensor.shape)}"
                )
        batch, queries, _ = query.shape
        levels, points = self.num_levels, self.num_points
        if (
            reference_points.dim() != 4
            or tuple(reference_points.shape[:3]) != (batch, queries, levels)
            or reference_points.shape[3] not in (2, 4)
        ):
            raise ValueError(
                f"MSDeformAttn: reference_points must be (B, Q, L, 2 or 4) = ({batch}, {queries}, {levels}, "
                f"2 or 4), not {tuple(reference_points.shape)}"
            )
        value = self.value_proj(tokens)  # B x S x C
        if padding_mask is not None:
            if padding_mask.dtype != torch.bool or padding_mask.shape != tokens.shape[:2]:
                raise ValueError(
                    f"MSDeformAttn: padding_mask must be bool (B, S) = {tuple(tokens.shape[:2])}, "
                    f"True = padding, not {padding_mask.dtype} {tuple(padding_mask.shape)}"
                )
            value = value.masked_fill(padding_mask[..., None], 0.0)
        value = value.unflatten(-1, (self.num_heads, -1))  # B x S x M x D
        offsets = self.sampling_offsets(query).view(batch, queries, self.num_heads, levels, points, 2)
        logits = self.attention_weights(query).view(batch, queries, self.num_heads, levels, points)
        output = _fused(value, spatial_shapes, level_start_index, reference_points, offsets, logits, self.deterministic)
        return self.output_proj(output)  # B x Q x C
