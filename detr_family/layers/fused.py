"""Parts of a training step on the CPU in fewer passes over memory, by oneDNN's kernels (`torch.ops.mkldnn`).

A residual block with its frozen norms, and a feed-forward network, are one operation of autograd each. Frozen norms
become part of the weights for the step, so that no pass over the activations is theirs; ReLU and the residual sum are
done by the convolution's kernel; gradients within the operation are written over each other; a network's hidden layer
is worked on while it is in the cache. Weights, their names and their gradients are those of the plain layers.

Elsewhere (another device or type, autocast, evaluation, a compiler) the plain layers run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from detr_family.layers import outer_products, winograd
from detr_family.layers.prepared import kernels_work

_CHUNK = 4 << 20  # bytes of a feed-forward network's hidden layer that are worked on at a time
_STEPS = 1 << 16  # dropout's probability is so many parts of 1
_LEAST = 1 << 24  # multiply-adds: with fewer the calls cost what is gained
_aten: Any = torch.ops.aten
_mkldnn: Any = torch.ops.mkldnn

_fused: ContextVar[bool] = ContextVar("fused", default=True)


@contextmanager
def plain_layers() -> Iterator[None]:
    """The plain layers run inside: for measurements and tests."""
    token = _fused.set(False)
    try:
        yield
    finally:
        _fused.reset(token)


def fused_kernels_apply(x: Tensor) -> bool:
    """Whether this is a step of a training on the CPU in float32, and this torch has the kernels."""
    return (
        not (torch.compiler.is_compiling() or torch.jit.is_tracing())
        and torch.is_grad_enabled()
        and x.device.type == "cpu"
        and x.dtype == torch.float32
        and x.numel() > 0
        and _fused.get()
        and not torch.is_autocast_enabled("cpu")
        and kernels_work()
    )


def is_bare(*modules: nn.Module) -> bool:
    """Whether nobody wants to be called when these modules are."""
    return not any(
        m._forward_hooks or m._forward_pre_hooks or m._backward_hooks or m._backward_pre_hooks for m in modules
    )


class FoldedConv(NamedTuple):
    """A convolution without a bias, followed by a fixed scale and shift of each channel.

    Attributes:
        weight: (O, I / groups, kh, kw), before the scale.
        scale: (O,).
        shift: (O,).
        geometry: padding, stride, dilation, groups.
    """

    weight: Tensor
    scale: Tensor
    shift: Tensor
    geometry: tuple[list[int], list[int], list[int], int]

    def folded(self) -> Tensor:
        """The weight with the scale."""
        return self.weight.detach() * self.scale[:, None, None, None]

    def __call__(self, x: Tensor, weight: Tensor, *, relu: bool) -> Tensor:
        """Convolve x (B, I, H, W) with the folded weight; no autograd."""
        if self._is_winograds(x):
            return winograd.convolve(x, winograd.filters(weight), self.shift, relu=relu)
        unary = "relu" if relu else "none"
        y: Tensor = _mkldnn._convolution_pointwise(x, weight, self.shift, *self.geometry, unary, [], "")
        return y

    def add(self, other: Tensor, x: Tensor, weight: Tensor) -> Tensor:
        """Convolve and add (B, O, H', W'), then ReLU; no autograd."""
        if self._is_winograds(x):
            return self.add_to(other.clone(), x, weight)
        y: Tensor = _mkldnn._convolution_pointwise.binary(
            x, other, weight, self.shift, *self.geometry, "add", 1, "relu", [], ""
        )
        return y

    def add_to(self, sums: Tensor, x: Tensor, weight: Tensor) -> Tensor:
        """Convolve and add to (B, O, H', W'), which is overwritten, then ReLU; no autograd."""
        if self._is_winograds(x):
            return winograd.convolve(x, winograd.filters(weight), self.shift, relu=True, sums=sums)
        y: Tensor = _mkldnn._convolution_pointwise_.binary(
            sums, x, weight, self.shift, *self.geometry, "add", 1, "relu", [], ""
        )
        return y

    def _is_winograds(self, x: Tensor) -> bool:
        """Whether it is a 3x3 convolution that is faster by Winograd's method."""
        plain = self.geometry == ([1, 1], [1, 1], [1, 1], 1) and self.weight.shape[2:] == (3, 3)
        return plain and winograd.pays(x, self.weight)

    def backward(
        self, grad: Tensor, x: Tensor, wants_x: bool, wants_weight: bool
    ) -> tuple[Tensor | None, Tensor | None]:
        """Gradients of x and of the weight.

        Args:
            grad: (B, O, H', W') of the result, in channels-last layout.
            x: what was convolved.
            wants_x, wants_weight: which are computed.
        """
        padding, stride, dilation, groups = self.geometry
        weight = self.weight.detach()
        scale_later = weight.numel() < grad.numel()  # the scale goes to what is smaller
        if not scale_later:
            grad = grad * self.scale[:, None, None]
        elif wants_x:
            weight = self.folded()
        grad_x: Tensor | None = None
        grad_weight: Tensor | None = None
        if weight.shape[2:] == (1, 1) and (stride, padding, groups) == ([1, 1], [0, 0], 1):  # a linear layer
            rows = grad.permute(0, 2, 3, 1).flatten(0, 2)
            if wants_x:
                wide = _mkldnn._linear_pointwise(rows, weight.flatten(1).t(), None, "none", [], "")
                grad_x = wide.view(len(x), *x.shape[2:], -1).permute(0, 3, 1, 2)
            if wants_weight:
                grad_weight = _weight_gradient(rows, x.permute(0, 2, 3, 1).flatten(0, 2)).view_as(weight)
        elif self._is_winograds(x):
            grad_x, grad_weight = winograd.gradients(grad, x, weight, wants_x, wants_weight)
        else:
            rest = (None, stride, padding, dilation, False, [0, 0], groups)
            strided = weight.shape[2:] == (1, 1) and (padding, groups) == ([0, 0], 1)
            # oneDNN's gradients of these weights take longer in channels-last layout.
            apart = wants_weight and groups == 1 and (max(stride) > 1 or len(weight) >= 512)
            wanted = [wants_x, wants_weight and not apart, False]
            if any(wanted):
                grad_x, grad_weight, _ = _aten.convolution_backward(grad, x, weight, *rest, wanted)
            if apart and strided:
                seen = x[:, :, :: stride[0], :: stride[1]].permute(0, 2, 3, 1).flatten(0, 2)
                grad_weight = _weight_gradient(grad.permute(0, 2, 3, 1).flatten(0, 2), seen).view_as(weight)
            elif apart:
                plain = grad.contiguous(), x.contiguous(), self.weight.detach()
                grad_weight = _aten.convolution_backward(*plain, *rest, [False, True, False])[1]
        if grad_weight is not None:
            grad_weight = grad_weight.contiguous()
            if scale_later:
                grad_weight.mul_(self.scale[:, None, None, None])
        return grad_x, grad_weight


def _weight_gradient(grad: Tensor, x: Tensor) -> Tensor:
    """(O, I) of a linear layer's results' gradient (N, O) and inputs (N, I)."""
    turned = grad.shape[1] > x.shape[1]
    a, b = (x, grad) if turned else (grad, x)
    sums = outer_products.add(a.new_zeros(a.shape[1], b.shape[1]), a, b)
    return sums.t() if turned else sums


def _clear_where_not_positive(grad: Tensor, y: Tensor) -> Tensor:
    """The gradient before ReLU of that behind it, which is overwritten."""
    cleared: Tensor = _aten.threshold_backward.grad_input(grad, y, 0, grad_input=grad)
    return cleared


def residual_block(x: Tensor, convs: Sequence[FoldedConv], shortcut: FoldedConv | None) -> Tensor:
    """ReLU(shortcut(x) + convs(x)), with ReLU between the convolutions.

    Args:
        x: (B, I, H, W).
        convs: two or more, first to last.
        shortcut: None where x itself is added.

    Returns:
        (B, O, H', W') in channels-last layout.
    """
    every = [*convs, *([] if shortcut is None else [shortcut])]
    result: Tensor = _ResidualBlock.apply(x, tuple(convs), shortcut, *(conv.weight for conv in every))
    return result


class _ResidualBlock(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, convs: Sequence[FoldedConv], shortcut: FoldedConv | None, *weights: Tensor
    ) -> Tensor:
        x = x.contiguous(memory_format=torch.channels_last)
        folded = [conv.folded() for conv in convs]
        entering = [x]
        for conv, weight in zip(convs[:-1], folded, strict=False):
            entering.append(conv(entering[-1], weight, relu=True))
        if shortcut is None:
            result = convs[-1].add(x, entering[-1], folded[-1])
        else:
            result = convs[-1].add_to(shortcut(x, shortcut.folded(), relu=False), entering[-1], folded[-1])
        ctx.convs, ctx.shortcut = convs, shortcut
        ctx.save_for_backward(result, *entering, *weights)
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        convs, shortcut, count = ctx.convs, ctx.shortcut, len(ctx.convs)
        result, *saved = ctx.saved_tensors
        entering = saved[:count]
        wants_x, wants_weight = ctx.needs_input_grad[0], ctx.needs_input_grad[3:]
        of_weights: list[Tensor | None] = [None] * len(wants_weight)
        grad = _aten.threshold_backward(grad.contiguous(memory_format=torch.channels_last), result, 0)
        grad_x: Tensor | None = grad
        if shortcut is not None:
            grad_x, of_weights[-1] = shortcut.backward(grad, entering[0], wants_x, wants_weight[count])
        for i in reversed(range(count)):
            wanted = wants_x or any(wants_weight[:i])
            inner, of_weights[i] = convs[i].backward(grad, entering[i], wanted, wants_weight[i])
            if inner is None:
                break
            grad = _clear_where_not_positive(inner, entering[i]) if i else inner.add_(grad_x)
        return grad if wants_x else None, None, None, *of_weights


def feed_forward(
    x: Tensor, linear1: nn.Module, activation: Callable[[Tensor], Tensor], dropout: nn.Dropout, linear2: nn.Module
) -> Tensor:
    """linear2(dropout(activation(linear1(x)))), the feed-forward network of a transformer's layer.

    Args:
        x: (..., D).
        linear1: D to the hidden width.
        activation: between the two; F.relu or a module.
        dropout: of the hidden layer.
        linear2: back to D.

    Returns:
        (..., D).
    """
    if (
        dropout.training  # and this first: a compiler or an exporter shall make no condition of the size
        and fused_kernels_apply(x)
        and type(linear1) is nn.Linear
        and type(linear2) is nn.Linear
        and (activation is F.relu or (type(activation) is nn.ReLU and is_bare(activation)))
        and x.numel() * linear1.out_features >= _LEAST
        and linear1.weight.dtype == torch.float32
        and is_bare(linear1, dropout, linear2)
        and _kept(dropout.p) > 0
    ):
        weights = (linear1.weight, linear1.bias, linear2.weight, linear2.bias)
        result: Tensor = _FeedForward.apply(x, *weights, dropout.p)
        return result
    result = linear2(dropout(activation(linear1(x))))
    return result


def _packed(weight: Tensor, often: bool) -> Tensor:
    """A matrix in the layout that oneDNN's kernel wants, where it is multiplied by often enough."""
    packed: Tensor = _mkldnn._reorder_linear_weight(weight.contiguous()) if often else weight
    return packed


def _kept(p: float) -> int:
    """How many of _STEPS values dropout leaves."""
    return round((1 - p) * _STEPS)


def drop_(x: Tensor, p: float) -> Tensor:
    """Dropout in place, four values of each random number; torch's draws one for each, which takes three times as long.

    Args:
        x: contiguous.
        p: probability, below 1; taken in steps of 2**-16.

    Returns:
        x.
    """
    kept = _kept(p)
    numbers = torch.empty(-(-x.numel() // 4), dtype=torch.int64, device=x.device)
    drawn = numbers.random_(-(2**63), None).view(torch.int16)
    threshold = kept - _STEPS // 2 - 1  # of 16 bits with a sign
    return x.mul_((drawn[: x.numel()] <= threshold).view_as(x)).mul_(_STEPS / kept)


class _FeedForward(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight1: Tensor, bias1: Tensor | None, weight2: Tensor, bias2: Tensor | None, p: float
    ) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        at_once = max(_CHUNK // (4 * len(weight1)) * torch.get_num_threads(), 64)
        packed1, packed2 = (_packed(weight, len(rows) > 2 * at_once) for weight in (weight1, weight2))
        hidden, results = [], []
        for part in rows.split(at_once):
            h = _mkldnn._linear_pointwise(part, packed1, bias1, "relu", [], "")
            hidden.append(drop_(h, p) if p else h)
            results.append(_mkldnn._linear_pointwise(hidden[-1], packed2, bias2, "none", [], ""))
        ctx.p, ctx.at_once = p, at_once
        ctx.save_for_backward(x, weight1, weight2, *hidden)
        return torch.cat(results).view(*x.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight1, weight2, *hidden = ctx.saved_tensors
        wants_x, wants_weight1, wants_bias1, wants_weight2, wants_bias2, _ = ctx.needs_input_grad
        rows, grad_rows = x.reshape(-1, x.shape[-1]), grad.reshape(-1, grad.shape[-1])
        packed1, packed2 = (_packed(weight.t(), len(rows) > 2 * ctx.at_once) for weight in (weight1, weight2))
        grad1 = weight1.new_zeros(weight1.shape[::-1]) if wants_weight1 else None  # transposed, which is faster
        grad2 = weight2.new_zeros(weight2.shape) if wants_weight2 else None
        bias1 = weight1.new_zeros(len(weight1)) if wants_bias1 else None
        results = []
        for part, grad_part, h in zip(rows.split(ctx.at_once), grad_rows.split(ctx.at_once), hidden, strict=True):
            if grad2 is not None:
                outer_products.add(grad2, grad_part, h)
            if not (wants_x or wants_weight1 or wants_bias1):
                continue
            # Dropped values are zeros, too, and what is left was divided by the share of it.
            inner = _mkldnn._linear_pointwise(grad_part, packed2, None, "none", [], "")
            inner = _clear_where_not_positive(inner, h)
            if ctx.p:
                inner.mul_(_STEPS / _kept(ctx.p))
            if grad1 is not None:
                outer_products.add(grad1, part, inner)
            if bias1 is not None:
                bias1 += inner.sum(0)
            if wants_x:
                results.append(_mkldnn._linear_pointwise(inner, packed1, None, "none", [], ""))
        grad_x = torch.cat(results).view_as(x) if wants_x else None
        of_weight1 = None if grad1 is None else grad1.t().contiguous()
        return grad_x, of_weight1, bias1, grad2, grad_rows.sum(0) if wants_bias2 else None, None
