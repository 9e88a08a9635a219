"""What is DINO's own: contrastive denoising, query selection, look forward twice, levels; each as a setting."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from detectron2.modeling import build_model
from torch import Tensor

from detr_family.checkpoint import DETRCheckpointer
from detr_family.modeling import denoising
from detr_family.modeling.denoising import DenoisingGroups, contrastive_groups, noise_corners
from detr_family.modeling.dino import DINO, DINOPrediction
from detr_family.modeling.structures import Targets

DRAWS = 100_000
QUERIES = 7


def dino(detr: dict[str, Any] | None = None, **keys: Any) -> DINO:
    cfg = tiny.cfg_of("DINO")
    for node, values in ((cfg.MODEL.DINO, keys), (cfg.MODEL.DETR, detr or {})):
        for key, value in values.items():
            node[key] = value
    torch.manual_seed(11)
    model = build_model(cfg)
    assert isinstance(model, DINO)
    return model


def predict(model: DINO, inputs: list[dict[str, Any]]) -> DINOPrediction:
    model.generator = torch.Generator().manual_seed(3)
    return model.predict(model.preprocess_image(inputs), model.targets(inputs))


def truth(*counts: int, seed: int = 0) -> Targets:
    g = torch.Generator().manual_seed(seed)
    total = sum(counts)
    centres, sizes = torch.rand(2, total, 2, generator=g)
    return Targets(
        labels=torch.randint(5, (total,), generator=g),
        boxes_cxcywh=torch.cat([0.3 + 0.4 * centres, 0.1 + 0.2 * sizes], 1),
        image=torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts)),
        counts=list(counts),
    )


def groups_of(targets: Targets, *, groups: int = 2, most: int = 1000, box: float = 1.0, **more: Any) -> DenoisingGroups:
    arguments = {"label_noise": 0.0, "drop_inverted": False, "generator": torch.Generator().manual_seed(1), **more}
    return contrastive_groups(
        targets, num_classes=5, num_queries=QUERIES, num_groups=groups, max_queries=most, box_noise=box, eps=1e-3,
        **arguments,
    )  # fmt: skip


# Contrastive denoising (section 3.3)


@pytest.mark.parametrize("scale", [1.0, 0.4])
def test_positives_lie_inside_and_negatives_between_the_two_scales(scale: float) -> None:
    """Each corner coordinate moves evenly within lambda_1, or between lambda_1 and lambda_2 = 2 lambda_1."""
    box = torch.tensor([0.5, 0.45, 0.2, 0.1])
    corners = torch.tensor([0.4, 0.4, 0.6, 0.5])
    farther = torch.arange(2 * DRAWS) >= DRAWS
    noised = noise_corners(box.expand(2 * DRAWS, 4), scale, farther, torch.Generator().manual_seed(1))
    moved = torch.cat([noised[:, :2] - noised[:, 2:] / 2, noised[:, :2] + noised[:, 2:] / 2], 1) - corners
    steps = moved / (scale * torch.tensor([0.1, 0.05, 0.1, 0.05]))  # in half widths and heights times lambda_1
    positive, negative = steps[:DRAWS], steps[DRAWS:]
    assert positive.abs().max() < 1 + 1e-4 and (positive.abs().amax(0) > 0.999).all()
    assert negative.abs().min() > 1 - 1e-4 and negative.abs().max() < 2 + 1e-4
    assert (negative.abs().amin(0) < 1.001).all() and (negative.abs().amax(0) > 1.999).all()
    for steps_of, mean in ((positive, 0.5), (negative, 1.5)):
        assert steps_of.mean(0).abs().max() < 5 * mean / DRAWS**0.5 * 1.2  # both ways alike
        torch.testing.assert_close(steps_of.abs().mean(0), torch.full((4,), mean), rtol=0, atol=0.005)
        torch.testing.assert_close(steps_of.abs().var(0), torch.full((4,), 1 / 12), rtol=0.02, atol=0)
        assert torch.corrcoef(steps_of.T).fill_diagonal_(0).abs().max() < 0.02  # drawn apart


def test_noised_corners_stay_in_the_image() -> None:
    noised = noise_corners(
        torch.tensor([0.05, 0.9, 0.1, 0.2]).expand(1000, 4), 1.0, torch.ones(1000, dtype=torch.bool),
        torch.Generator().manual_seed(1),
    )  # fmt: skip
    low, high = noised[:, :2] - noised[:, 2:] / 2, noised[:, :2] + noised[:, 2:] / 2
    assert min(low.min(), high.min()) > -1e-6 and max(low.max(), high.max()) < 1 + 1e-6


def test_a_quarter_of_negatives_is_inverted_along_an_axis_and_may_be_left_out() -> None:
    targets = truth(DRAWS // 100)
    kept, dropped = (groups_of(targets, groups=20, most=10**6, drop_inverted=x) for x in (False, True))
    assert not kept.padding.any()
    left_out = dropped.padding.view(20, 2, -1)
    assert not left_out[:, 0].any()  # no positive
    # Both corners move inwards by 1 to 2 half widths: an axis is always inverted then, with probability 1 / 4.
    assert left_out[:, 1].float().mean().item() == pytest.approx(1 - (3 / 4) ** 2, abs=0.02)
    assert (dropped.anchors[dropped.padding] == 0).all() and (dropped.labels[dropped.padding] == 0).all()
    assert torch.equal(dropped.anchors[~dropped.padding], kept.anchors[~dropped.padding])
    sizes = kept.anchors[dropped.padding].sigmoid()[:, 2:].amin(1)
    assert (sizes < 1.1e-3).all()  # the release keeps them, as small as its inverse sigmoid allows


def test_every_group_has_each_box_as_a_positive_and_as_a_negative() -> None:
    targets = truth(3, 1)
    groups = groups_of(targets, box=0.0)
    assert len(groups) == 2 * 2 * 3 and groups.num_groups == 2
    first = groups.anchors[0].sigmoid().view(2, 2, 3, 4)
    torch.testing.assert_close(first, targets.boxes_cxcywh[:3].expand(2, 2, 3, 4), rtol=1e-4, atol=1e-5)
    assert torch.equal(groups.labels[0].view(4, 3), targets.labels[:3].expand(4, 3))
    assert groups.padding[1].view(4, 3).tolist() == [[False, True, True]] * 4
    assert (groups.anchors[1][groups.padding[1]] == 0).all()
    # Known are the positives alone.
    query, target = groups.known.query[0], groups.known.target[0]
    assert sorted(query[target < 3].tolist()) == [0, 1, 2, 6, 7, 8] and query[target == 3].tolist() == [0, 6]
    assert torch.equal(groups.labels[targets.image[target], query], targets.labels[target])


def test_groups_do_not_see_each_other_nor_the_matching_part_any_of_them() -> None:
    blocked = groups_of(truth(3)).blocked
    assert blocked.shape == (12 + QUERIES, 12 + QUERIES)
    assert blocked[:6, 6:12].all() and blocked[6:12, :6].all() and not blocked[:6, :6].any()
    assert blocked[12:, :12].all() and not blocked[:, 12:].any()


def test_the_matching_part_does_not_see_the_denoising_part_by_a_bit() -> None:
    model = dino().train()
    with torch.no_grad():
        for p in model.bbox_embed.parameters():
            p.add_(0.1 * torch.randn_like(p))
    inputs = tiny.batch()
    sets = []
    for seed in (1, 2):
        model.generator = torch.Generator().manual_seed(seed)
        prediction = model.predict(model.preprocess_image(inputs), model.targets(inputs))
        sets.append(prediction)
    assert not torch.equal(sets[0].denoised.layer_boxes, sets[1].denoised.layer_boxes)
    assert torch.equal(sets[0].layer_boxes, sets[1].layer_boxes)
    assert torch.equal(sets[0].layer_logits, sets[1].layer_logits)


def test_number_of_groups_and_a_bound_on_the_queries(caplog: pytest.LogCaptureFixture) -> None:
    model = dino(DN_PAIRS=100, DN_MAX_QUERIES=200).train()
    for most, groups in ((1, 100), (3, 33), (40, 2), (51, 1), (100, 1)):
        made = model.make_groups(truth(most, 1))
        assert made.num_groups == groups and len(made) == 2 * groups * most
    denoising._said = False
    crowded = model.make_groups(truth(1000, 2))
    assert len(crowded) == 200 and "random choice" in caplog.text
    assert len(dino(DN_PAIRS=100, DN_MAX_QUERIES=60).make_groups(truth(4))) == 2 * 7 * 4  # whole boxes, fewer groups
    plain = dino(DENOISING="dn", DN_PAIRS=100, DN_MAX_QUERIES=200).make_groups(truth(3))
    assert plain.num_groups == 33 and len(plain) == 99


def test_a_crowded_image_trains() -> None:
    inputs = [tiny.image(64, 96, 1000, seed=1)]
    losses = dino(DN_PAIRS=9, DN_MAX_QUERIES=24).train()(inputs)
    assert torch.isfinite(sum(losses.values()))


def test_negatives_and_padding_are_background_of_the_denoising_loss() -> None:
    """loss_ce_dn is the focal loss of all R queries, by the number of boxes times that of groups (binary, by hand)."""
    model = dino(LABEL_NOISE=0.0).train()
    inputs = tiny.batch()
    targets = model.targets(inputs)
    prediction = predict(model, inputs)
    losses = model.losses(prediction, targets)
    groups = prediction.groups
    wanted = torch.zeros_like(prediction.denoised.logits)
    query, target = groups.known.query[0], groups.known.target[0]
    wanted[targets.image[target], query, targets.labels[target]] = 1
    p = prediction.denoised.logits.sigmoid()
    focal = -(wanted * 0.25 * (1 - p) ** 2 * p.log() + (1 - wanted) * 0.75 * p**2 * (1 - p).log()).sum()
    assert (wanted.sum(-1) == 0).sum() > wanted.sum() > 0
    assert losses["loss_ce_dn"].item() == pytest.approx(focal.item() / (5 * groups.num_groups), rel=1e-4)


def test_losses_of_all_parts() -> None:
    terms = ("loss_ce", "loss_bbox", "loss_giou")
    names = {term + part for term in terms for part in ("", "_0", "_dn", "_dn_0", "_interm")}
    assert dino().train()(tiny.batch()).keys() == names
    assert dino(detr={"AUX_LOSS": False}).train()(tiny.batch()).keys() == {x for x in names if not x.endswith("_0")}
    without = dino(DENOISING="none").train()(tiny.batch())
    assert without.keys() == {x for x in names if "_dn" not in x}
    assert dino(QUERY_SELECTION="none").train()(tiny.batch()).keys() == {x for x in names if "interm" not in x}


def test_nothing_is_denoised_at_inference() -> None:
    model = dino().eval()
    with torch.no_grad():
        prediction = predict(model, tiny.batch())
    assert prediction.denoised is None and prediction.logits.shape[1] == QUERIES


# Query selection (section 3.4)


def starts(model: DINO, inputs: list[dict[str, Any]]) -> tuple[Tensor, Tensor]:
    """What the decoder starts from: content (B, Q, D) and anchors (B, Q, 4)."""
    seen: dict[str, Tensor] = {}

    def look(module: Any, args: tuple[Tensor, ...], kwargs: dict[str, Any]) -> None:
        seen.update(content=args[0], anchors=kwargs["anchors"])

    handle = model.transformer.decoder.register_forward_pre_hook(look, with_kwargs=True)
    with torch.no_grad():
        model.eval().predict(model.preprocess_image(inputs))
    handle.remove()
    return seen["content"], seen["anchors"]


@pytest.mark.parametrize(
    ("selection", "content_is_learned", "anchors_are_learned"),
    [("none", True, True), ("mixed", True, False), ("pure", False, False)],
)
def test_where_queries_come_from(selection: str, content_is_learned: bool, anchors_are_learned: bool) -> None:
    model = dino(QUERY_SELECTION=selection)
    content, anchors = starts(model, tiny.batch())
    assert content.shape == (2, QUERIES, 16) and anchors.shape == (2, QUERIES, 4)
    assert torch.equal(content[0], content[1]) == content_is_learned
    assert torch.equal(anchors[0], anchors[1]) == anchors_are_learned
    assert (model.transformer.tgt_embed is not None) == content_is_learned
    assert (model.transformer.refpoint_embed is not None) == anchors_are_learned


def test_the_chosen_tokens_have_the_best_class_scores() -> None:
    model = dino().train()
    scored: list[Tensor] = []
    model.transformer.enc_out_class_embed.register_forward_hook(lambda *args: scored.append(args[2].amax(-1)))
    prediction = predict(model, [tiny.image(64, 96, 2, seed=1)])  # no token of it is at the very edge
    everything, chosen = scored
    assert everything.shape[1] == 24 + 6 + 2 and chosen.shape[1] == QUERIES
    torch.testing.assert_close(chosen, everything.topk(QUERIES).values)
    prediction.proposals.layer_boxes[..., 0].sum().backward()
    assert model.transformer.enc_out_bbox_embed.layers[-1].weight.grad.any()


def test_the_decoder_does_not_train_the_encoders_proposals() -> None:
    """Anchors are detached: only loss_*_interm reaches the encoder's heads."""
    model = dino().train()
    predict(model, tiny.batch()).layer_boxes.sum().backward()
    assert model.transformer.enc_out_bbox_embed.layers[0].weight.grad is None


@pytest.mark.parametrize("ignore", [True, False])
def test_padded_tokens_are_never_read(ignore: bool) -> None:
    """However good their score: what a query is made from does not change with the memory of the padding."""
    model = dino(IGNORE_PADDING=ignore).eval()
    images = model.preprocess_image([tiny.image(64, 96, 0, seed=1), tiny.image(128, 160, 0, seed=2)])
    seen: list[Any] = []
    model.transformer.encoder.register_forward_hook(
        lambda *args: seen.append((args[2]["levels"], args[3])), with_kwargs=True
    )
    with torch.no_grad():
        model.predict(images)
        levels, memory = seen[0]
        assert levels.padding[0].any()
        loud = memory + 100 * torch.randn_like(memory) * levels.padding[..., None]
        features, boxes = model.transformer.select(memory, levels)
        again = model.transformer.select(loud, levels)
    assert torch.equal(features, again[0]) and torch.equal(boxes, again[1])
    if ignore:
        assert torch.isfinite(boxes).all()


@pytest.mark.parametrize("selection", ["none", "pure", "mixed"])
@pytest.mark.parametrize("ignore", [True, False])
def test_fewer_tokens_than_queries(selection: str, ignore: bool) -> None:
    model = dino(QUERY_SELECTION=selection, NUM_LEVELS=1, IGNORE_PADDING=ignore).train()
    inputs = [tiny.image(16, 32, 1, seed=1), tiny.image(48, 80, 2, seed=2)]  # 2 tokens and 15
    losses = model(inputs)
    total = sum(losses.values())
    total.backward()
    assert torch.isfinite(total) and all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)
    model.eval()
    with torch.no_grad():
        alone = model.predict(model.preprocess_image(inputs[:1]))
        padded = model.predict(model.preprocess_image(inputs))
        assert len(model(inputs[:1])[0]["instances"]) > 0
    assert alone.boxes.shape == (1, QUERIES, 4) and torch.isfinite(padded.boxes).all()
    if ignore:
        torch.testing.assert_close(alone.boxes[0], padded.boxes[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("size", [(1, 1), (7, 3), (17, 200)])
def test_tiny_images(size: tuple[int, int]) -> None:
    model = dino().eval()
    with torch.no_grad():
        inputs = [tiny.image(max(size[0], 16), max(size[1], 16), 0, seed=1)]
        assert torch.isfinite(model.predict(model.preprocess_image(inputs)).boxes).all()


# Look forward twice (section 3.5)


@pytest.mark.parametrize("twice", [True, False])
def test_a_layers_box_loss_reaches_the_layer_before_only_when_looking_forward_twice(twice: bool) -> None:
    model = dino(LOOK_FORWARD_TWICE=twice, SHARE_HEADS=False).train()
    with torch.no_grad():
        for p in model.bbox_embed.parameters():
            p.add_(0.1 * torch.randn_like(p))
    prediction = predict(model, tiny.batch())
    prediction.boxes.sum().backward()
    first, last = model.bbox_embed[0], model.bbox_embed[1]
    assert last.layers[0].weight.grad.any()
    assert (first.layers[0].weight.grad is not None and bool(first.layers[0].weight.grad.any())) == twice


def test_looking_forward_changes_gradients_and_not_predictions() -> None:
    once, twice = (predict(dino(LOOK_FORWARD_TWICE=x).eval(), tiny.batch()) for x in (False, True))
    assert torch.equal(once.layer_boxes, twice.layer_boxes) and torch.equal(once.layer_logits, twice.layer_logits)


# Settings


@pytest.mark.parametrize("shared", [True, False])
def test_heads_are_shared_or_not_under_the_releases_names(shared: bool) -> None:
    model = dino(SHARE_HEADS=shared)
    names = {f"{a}class_embed.{i}.bias" for a in ("", "transformer.decoder.") for i in (0, 1)}
    assert names <= model.state_dict().keys()
    assert (model.class_embed[0] is model.class_embed[1]) == (model.bbox_embed[0] is model.bbox_embed[1]) == shared
    assert model.transformer.enc_out_bbox_embed is not model.bbox_embed[0]
    assert model.label_enc.weight.shape == (tiny.NUM_CLASSES + 1, 16)


@pytest.mark.parametrize(
    "keys",
    [
        {"NUM_LEVELS": 1},
        {"NUM_LEVELS": 2},
        {"NUM_LEVELS": 4},
        {"ENC_POINTS": 1, "DEC_POINTS": 3},
        {"QUERY_SELECTION": "none"},
        {"QUERY_SELECTION": "pure"},
        {"LOOK_FORWARD_TWICE": False},
        {"SHARE_HEADS": False},
        {"DENOISING": "none"},
        {"DENOISING": "dn"},
        {"DN_DROP_INVERTED": True},
        {"IGNORE_PADDING": False},
    ],
    ids=str,
)
def test_every_setting_builds_trains_and_reloads(keys: dict[str, Any], tmp_path: Path) -> None:
    model = dino(**keys).train()
    total = sum(model(tiny.batch()).values())
    total.backward()
    assert torch.isfinite(total) and not [k for k, p in model.named_parameters() if p.requires_grad and p.grad is None]
    DETRCheckpointer(model, str(tmp_path)).save("model")
    other = dino(**keys)
    with torch.no_grad():
        for p in other.parameters():
            p.add_(1)
    DETRCheckpointer(other).load(str(tmp_path / "model.pth"))
    with torch.no_grad():
        a, b = (x.eval().predict(x.preprocess_image(tiny.batch())) for x in (model, other))
    assert torch.equal(a.layer_boxes, b.layer_boxes)


@pytest.mark.parametrize(
    ("keys", "named"),
    [
        ({"QUERY_SELECTION": "best"}, "QUERY_SELECTION is 'best'; it may be one of none, pure, mixed"),
        ({"DENOISING": "yes"}, "DENOISING is 'yes'; it may be one of none, dn, contrastive"),
        ({"NUM_LEVELS": 0}, "NUM_LEVELS 0"),
        ({"ENC_POINTS": 0}, "ENC_POINTS 0"),
        ({"DN_PAIRS": 0}, "DN_PAIRS is 0"),
        ({"DN_MAX_QUERIES": 1}, "DN_MAX_QUERIES is 1"),
        ({"LABEL_NOISE": 2.5}, "LABEL_NOISE is 2.5"),
        ({"BOX_NOISE": -0.1}, "BOX_NOISE is -0.1"),
    ],
    ids=str,
)
def test_a_setting_that_cannot_be_is_named(keys: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        dino(**keys)


def test_boxes_start_where_the_encoder_proposes_them() -> None:
    model = dino().train()
    prediction = predict(model, tiny.batch())
    for boxes in prediction.layer_boxes.unbind(0):
        torch.testing.assert_close(boxes, prediction.proposals.boxes.detach(), rtol=1e-3, atol=1e-4)
    sizes = prediction.proposals.boxes[..., 2].detach()
    assert all(min(abs(float(x) - 0.05 * 2**i) for i in range(3)) < 1e-4 for x in sizes.flatten())
