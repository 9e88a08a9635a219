"""Weights recomputed from hooks give the layers' own outputs, and nothing is left behind."""

from __future__ import annotations

import pytest
import tiny
import torch
from torch import nn

from detr_family.analysis.attention_weights import CROSS, ENCODER, DenseCall, SamplingCall, watch, watch_outputs
from detr_family.layers.attention import ProjectedAttention
from detr_family.layers.deformable_attention import MSDeformAttn


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def padding() -> torch.Tensor:
    mask = torch.zeros(2, 5, dtype=torch.bool)
    mask[1, 3:] = True
    return mask


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("kdim", [None, 12])
@torch.no_grad()
def test_multihead_attention(batch_first: bool, kdim: int | None) -> None:
    torch.manual_seed(0)
    layer = nn.MultiheadAttention(8, 2, batch_first=batch_first, kdim=kdim, vdim=kdim).eval()
    nn.init.normal_(layer.in_proj_bias)
    q, k, v = random(2, 3, 8), random(2, 5, kdim or 8, seed=1), random(2, 5, kdim or 8, seed=2)
    blocked = torch.zeros(3, 5, dtype=torch.bool)
    blocked[0, :2] = True
    inputs = [x if batch_first else x.transpose(0, 1) for x in (q, k, v)]
    with watch(layer) as calls:
        out, weights = layer(*inputs, key_padding_mask=padding(), attn_mask=blocked, average_attn_weights=False)
    out = out if batch_first else out.transpose(0, 1)
    torch.testing.assert_close(calls[0].weights(), weights)
    torch.testing.assert_close(calls[0].output(), out)
    assert (calls[0].weights()[1, ..., 3:] == 0).all() and (calls[0].weights()[:, :, 0, :2] == 0).all()


@torch.no_grad()
def test_multihead_attention_with_a_mask_for_each_head() -> None:
    torch.manual_seed(0)
    layer = nn.MultiheadAttention(8, 2, batch_first=True).eval()
    q, k = random(2, 3, 8), random(2, 5, 8, seed=1)
    added = random(4, 3, 5, seed=2)
    with watch(layer) as calls:
        out, weights = layer(q, k, k, attn_mask=added, average_attn_weights=False)
    torch.testing.assert_close(calls[0].weights(), weights)
    torch.testing.assert_close(calls[0].output(), out)


@torch.no_grad()
def test_projected_attention_and_its_positional_half() -> None:
    torch.manual_seed(0)
    layer = ProjectedAttention(8, 2, 0.0).eval()
    q, k, v = random(2, 3, 16), random(2, 5, 16, seed=1), random(2, 5, 8, seed=2)
    blocked = torch.zeros(3, 5, dtype=torch.bool)
    blocked[2, 4] = True
    with watch(layer) as calls:
        out = layer(q, k, v, padding=padding(), blocked=blocked)
    torch.testing.assert_close(calls[0].output(), out)
    # With contents of zero the whole of attention is positional.
    heads = q.unflatten(-1, (2, 2, 4)).clone()
    heads[:, :, :, 0] = 0
    with watch(layer) as alone:
        layer(heads.flatten(2), k, v, padding=padding(), blocked=blocked)
    torch.testing.assert_close(calls[0].positional_weights(), alone[0].weights())
    assert not torch.allclose(calls[0].positional_weights(), calls[0].weights(), atol=1e-2)


@pytest.mark.parametrize("coordinates", [2, 4])
@torch.no_grad()
def test_deformable_attention(coordinates: int) -> None:
    torch.manual_seed(0)
    layer = MSDeformAttn(embed_dim=8, num_heads=2, num_levels=3, num_points=5).eval()
    for part in (layer.sampling_offsets, layer.attention_weights):
        nn.init.normal_(part.weight, std=0.2)
    shapes = torch.tensor([[4, 6], [2, 3], [1, 2]])
    tokens = random(2, 32, 8)
    mask = torch.zeros(2, 32, dtype=torch.bool)
    mask[1, 20:24] = True
    reference = torch.rand(2, 7, 3, coordinates, generator=torch.Generator().manual_seed(3))
    with watch(layer) as calls:
        out = layer(random(2, 7, 8, seed=1), reference, tokens, shapes, torch.tensor([0, 24, 30]), mask)
    call = calls[0]
    assert isinstance(call, SamplingCall)
    torch.testing.assert_close(call.output(), out)
    torch.testing.assert_close(call.weights.sum((-1, -2)), torch.ones(2, 7, 2))
    assert call.locations.shape == (2, 7, 2, 3, 5, 2) and call.spatial_shapes == [(4, 6), (2, 3), (1, 2)]


@pytest.mark.parametrize("name", tiny.DETECTORS)
@torch.no_grad()
def test_every_attention_of_every_detector(name: str) -> None:
    model = tiny.build(name).eval()
    images = model.preprocess_image(tiny.batch())  # two sizes: padding counts
    kinds = (nn.MultiheadAttention, ProjectedAttention, MSDeformAttn)
    layers = {n: m for n, m in model.named_modules() if isinstance(m, kinds)}
    outputs = {}
    handles = [
        m.register_forward_hook(lambda _, __, out, n=n: outputs.update({n: out[0] if isinstance(out, tuple) else out}))
        for n, m in layers.items()
    ]
    with watch(model) as calls:
        model.predict(images)
    for handle in handles:
        handle.remove()
    assert {call.name for call in calls} == set(layers) and len(calls) == len(layers)
    valid = 6  # tokens of the first image that are not padding, at least
    for call in calls:
        expected = outputs[call.name]
        rows = slice(None) if "decoder" in call.name else slice(valid)
        torch.testing.assert_close(call.output()[:, rows], expected[:, rows], atol=2e-6, rtol=1e-4)


@pytest.mark.parametrize("name", tiny.DETECTORS)
@torch.no_grad()
def test_looking_changes_nothing_and_leaves_nothing(name: str) -> None:
    model = tiny.build(name).eval()
    images = model.preprocess_image(tiny.batch())
    before = model.predict(images)
    with watch(model, f"{ENCODER}|{CROSS}") as calls, watch_outputs(model.position_encoding) as positions:
        watched = model.predict(images)
    seen = len(calls)
    after = model.predict(images)
    assert torch.equal(before.layer_logits, watched.layer_logits) and torch.equal(before.layer_boxes, after.layer_boxes)
    assert seen == 3 == len(calls) and positions  # one encoder layer and two decoder layers, and no call after
    assert all(not m._forward_pre_hooks and not m._forward_hooks for m in model.modules())
    assert [isinstance(call, (DenseCall, SamplingCall)) for call in calls] == [True] * 3


def test_hooks_go_when_the_model_fails() -> None:
    layer = ProjectedAttention(8, 2, 0.0)
    with pytest.raises(RuntimeError), watch(layer):
        layer(torch.zeros(1, 2, 8), torch.zeros(1, 3, 7), torch.zeros(1, 3, 8))
    assert not layer._forward_pre_hooks
