"""The parts that DINO and Deformable DETR share."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from detr_family.modeling.deformable import (
    DeformableDecoderLayer,
    DeformableEncoder,
    DeformableEncoderLayer,
    LevelProjections,
    Levels,
    MaskedGroupNorm,
    best_tokens,
    flatten_levels,
    init_transformer,
    level_position,
    take_tokens,
)

SIZES = [(8, 12), (4, 6), (2, 3)]


def masks(valid: tuple[tuple[int, int], ...]) -> list[Tensor]:
    """Masks of SIZES where each image fills (height, width) tokens of the finest level."""
    result = []
    for i, (height, width) in enumerate(SIZES):
        mask = torch.ones(len(valid), height, width, dtype=torch.bool)
        for x, (h, w) in zip(mask, valid, strict=True):
            x[: -(-h // 2**i), : -(-w // 2**i)] = False
        result.append(mask)
    return result


def test_levels_know_where_their_tokens_lie() -> None:
    levels = Levels.from_masks(masks(((8, 12), (4, 6))), padded=True)
    assert levels.shapes == SIZES and levels.starts == [0, 96, 120]
    torch.testing.assert_close(levels.valid_ratios[0], torch.ones(3, 2))
    torch.testing.assert_close(levels.valid_ratios[1, :2], torch.tensor([[0.5, 0.5], [0.5, 0.5]]))
    torch.testing.assert_close(levels.valid_ratios[1, 2], torch.tensor([2 / 3, 0.5]))
    assert levels.padding.shape == (2, 126) and levels.padding.sum(1).tolist() == [0, 96 - 24 + 24 - 6 + 6 - 2]
    # Token (row 1, column 2) of the middle level: x first.
    torch.testing.assert_close(levels.centres[0, 96 + 6 + 2], torch.tensor([2.5 / 6, 1.5 / 4]))
    torch.testing.assert_close(levels.centres[1, 96 + 6 + 2], torch.tensor([2.5 / 3, 1.5 / 2]))
    assert Levels.from_masks(masks(((8, 12),)), padded=False).padding is None


def test_references_are_scaled_to_what_a_image_fills_of_each_level() -> None:
    levels = Levels.from_masks(masks(((8, 12), (4, 6))), padded=True)
    boxes = torch.tensor([[[0.4, 0.8, 0.2, 0.6]], [[0.4, 0.8, 0.2, 0.6]]])
    on_levels = levels.on_levels(boxes)
    assert on_levels.shape == (2, 1, 3, 4)
    torch.testing.assert_close(on_levels[1, 0, 0], torch.tensor([0.2, 0.4, 0.1, 0.3]))
    torch.testing.assert_close(levels.on_levels(boxes[..., :2]), on_levels[..., :2])
    # A token's own centre falls on the middle of its pixel of the padded level.
    own = levels.on_levels(levels.centres)[1, 14, 0] * torch.tensor([12.0, 8.0])
    torch.testing.assert_close(own, torch.tensor([2.5, 1.5]))


def test_proposals_have_a_size_for_each_level_and_none_come_from_padding_or_the_edge() -> None:
    levels = Levels.from_masks(masks(((8, 12), (4, 6))), padded=True)
    logits, usable = levels.proposals()
    boxes = logits.sigmoid()
    for level, start in enumerate(levels.starts):
        torch.testing.assert_close(boxes[0, start + 1, 2:], torch.full((2,), 0.05 * 2**level))
    torch.testing.assert_close(boxes[usable][:, :2], levels.centres[usable])
    assert not (usable & levels.padding).any() and torch.isinf(logits[~usable]).all()
    wide = [torch.zeros(1, 1, 60, dtype=torch.bool)]  # the first and last centre are within 0.01 of the edge
    assert Levels.from_masks(wide, padded=False).proposals()[1][0].tolist() == [False] + [True] * 58 + [False]


@pytest.mark.parametrize("width", [50, 150, 250, 49, 51, 1000])
def test_a_centre_at_the_bound_is_not_within_however_quotients_are_rounded(width: int) -> None:
    levels = Levels.from_masks([torch.zeros(1, 3, width, dtype=torch.bool)], padded=False)
    within = [width < 50 * (2 * i + 1) < 99 * width for i in range(width)]
    for error in (0.0, 1.2e-7, -1.2e-7):
        moved = replace(levels, centres=levels.centres * (1 + error))
        assert moved.proposals()[1].unflatten(1, (3, width))[0, 1].tolist() == within


def test_further_levels_come_from_strided_convolutions() -> None:
    torch.manual_seed(0)
    maps = [torch.randn(2, 12, 9, 13), torch.randn(2, 20, 5, 7)]
    projections = LevelProjections([12, 20], 16, 4, ignore_padding=False)
    mask = torch.zeros(2, 72, 104, dtype=torch.bool)
    projected, level_masks = projections(maps, mask, padded=False)
    assert [tuple(x.shape) for x in projected] == [(2, 16, 9, 13), (2, 16, 5, 7), (2, 16, 3, 4), (2, 16, 2, 2)]
    assert [x.shape[1:] for x in level_masks] == [x.shape[2:] for x in projected]
    assert projections[2][0].in_channels == 20 and projections[3][0].in_channels == 16
    coarsest, _ = LevelProjections([12, 20], 16, 1, ignore_padding=False)(maps, mask, padded=False)
    assert len(coarsest) == 1 and coarsest[0].shape == (2, 16, 5, 7)


@pytest.mark.parametrize("ignored", [True, False])
def test_projections_do_not_see_padding_when_so_wished(ignored: bool) -> None:
    torch.manual_seed(0)
    projections = LevelProjections([12], 16, 3, ignore_padding=ignored)
    small = torch.randn(1, 12, 4, 8)
    large = torch.randn(1, 12, 8, 16)
    large[:, :, :4, :8] = small
    mask = torch.ones(1, 64, 128, dtype=torch.bool)
    mask[:, :32, :64] = False
    alone, _ = projections([small], torch.zeros(1, 32, 64, dtype=torch.bool), padded=False)
    padded, level_masks = projections([large], mask, padded=True)
    for a, b, m in zip(alone, padded, level_masks, strict=True):
        height, width = a.shape[-2:]
        assert (~m).sum() == height * width
        assert torch.allclose(a, b[..., :height, :width], atol=1e-5) == ignored


def test_masked_group_norm_without_padding_is_torchs() -> None:
    norm = MaskedGroupNorm(4, 12)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    x = torch.randn(2, 12, 3, 5) * 3 + 1
    torch.testing.assert_close(norm(x, torch.zeros(2, 3, 5, dtype=torch.bool)), norm(x))


def test_tokens_and_their_encodings_go_together() -> None:
    maps = [torch.randn(2, 16, *size) for size in SIZES]
    tokens = flatten_levels(maps)
    assert tokens.shape == (2, 126, 16)
    torch.testing.assert_close(tokens[1, 96 + 6 + 2], maps[1][1, :, 1, 2])
    encodings = [x.permute(0, 2, 3, 1) for x in maps]
    embed = torch.randn(3, 16)
    torch.testing.assert_close(level_position(encodings, embed)[1, 96 + 6 + 2], maps[1][1, :, 1, 2] + embed[1])


def test_the_best_usable_tokens_are_chosen() -> None:
    scores = torch.tensor([[0.1, 0.9, 0.5, 0.7], [0.4, 0.3, 0.2, 0.8]])
    usable = torch.tensor([[True, False, True, True], [True, True, True, True]])
    index, found = best_tokens(scores, usable, 2, ignore_padding=True)
    assert index.tolist() == [[3, 2], [3, 0]] and found.all()
    index, found = best_tokens(scores, usable, 6, ignore_padding=True)
    assert index[1, :4].tolist() == [3, 0, 1, 2]
    assert found.sum(1).tolist() == [3, 4] and found[0, :3].all()
    index, found = best_tokens(scores, usable, 2, ignore_padding=False)
    assert index.tolist() == [[1, 3], [3, 0]] and found.tolist() == [[False, True], [True, True]]
    x = torch.randn(2, 4, 5)
    taken = take_tokens(x, index, found, 7.0)
    assert (taken[0, 0] == 7).all() and torch.equal(taken[0, 1], x[0, 3]) and torch.equal(taken[1, 1], x[1, 0])


def encoder() -> DeformableEncoder:
    torch.manual_seed(3)
    layers = [
        DeformableEncoderLayer(16, 2, 24, 0.1, num_levels=3, num_points=2, activation=nn.ReLU()) for _ in range(2)
    ]
    stack = DeformableEncoder(layers)
    init_transformer(stack)
    return stack


def test_the_encoder_does_not_read_padding() -> None:
    levels = Levels.from_masks(masks(((4, 6),)), padded=True)
    stack = encoder().eval()
    tokens = torch.randn(1, 126, 16)
    other = torch.where(levels.padding[..., None], torch.randn_like(tokens), tokens)
    with torch.no_grad():
        a, b = (stack(x, position=torch.zeros_like(x), levels=levels) for x in (tokens, other))
    valid = ~levels.padding
    assert torch.equal(a[valid], b[valid]) and not torch.equal(a, b)


def test_a_blocked_query_is_not_seen() -> None:
    torch.manual_seed(0)
    layer = DeformableDecoderLayer(16, 2, 24, 0.0, num_levels=3, num_points=2, activation=nn.ReLU())
    levels = Levels.from_masks(masks(((8, 12),)), padded=False)
    content, memory, position = torch.randn(1, 5, 16), torch.randn(1, 126, 16), torch.randn(1, 5, 16)
    reference = levels.on_levels(torch.rand(1, 5, 4))
    blocked = torch.zeros(5, 5, dtype=torch.bool)
    blocked[3:, :3] = True
    changed = content.clone()
    changed[:, 0] += 1
    a, b = (
        layer(x, memory, position=position, reference=reference, levels=levels, blocked=blocked)
        for x in (content, changed)
    )
    moved = (a - b).abs().amax(-1)[0]
    assert (moved[:3] > 1e-4).all() and (moved[3:] < 1e-6).all()


def test_matrices_start_from_xaviers_values_and_offsets_from_their_ring() -> None:
    layer = encoder().layers[0]
    assert layer.self_attn.sampling_offsets.weight.abs().max() == 0
    assert layer.self_attn.sampling_offsets.bias.abs().max() == 2
    assert layer.linear1.weight.abs().max() <= (6 / (16 + 24)) ** 0.5


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_more_pixels_than_float16_counts_are_normalised_alike(dtype: torch.dtype) -> None:
    norm = MaskedGroupNorm(2, 16)
    x = 3 + 20 * torch.randn(1, 16, 120, 110)  # 105600 values of a group
    mask = torch.zeros(1, 120, 110, dtype=torch.bool)
    mask[:, 100:] = True
    with torch.no_grad():
        expected = norm(x, mask)
        found = norm.to(dtype)(x.to(dtype), mask)
    assert found.dtype == dtype
    assert (found.float() - expected).abs().max() < 4 * torch.finfo(dtype).eps
