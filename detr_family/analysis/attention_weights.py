"""What attention layers look at, recomputed from their inputs while somebody looks.

The detectors never ask for attention weights, so that the fast kernels apply. `watch` puts hooks on the attention
layers of a model which note what they are called with; from that the weights follow by the definition of the layer:
softmax(q k^T / sqrt(d)) of each head (DETR, appendix A.1), or sampling points and their weights (Deformable DETR,
equation 3). Outside of the context there are no hooks. That the weights are the layer's is testable: `output` computes
what the layer returns from them.

Letters: B images, M heads, Q queries, S keys, D channels, L levels, P points.
"""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from detr_family.layers.attention import ProjectedAttention
from detr_family.layers.deformable_attention import MSDeformAttn
from detr_family.layers.deformable_attention_torch import fused_inputs, ms_deform_attn_torch

ENCODER = r"encoder\.layers\.\d+\.self_attn$"
CROSS = r"decoder\.layers\.\d+\.(cross_attn|multihead_attn)$"


def _heads(x: Tensor, num_heads: int) -> Tensor:
    """(B, S, D) -> (B, M, S, D / M)."""
    return x.unflatten(-1, (num_heads, -1)).transpose(1, 2)


@dataclass
class DenseCall:
    """One call of an attention layer that compares every query with every key.

    Attributes:
        name: the layer's name in the model.
        query: (B, M, Q, E / M) projected queries.
        key: (B, M, S, E / M) projected keys.
        value: (B, M, S, D / M) projected values.
        mask: added to the logits, broadcastable to (B, M, Q, S), -inf = not seen; None where all is seen.
        out_proj: the layer's last projection.
    """

    name: str
    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None
    out_proj: nn.Module

    @torch.no_grad()
    def weights(self) -> Tensor:
        """(B, M, Q, S) attention weights; each query's sum to one."""
        return self._softmax(self.query, self.key)

    @torch.no_grad()
    def positional_weights(self) -> Tensor:
        """(B, M, Q, S): the same from the positional half alone, where content and position stand beside each other.

        For Conditional DETR's cross-attention and those that follow it: softmax(p_q . p_k / sqrt(d)) with d the width
        of a head's queries, content included, as in the layer (arXiv 2108.06152, equation 1 and figure 1).
        """
        half = self.query.shape[-1] // 2
        # The factor undoes the narrower head: the logits' scale is that of the layer.
        return self._softmax(self.query[..., half:] / math.sqrt(2), self.key[..., half:])

    def _softmax(self, query: Tensor, key: Tensor) -> Tensor:
        logits = query.float() @ key.float().transpose(-1, -2) / math.sqrt(query.shape[-1])
        if self.mask is not None:
            logits = logits + self.mask
        return logits.softmax(-1)

    @torch.no_grad()
    def output(self) -> Tensor:
        """(B, Q, D), what the layer returns for these weights."""
        out: Tensor = self.out_proj((self.weights() @ self.value.float()).transpose(1, 2).flatten(-2))
        return out


@dataclass
class SamplingCall:
    """One call of a multi-scale deformable attention layer.

    Attributes:
        name: the layer's name in the model.
        locations: (B, Q, M, L, P, 2) sampling points as x, y in [0, 1] of each level, padding included.
        weights: (B, Q, M, L, P); each head's sum to one.
        value: (B, S, M, D / M).
        spatial_shapes: (height, width) of each level.
        out_proj: the layer's last projection.
    """

    name: str
    locations: Tensor
    weights: Tensor
    value: Tensor
    spatial_shapes: list[tuple[int, int]]
    out_proj: nn.Module

    @torch.no_grad()
    def output(self) -> Tensor:
        """(B, Q, D), what the layer returns for these points and weights."""
        sampled = ms_deform_attn_torch(self.value, self.spatial_shapes, self.locations, self.weights)
        out: Tensor = self.out_proj(sampled)
        return out


Call = DenseCall | SamplingCall


def _of_multihead(name: str, layer: nn.MultiheadAttention, given: dict[str, Any]) -> DenseCall:
    inputs = [given[key] for key in ("query", "key", "value")]
    if not layer.batch_first:
        inputs = [x.transpose(0, 1) for x in inputs]
    weights: Sequence[Tensor]
    if layer.in_proj_weight is not None:
        weights = layer.in_proj_weight.chunk(3)
    else:
        weights = [layer.q_proj_weight, layer.k_proj_weight, layer.v_proj_weight]
    biases: Sequence[Tensor | None] = [None] * 3 if layer.in_proj_bias is None else layer.in_proj_bias.chunk(3)
    query, key, value = (
        _heads(F.linear(x, w, b), layer.num_heads) for x, w, b in zip(inputs, weights, biases, strict=True)
    )
    mask = None
    if given["key_padding_mask"] is not None:
        mask = _added(given["key_padding_mask"])[:, None, None]  # B x 1 x 1 x S
    if given["attn_mask"] is not None:
        blocked = _added(given["attn_mask"])  # Q x S, or B * M x Q x S
        if blocked.dim() == 3:
            blocked = blocked.unflatten(0, (-1, layer.num_heads))
        mask = blocked if mask is None else mask + blocked
    return DenseCall(name, query, key, value, mask, layer.out_proj)


def _added(mask: Tensor) -> Tensor:
    """A mask of True = not seen as one that is added to logits; others are that already."""
    if mask.dtype != torch.bool:
        return mask.float()
    return torch.zeros(mask.shape, device=mask.device).masked_fill(mask, float("-inf"))


def _of_projected(name: str, layer: ProjectedAttention, given: dict[str, Any]) -> DenseCall:
    query, key, value = (_heads(given[part], layer.num_heads) for part in ("query", "key", "value"))
    mask = None
    if given["padding"] is not None:
        mask = _added(given["padding"])[:, None, None]
    if given["blocked"] is not None:
        blocked = _added(given["blocked"])
        mask = blocked if mask is None else mask + blocked
    return DenseCall(name, query, key, value, mask, layer.out_proj)


def _of_deformable(name: str, layer: MSDeformAttn, given: dict[str, Any]) -> SamplingCall:
    query, tokens = given["query"], given["tokens"]
    value = layer.value_proj(tokens)
    if given["padding_mask"] is not None:
        value = value.masked_fill(given["padding_mask"][..., None], 0.0)
    batch, queries = query.shape[:2]
    shape = (batch, queries, layer.num_heads, layer.num_levels, layer.num_points)
    shapes = torch.as_tensor(given["spatial_shapes"], device=query.device)
    locations, weights = fused_inputs(
        shapes,
        given["reference_points"],
        layer.sampling_offsets(query).view(*shape, 2),
        layer.attention_weights(query).view(shape),
    )
    pairs = [(int(h), int(w)) for h, w in shapes.tolist()]
    return SamplingCall(name, locations, weights, value.unflatten(-1, (layer.num_heads, -1)), pairs, layer.output_proj)


_READERS: dict[type[nn.Module], Callable[[str, Any, dict[str, Any]], Call]] = {
    nn.MultiheadAttention: _of_multihead,
    ProjectedAttention: _of_projected,
    MSDeformAttn: _of_deformable,
}


@contextmanager
def watch(model: nn.Module, pattern: str = "") -> Iterator[list[Call]]:
    """Note every call of the model's attention layers while inside.

    Args:
        model: any module.
        pattern: regular expression that the layers' names must match somewhere; `ENCODER` and `CROSS` are the
            encoder's self-attention and the decoder's cross-attention of all detectors here.

    Yields:
        A list that fills as the model runs, first call first.
    """
    calls: list[Call] = []
    handles = []
    for name, module in model.named_modules():
        reader = next((read for kind, read in _READERS.items() if isinstance(module, kind)), None)
        if reader is None or not re.search(pattern, name):
            continue
        handles.append(module.register_forward_pre_hook(_noting(calls, name, reader), with_kwargs=True))
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def _noting(
    calls: list[Call], name: str, reader: Callable[[str, Any, dict[str, Any]], Call]
) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = inspect.signature(module.forward).bind(*args, **kwargs)
        given.apply_defaults()
        with torch.no_grad():
            calls.append(reader(name, module, given.arguments))

    return note


@contextmanager
def watch_outputs(module: nn.Module) -> Iterator[list[Any]]:
    """Note what a module returns while inside, first call first."""
    outputs: list[Any] = []
    handle = module.register_forward_hook(lambda _, __, output: outputs.append(output))
    try:
        yield outputs
    finally:
        handle.remove()
