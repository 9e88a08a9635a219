"""Fused parts of a training step against the plain layers: values, gradients, and when they stay away."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from detectron2.modeling.backbone.resnet import BasicBlock, BasicStem, BottleneckBlock
from torch import Tensor, nn

from detr_family.layers import fused, winograd
from detr_family.layers.checkpointing import checkpoint_activations
from detr_family.layers.fused import drop_, feed_forward, plain_layers
from detr_family.layers.prepared import kernels_work
from detr_family.modeling.backbone.resnet import fuse_blocks

pytestmark = pytest.mark.skipif(not kernels_work(), reason="this torch has not oneDNN's prepacked operators")


def bottleneck(**changes: Any) -> nn.Module:
    sizes = {"in_channels": 12, "out_channels": 20, "bottleneck_channels": 8, "stride": 2, "norm": "FrozenBN"}
    return BottleneckBlock(**{**sizes, **changes})


BLOCKS = {
    "stride": lambda: bottleneck(),
    "stride in the first": lambda: bottleneck(stride_in_1x1=True),
    "no shortcut": lambda: bottleneck(out_channels=12, stride=1),
    "dilation": lambda: bottleneck(stride=1, dilation=2),
    "groups": lambda: bottleneck(num_groups=4),
    "basic": lambda: BasicBlock(12, 20, stride=2, norm="FrozenBN"),
    "basic, no shortcut": lambda: BasicBlock(12, 12, norm="FrozenBN"),
    "stem": lambda: BasicStem(in_channels=12, out_channels=8, norm="FrozenBN"),
}


def stage(name: str) -> nn.Module:
    """A module with norms that do something."""
    generator = torch.Generator().manual_seed(1)
    torch.manual_seed(1)  # others' weights may have a ReLU whose input is within a rounding of 0
    module = BLOCKS[name]()
    for buffer in module.buffers():
        buffer.copy_(0.5 + torch.rand(buffer.shape, generator=generator))
    holder = nn.Sequential(module).train()
    fuse_blocks(holder)
    return holder


def compute(module: nn.Module, x: Tensor, wants_x: bool) -> tuple[Tensor, list[Tensor | None]]:
    module.zero_grad()
    x = x.clone().requires_grad_(wants_x)
    y = module(x)
    if y.requires_grad:
        (y * torch.linspace(0, 1, y.numel()).view_as(y)).sum().backward()
    return y.detach(), [x.grad, *(p.grad for p in module.parameters())]


def check(module: nn.Module, x: Tensor, wants_x: bool) -> None:
    found, gradients = compute(module, x, wants_x)
    with plain_layers():
        expected, plain = compute(module, x, wants_x)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5 * max(float(expected.abs().max()), 1))
    for a, b in zip(gradients, plain, strict=True):
        assert (a is None) == (b is None)
        if a is not None and b is not None:
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5 * float(b.abs().max()))


def count(monkeypatch: pytest.MonkeyPatch, name: str, module: Any = fused) -> list[int]:
    """How often something of a module of layers is called."""
    calls: list[int] = []
    kept = getattr(module, name)

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return kept(*args, **kwargs)

    monkeypatch.setattr(module, name, counted)
    return calls


@pytest.mark.parametrize("wants_x", [True, False])
@pytest.mark.parametrize("name", list(BLOCKS))
def test_block_equals_plain_one(name: str, wants_x: bool) -> None:
    check(stage(name), torch.randn(2, 12, 15, 18, generator=torch.Generator().manual_seed(2)), wants_x)


@pytest.mark.parametrize("trained", [(), ("conv1",), ("conv3", "shortcut"), ("conv2",)])
def test_block_with_frozen_weights(trained: tuple[str, ...]) -> None:
    module = stage("stride")
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(name.split(".")[1] in trained)
    check(module, torch.randn(2, 12, 15, 18), wants_x=False)
    check(module, torch.randn(2, 12, 15, 18), wants_x=True)


@pytest.mark.parametrize("wants_x", [True, False])
@pytest.mark.parametrize("width", [8, 32])  # torch's operators, and the library's
@pytest.mark.parametrize(("block", "times"), [("bottleneck", 1), ("basic", 1), ("basic, no shortcut", 2)])
def test_block_by_winograds_method(
    block: str, times: int, width: int, wants_x: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    blocks = {
        "bottleneck": lambda: bottleneck(in_channels=width, bottleneck_channels=width, stride=1),
        "basic": lambda: BasicBlock(width, 2 * width, stride=2, norm="FrozenBN"),
        "basic, no shortcut": lambda: BasicBlock(width, width, norm="FrozenBN"),
    }
    monkeypatch.setattr(winograd, "pays", lambda *_: True)
    monkeypatch.setitem(BLOCKS, "block", blocks[block])
    forward, backward = count(monkeypatch, "convolve", winograd), count(monkeypatch, "gradients", winograd)
    x = torch.randn(2, width, 16, 24, generator=torch.Generator().manual_seed(2))
    check(stage("block"), x, wants_x)
    of_inputs = times - (block == "basic, no shortcut" and not wants_x)  # the first's, if its input wants none
    assert (len(forward), len(backward)) == (times + of_inputs, times)


def test_frozen_stem_equals_plain_one() -> None:
    module = stage("stem").requires_grad_(False)
    check(module, torch.randn(2, 12, 30, 37), wants_x=False)


def test_blocks_are_fused(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = count(monkeypatch, "_clear_where_not_positive")
    module, x = stage("stride"), torch.randn(2, 12, 15, 18)
    compute(module, x, True)
    assert len(calls) == 2
    with plain_layers():
        compute(module, x, True)
    with torch.autocast("cpu", torch.bfloat16):
        compute(module, x, True)
    compute(module.double(), x.double(), True)
    hook = module[0].conv1.register_forward_hook(lambda *_: None)
    compute(module.float(), x, True)
    hook.remove()
    module[0].conv1.norm.register_forward_pre_hook(lambda *_: None)
    compute(module, x, True)
    assert len(calls) == 2


def test_checkpointed_block_is_fused_and_equal(monkeypatch: pytest.MonkeyPatch) -> None:
    module, x = stage("stride"), torch.randn(2, 12, 15, 18)
    _, expected = compute(module, x, True)
    checkpoint_activations(module)
    calls = count(monkeypatch, "_clear_where_not_positive")
    _, found = compute(module, x, True)
    assert calls
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)


class Network(nn.Module):
    def __init__(self, p: float, activation: nn.Module) -> None:
        super().__init__()
        self.linear1, self.linear2 = nn.Linear(16, 24), nn.Linear(24, 16)
        self.dropout, self.activation = nn.Dropout(p), activation

    def forward(self, x: Tensor) -> Tensor:
        torch.manual_seed(3)
        return feed_forward(x, self.linear1, self.activation, self.dropout, self.linear2)


@pytest.mark.parametrize("frozen", ["", "linear1", "linear2", "bias", "linear"])
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_feed_forward_equals_plain_one(p: float, frozen: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused, "_LEAST", 0)
    monkeypatch.setattr(fused, "_CHUNK", 4 * 24 * 10)  # at least 64 rows a piece: here 64, 64 and 22
    # What is dropped is compared, too: both draw the same.
    monkeypatch.setattr(F, "dropout", lambda x, p, training=True, inplace=False: x * drop_(torch.ones_like(x), p))
    network = Network(p, nn.ReLU()).train()
    for name, parameter in network.named_parameters():
        parameter.requires_grad_(not frozen or frozen not in name)
    x = torch.randn(3, 50, 16, generator=torch.Generator().manual_seed(4))
    check(network, x, wants_x=True)
    if frozen != "linear":
        check(network, x, wants_x=False)


@pytest.mark.parametrize("p", [0.1, 0.5, 0.999])
def test_what_is_dropped(p: float) -> None:
    torch.manual_seed(0)
    rows, width = 1001, 1003  # no multiple of four values together
    x = drop_(torch.ones(rows, width), p)
    left = x != 0
    deviation = (p * (1 - p) / x.numel()) ** 0.5
    assert abs(left.double().mean() - (1 - p)) < 4 * deviation + 2**-16
    assert x[left].unique().tolist() == pytest.approx([1 / (1 - p)], rel=1e-2)
    assert abs(x.double().mean() - 1) < 4 * deviation / (1 - p)  # exact on average
    # Neither neighbours nor what one random number decides go together.
    for distance in (1, 2, 3, 4, width):
        both = (left.flatten()[distance:] & left.flatten()[:-distance]).double().mean()
        assert abs(both - (1 - p) ** 2) < 8 * deviation + 2**-15
    torch.manual_seed(0)
    assert torch.equal(drop_(torch.ones(rows, width), p), x)
    assert not torch.equal(drop_(torch.ones(rows, width), p), x)


@pytest.mark.parametrize("p", [1.0, 1 - 2**-20])
def test_where_all_is_dropped_it_is_torchs(p: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused, "_LEAST", 0)
    network = Network(p, nn.ReLU()).train()
    assert torch.equal(network(torch.randn(5, 16)), network.linear2.bias.expand(5, 16))


def test_feed_forward_is_fused(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = count(monkeypatch, "_clear_where_not_positive")
    network, x = Network(0.1, nn.ReLU()), torch.randn(5, 16)
    compute(network, x, True)
    assert not calls, "too small to be worth it"
    monkeypatch.setattr(fused, "_LEAST", 0)
    compute(network, x, True)
    assert calls
    del calls[:]
    compute(Network(0.1, nn.PReLU()), x, True)
    with torch.autocast("cpu", torch.bfloat16):
        compute(network, x, True)
    hook = network.linear1.register_forward_hook(lambda *_: None)
    compute(network, x, True)
    hook.remove()
    network.linear2.register_full_backward_pre_hook(lambda *_: None)
    compute(network, x, True)
    assert not calls
