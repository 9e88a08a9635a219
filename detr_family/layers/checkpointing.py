"""Activation checkpointing: what a layer keeps for the backward pass is computed again there (arXiv 1604.06174).

It trades about a third more computing for memory. Losses and gradients are those without: random generators and
autocast are in the second pass as they were in the first, and buffers (the statistics of batch norms) move once.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint


def checkpoint_activations(layers: Iterable[nn.Module]) -> None:
    """Checkpoint each of the layers from now on, in place, in training only.

    Names of parameters stay as they are. A layer that is given again is not wrapped twice.

    Args:
        layers: modules that are called once in a forward pass each: the layers of an encoder or decoder, the blocks
            of a backbone. Only what goes into and comes out of each is kept.
    """
    for layer in layers:
        layer.forward = functools.partial(_forward, layer)


def backbone_blocks(backbone: nn.Module) -> list[nn.Module]:
    """What to checkpoint in a backbone: the blocks of its stages, however many containers those are in.

    ResNet's stages are sequences of blocks, Swin's hold a list of blocks, an FPN holds such a backbone. A backbone
    without lists of modules is taken child by child.
    """
    blocks = list(_listed(backbone))
    return blocks or list(backbone.children())


def _listed(module: nn.Module) -> Iterator[nn.Module]:
    for child in module.children():
        if isinstance(child, nn.ModuleList | nn.Sequential):
            for member in child:
                stage = isinstance(member, nn.ModuleList | nn.Sequential)
                stage = stage or any(isinstance(x, nn.ModuleList) for x in member.children())
                yield from (list(_listed(member)) or list(member.children())) if stage else [member]
        else:
            yield from _listed(child)


def _forward(layer: nn.Module, *args: Any, **kwargs: Any) -> Any:
    forward = functools.partial(type(layer).forward, layer)
    inputs = (*args, *kwargs.values(), *layer.parameters())
    differentiated = any(isinstance(x, torch.Tensor) and x.requires_grad for x in inputs)
    if not (layer.training and torch.is_grad_enabled() and differentiated):
        return forward(*args, **kwargs)

    def contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        return nullcontext(), _buffers_kept(layer)

    return checkpoint(forward, *args, use_reentrant=False, context_fn=contexts, **kwargs)


@contextmanager
def _buffers_kept(layer: nn.Module) -> Iterator[None]:
    """Buffers are afterwards what they were before."""
    before = [(buffer, buffer.clone()) for buffer in layer.buffers()]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, value in before:
                buffer.copy_(value)
