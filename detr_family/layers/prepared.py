"""Layers prepared for inference on a CPU: weights in oneDNN's own layout, ReLU and sums done by the same kernel.

Each stands in for an ordinary layer, takes its weights over and cannot be trained. They call the operators that torch's
compiler emits for a CPU (`torch.ops.mkldnn`); `kernels_work` says whether this torch has them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from detr_family.layers.attention import ProjectedAttention

_CHUNK = 4 << 20  # bytes of a feed-forward network's hidden layer worked on at a time: they stay in the cache
_SUM_CHUNK = 2 << 20  # bytes, for each thread, of a 1x1 convolution's result that are added at a time: the same
_STRIP = 12 << 20  # bytes of the stem's convolution that wait for the pooling: fresh pages cost much time
_USUAL_MAP = (50, 67)  # height and width of a feature map, to choose a layout for


@functools.cache
def kernels_work() -> bool:
    """Whether this torch has oneDNN's prepacked operators and they compute what the plain ones do."""
    if not torch.backends.mkldnn.is_available():
        return False
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):  # layers draw their weights
            generator = torch.Generator().manual_seed(0)
            conv = nn.Conv2d(4, 6, 3, padding=1)
            linear = nn.Linear(8, 5)
            image, x = torch.randn(1, 4, 5, 7, generator=generator), torch.randn(3, 8, generator=generator)
            expected = F.relu(conv(image)), F.relu(linear(x))
            found = (
                PreparedConv2d(conv.weight, conv.bias, (1, 1), (1, 1), (1, 1), 1, relu=True)(image),
                PreparedLinear(linear, relu=True)(x),
            )
            return all(torch.allclose(a, b, atol=1e-5) for a, b in zip(expected, found, strict=True))
    except (AttributeError, RuntimeError, TypeError):  # a torch that calls them otherwise
        return False


_INSTEAD = "load it without preparing it (Predictor.from_config(..., optimize=False)) for that"


class Prepared(nn.Module):
    """What has given its weights away: evaluation on the CPU only, and nothing that is saved or loaded.

    `weight` is for reading: it is laid out anew at each call.
    """

    def train(self, mode: bool = True) -> Prepared:
        """Refuses training mode."""
        if mode:
            raise ValueError(f"this detector was prepared for inference and cannot be trained: {_INSTEAD}")
        return super().train(False)

    def _save_to_state_dict(self, *args: Any, **kwargs: Any) -> None:
        raise ValueError(f"this detector was prepared for inference, and its weights cannot be saved: {_INSTEAD}")

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        raise ValueError(f"this detector was prepared for inference and takes no other weights: {_INSTEAD}")

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Prepared:
        """Bears calls such as .cpu() and .float() that change nothing, refuses others."""
        before = torch.empty(0)
        after = fn(before)
        if (after.device, after.dtype) != (before.device, before.dtype):
            raise ValueError(
                "this detector was prepared for inference on the CPU and can be moved to no other device or type: "
                f"{_INSTEAD}"
            )
        return self


def _plain(packed: Any) -> Tensor:
    dense: Tensor = packed.to_dense() if packed.is_mkldnn else packed
    return dense


class PreparedLinear(Prepared):
    """y = x W^T + b with W in oneDNN's layout, and ReLU in the same pass if wanted.

    Args:
        linear: whose weights are taken over.
        relu: apply ReLU to the result.
        dtype: what is computed in, float32 or bfloat16; the result is of that type.
    """

    def __init__(self, linear: nn.Linear, *, relu: bool = False, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.dtype = dtype
        self.unary = "relu" if relu else "none"
        weight = linear.weight.detach().to(dtype)
        self.register_buffer("packed", torch.ops.mkldnn._reorder_linear_weight(weight.contiguous()), persistent=False)
        bias = None if linear.bias is None else linear.bias.detach().to(dtype)
        self.register_buffer("bias", bias, persistent=False)
        self.training = False

    @property
    def weight(self) -> Tensor:
        """(out_features, in_features), for reading."""
        return _plain(self.packed)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) -> (..., out_features)."""
        if not x.numel():
            return x.new_zeros((*x.shape[:-1], self.out_features), dtype=self.dtype)
        y: Tensor = torch.ops.mkldnn._linear_pointwise(x.to(self.dtype), self.packed, self.bias, self.unary, [], "")
        return y


class PreparedFeedForward(Prepared):
    """Two linear layers with an activation between them, a few tokens at a time.

    The hidden layer of all of an image's tokens would be written to memory and read again: 180 MB in DINO's encoder.

    Args:
        first: the layer to the hidden width.
        activation: between the two; ReLU becomes part of the first.
        second: the layer back.
        dtype: what is computed in.
    """

    def __init__(
        self, first: nn.Linear, activation: nn.Module, second: nn.Linear, *, dtype: torch.dtype = torch.float32
    ) -> None:
        super().__init__()
        relu = isinstance(activation, nn.ReLU)
        self.activation = nn.Identity() if relu else activation.to(dtype)
        self.first = PreparedLinear(first, relu=relu, dtype=dtype)
        self.second = PreparedLinear(second, dtype=dtype)
        self.chunk = max(_CHUNK // (first.out_features * dtype.itemsize), 64)
        self.training = False

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., D)."""
        rows = x.reshape(-1, x.shape[-1])
        if len(rows) <= self.chunk:
            return self.second(self.activation(self.first(x)))
        parts = [self.second(self.activation(self.first(part))) for part in rows.split(self.chunk)]
        return torch.cat(parts).view(*x.shape[:-1], -1)


class PreparedConv2d(Prepared):
    """A convolution in channels-last layout with its batch norm folded in, ReLU or a sum and ReLU in the same pass.

    Args:
        weight: (O, I / groups, kh, kw).
        bias: (O,) or None.
        stride, padding, dilation, groups: as nn.Conv2d has them.
        relu: apply ReLU to the result.
        dtype: what is computed in; the result is of that type.
    """

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None,
        stride: tuple[int, ...],
        padding: tuple[int, ...],
        dilation: tuple[int, ...],
        groups: int,
        *,
        relu: bool = False,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        self.geometry = (list(padding), list(stride), list(dilation), groups)
        self.dtype = dtype
        self.relu = relu
        self.out_channels = len(weight)
        # The layout is chosen for a size of image; without one it is chosen for a tiny one, several times slower.
        packed = torch.ops.mkldnn._reorder_convolution_weight(
            weight.detach().to(dtype).contiguous(memory_format=torch.channels_last),
            *self.geometry,
            [1, groups * weight.shape[1], *_USUAL_MAP],
        )
        self.register_buffer("packed", packed, persistent=False)
        self.register_buffer("bias", None if bias is None else bias.detach().to(dtype), persistent=False)
        self.training = False

    @property
    def weight(self) -> Tensor:
        """(O, I / groups, kh, kw), for reading; the norm is in it."""
        return _plain(self.packed)

    def forward(self, x: Tensor, add: Tensor | None = None) -> Tensor:
        """Convolve.

        Args:
            x: (B, I, H, W).
            add: (B, O, H', W') of the same type, added to the result before ReLU; it is overwritten.

        Returns:
            (B, O, H', W') in channels-last layout.
        """
        x = x.to(self.dtype).contiguous(memory_format=torch.channels_last)
        y: Tensor
        if add is None:
            unary = "relu" if self.relu else "none"
            y = torch.ops.mkldnn._convolution_pointwise(x, self.packed, self.bias, *self.geometry, unary, [], "")
        else:
            y = torch.ops.mkldnn._convolution_pointwise_.binary(
                add, x, self.packed, self.bias, *self.geometry, "add", 1, "relu" if self.relu else None, [], ""
            )
        return y


class PreparedPointwise(Prepared):
    """A 1x1 convolution as a linear layer, in channels-last layout.

    oneDNN has several layouts for the weights of a 1x1 convolution and takes them by the size of the map. With a layout
    that was chosen for another size it moves them at each call, at up to 30 times the convolution's own time.

    Args:
        weight: (O, I, 1, 1).
        bias: (O,) or None.
        stride: alike in both directions.
        relu: apply ReLU to the result.
        dtype: what is computed in; the result is of that type.
    """

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None,
        stride: int,
        *,
        relu: bool = False,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        self.out_channels, self.in_channels = weight.shape[:2]
        self.stride = stride
        self.dtype = dtype
        self.relu = relu
        plain = weight.detach().flatten(1).to(dtype).contiguous()
        self.register_buffer("packed", torch.ops.mkldnn._reorder_linear_weight(plain), persistent=False)
        self.register_buffer("bias", None if bias is None else bias.detach().to(dtype), persistent=False)
        self.training = False

    @property
    def weight(self) -> Tensor:
        """(O, I, 1, 1), for reading; the norm is in it."""
        return _plain(self.packed)[:, :, None, None]

    def forward(self, x: Tensor, add: Tensor | None = None) -> Tensor:
        """Convolve.

        Args:
            x: (B, I, H, W).
            add: (B, O, H', W') of the same type, added to the result before ReLU; it may be overwritten.

        Returns:
            (B, O, H', W') in channels-last layout.
        """
        x = x.to(self.dtype)[:, :, :: self.stride, :: self.stride].permute(0, 2, 3, 1)
        rows = x.reshape(-1, self.in_channels)
        if add is None:
            y: Tensor = self._linear(rows, "relu" if self.relu else "none")
            return y.view(*x.shape[:3], self.out_channels).permute(0, 3, 1, 2)
        add = add.contiguous(memory_format=torch.channels_last)
        sums = add.permute(0, 2, 3, 1).view(-1, self.out_channels)
        at_once = max(_SUM_CHUNK * torch.get_num_threads() // (self.out_channels * self.dtype.itemsize), 64)
        for part, total in zip(rows.split(at_once), sums.split(at_once), strict=True):
            total.add_(self._linear(part, "none"))
            if self.relu:
                total.relu_()
        return add

    def _linear(self, rows: Tensor, unary: str) -> Tensor:
        y: Tensor = torch.ops.mkldnn._linear_pointwise(rows, self.packed, self.bias, unary, [], "")
        return y


class PreparedStem(Prepared):
    """A ResNet's stem, convolution, ReLU and 3x3 max pooling of stride 2, a strip of rows at a time.

    Args:
        weight: (O, I, k, k).
        bias: (O,).
        stride, padding: of the convolution, alike in both directions.
        dtype: what is computed in.
    """

    def __init__(
        self, weight: Tensor, bias: Tensor | None, stride: int, padding: int, *, dtype: torch.dtype = torch.float32
    ) -> None:
        super().__init__()
        self.kernel, self.stride, self.padding = weight.shape[-1], stride, padding
        self.conv = PreparedConv2d(weight, bias, (stride, stride), (0, 0), (1, 1), 1, relu=True, dtype=dtype)
        self.training = False

    def forward(self, x: Tensor) -> Tensor:
        """(B, I, H, W) -> (B, O, H', W') in channels-last layout, a quarter as high and wide if `stride` is 2."""
        x = F.pad(x.to(self.conv.dtype), (self.padding,) * 4).contiguous(memory_format=torch.channels_last)
        high, wide = ((side - self.kernel) // self.stride + 1 for side in x.shape[-2:])  # of the convolution's result
        channels, rows = self.conv.out_channels, (high - 1) // 2 + 1
        result = torch.empty(
            (len(x), channels, rows, (wide - 1) // 2 + 1), dtype=x.dtype, memory_format=torch.channels_last
        )
        at_once = max(1, _STRIP // (2 * len(x) * wide * channels * x.element_size()))
        for start in range(0, rows, at_once):
            stop = min(start + at_once, rows)
            above = min(start, 1)  # a row more: the pooling takes its own upper rim for the image's
            first, last = 2 * (start - above), min(2 * stop, high) - 1
            y = self.conv(x[:, :, self.stride * first : self.stride * last + self.kernel])
            result[:, :, start:stop] = F.max_pool2d(y, kernel_size=3, stride=2, padding=1)[:, :, above:]
        return result


class PreparedAttention(Prepared):
    """nn.MultiheadAttention (batch first, no attention weights wanted) with prepared projections.

    Args:
        attention: whose weights are taken over.
        dtype: what is computed in.
    """

    def __init__(self, attention: nn.MultiheadAttention, *, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        dim = attention.embed_dim
        self.dim, self.num_heads = dim, attention.num_heads
        weight, bias = attention.in_proj_weight, attention.in_proj_bias
        assert weight is not None and bias is not None, "one width for queries, keys and values, and a bias"

        def projection(start: int, stop: int) -> PreparedLinear:
            linear = nn.Linear(dim, stop - start)
            linear.weight.data, linear.bias.data = weight.data[start:stop], bias.data[start:stop]
            return PreparedLinear(linear, dtype=dtype)

        self.query, self.key, self.value = (projection(i * dim, (i + 1) * dim) for i in range(3))
        self.out_proj = PreparedLinear(attention.out_proj, dtype=dtype)
        self.training = False

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = False,
        attn_mask: Tensor | None = None,
    ) -> tuple[Tensor, None]:
        """As nn.MultiheadAttention: (B, Q, D), (B, S, D), (B, S, D) -> (B, Q, D); masks are True where blocked."""
        q, k, v = (
            layer(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for layer, x in ((self.query, query), (self.key, key), (self.value, value))
        )
        seen = None if key_padding_mask is None else ~key_padding_mask[:, None, None]
        if attn_mask is not None:
            seen = ~attn_mask if seen is None else seen & ~attn_mask
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=seen)
        return self.out_proj(x.transpose(1, 2).flatten(-2)), None


class PreparedProjectedAttention(Prepared):
    """ProjectedAttention with a prepared projection, through torch's fast kernel whatever the widths.

    The kernel wants values as wide as queries and keys: narrower ones get zeros beside them, which come to nothing.

    Args:
        attention: whose weights are taken over.
        dtype: what is computed in.
    """

    def __init__(self, attention: ProjectedAttention, *, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.num_heads = attention.num_heads
        self.out_proj = PreparedLinear(attention.out_proj, dtype=dtype)
        self.training = False

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        padding: Tensor | None = None,
        blocked: Tensor | None = None,
    ) -> Tensor:
        """As ProjectedAttention: (B, Q, E), (B, S, E), (B, S, D) -> (B, Q, D); masks are True where blocked."""
        q, k, v = (x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for x in (query, key, value))
        seen = None if padding is None else ~padding[:, None, None]
        if blocked is not None:
            seen = ~blocked if seen is None else seen & ~blocked
        width = v.shape[-1]
        if width < q.shape[-1]:
            v = F.pad(v, (0, q.shape[-1] - width))
        x = F.scaled_dot_product_attention(q, k, v, seen)[..., :width]
        return self.out_proj(x.transpose(1, 2).flatten(-2))
