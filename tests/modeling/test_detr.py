"""What is DETR's own: its ablations as settings, construction without a configuration, its post-processing."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import tiny
import torch
from detectron2.modeling import build_model
from torch import nn

from detr_family.layers.position_encoding import SinePositionEncoding
from detr_family.modeling.criterion import SetCriterion, SoftmaxClassLoss
from detr_family.modeling.detr import DETR, Transformer
from detr_family.modeling.matcher import HungarianMatcher, softmax_class_cost
from detr_family.modeling.postprocessing import best_class_per_query


def detr(**keys: Any) -> DETR:
    cfg = tiny.cfg_of("DETR")
    for key, value in keys.items():
        cfg.merge_from_list([f"MODEL.DETR.{key.replace('__', '.')}", value])
    torch.manual_seed(11)
    model = build_model(cfg)
    assert isinstance(model, DETR)
    return model


def logits(model: DETR) -> torch.Tensor:
    with torch.no_grad():
        return model.eval().predict(model.preprocess_image(tiny.batch())).logits


def test_every_choice_of_table_3_trains_and_differs() -> None:
    """The same weights under another encoding are another function, for each of the paper's choices."""
    state = detr().state_dict()
    results = {}
    for encoder, decoder, query in itertools.product(
        ("attention", "input", "none"), ("attention", "input", "none"), ("attention", "input")
    ):
        model = detr(SPATIAL_ENCODING__ENCODER=encoder, SPATIAL_ENCODING__DECODER=decoder, QUERY_ENCODING=query)
        model.load_state_dict(state)
        assert torch.isfinite(sum(model.train()(tiny.batch()).values()))
        results[encoder, decoder, query] = logits(model)
    for a, b in itertools.combinations(results, 2):
        assert not torch.allclose(results[a], results[b], atol=1e-5), (a, b)


def permuted(transformer: Transformer, where: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Decoded queries for tokens in two orders; the encodings stay with the places."""
    torch.manual_seed(1)
    tokens, position, queries = torch.randn(2, 9, 16), torch.randn(2, 9, 16), torch.randn(7, 16)
    order = torch.randperm(9)
    with torch.no_grad():
        a = transformer(tokens, position=position, padding=None, queries=queries)
        b = transformer(tokens[:, order], position=position, padding=None, queries=queries)
    return a, b


@pytest.mark.parametrize(("where", "blind"), [("none", True), ("attention", False), ("input", False)])
def test_without_a_spatial_encoding_the_order_of_tokens_does_not_matter(where: str, blind: bool) -> None:
    for encoder, decoder in ((where, "none"), ("none", where)):
        model = detr(SPATIAL_ENCODING__ENCODER=encoder, SPATIAL_ENCODING__DECODER=decoder).eval()
        a, b = permuted(model.transformer, where)
        assert torch.allclose(a, b, atol=1e-5) == blind, (encoder, decoder)


def test_learned_encoding_is_trained() -> None:
    model = detr(SPATIAL_ENCODING__TYPE="learned").train()
    sum(model(tiny.batch()).values()).backward()
    used = model.position_encoding.col_embed.weight.grad.abs().sum(1) > 0
    assert used.tolist() == [True] * 6 + [False] * 44  # the batch is six tokens wide


def test_pre_norm_has_the_encoders_last_norm_and_another_function() -> None:
    pre, post = detr(PRE_NORM=True), detr()
    assert set(pre.state_dict()) - set(post.state_dict()) == {
        "transformer.encoder.norm.weight",
        "transformer.encoder.norm.bias",
    }
    assert torch.isfinite(sum(pre.train()(tiny.batch()).values()))
    assert not torch.allclose(logits(pre), logits(post), atol=1e-3)


def test_loss_terms_and_matching_costs_are_switched_off_separately() -> None:
    losses = detr(LOSS__L1=0.0).train()(tiny.batch())
    assert losses["loss_bbox"].item() == 0 and losses["loss_giou"].item() > 0
    full = detr().train()(tiny.batch())
    assert losses["loss_giou"].item() == pytest.approx(full["loss_giou"].item())  # the matching is the same
    other = detr(COST__L1=0.0, COST__GIOU=0.0).train()(tiny.batch())
    assert other["loss_bbox"].item() > full["loss_bbox"].item()


@pytest.mark.parametrize(
    ("key", "value", "names"),
    [
        ("SPATIAL_ENCODING__TYPE", "cosine", "SPATIAL_ENCODING.TYPE is 'cosine'"),
        ("SPATIAL_ENCODING__ENCODER", "output", "SPATIAL_ENCODING.ENCODER is 'output'"),
        ("SPATIAL_ENCODING__DECODER", "", "SPATIAL_ENCODING.DECODER is ''"),
        ("QUERY_ENCODING", "none", "QUERY_ENCODING is 'none'"),
        ("NUM_HEADS", 3, "HIDDEN_DIM 16 is no multiple of MODEL.DETR.NUM_HEADS 3"),
        ("HIDDEN_DIM", 18, "multiples of 4"),
        ("DEC_LAYERS", 0, "DEC_LAYERS 0"),
        ("NUM_QUERIES", 0, "NUM_QUERIES"),
        ("NUM_CLASSES", 0, "NUM_CLASSES is 0"),
    ],
)
def test_settings_that_cannot_be_are_named(key: str, value: Any, names: str) -> None:
    with pytest.raises(ValueError) as error:
        detr(**{key: value})
    assert names in str(error.value)


def test_plain_keyword_arguments_build_it_without_a_configuration() -> None:
    model = DETR(
        backbone=tiny.PatchBackbone(),
        transformer=Transformer(
            dim=16,
            num_heads=2,
            encoder_layers=1,
            decoder_layers=2,
            feedforward_dim=24,
            dropout=0.0,
            pre_norm=False,
            encoder_position="attention",
            decoder_position="attention",
            query_position="attention",
        ),
        position_encoding=SinePositionEncoding(16, temperature_x=10000.0, temperature_y=10000.0),
        num_classes=3,
        num_queries=7,
        aux_loss=True,
        matcher=HungarianMatcher(class_cost=softmax_class_cost, cost_class=1.0, cost_l1=5.0, cost_giou=2.0),
        criterion=SetCriterion(
            class_loss=SoftmaxClassLoss(no_object_weight=0.1),
            background=3,
            weight_class=1.0,
            weight_l1=5.0,
            weight_giou=2.0,
        ),
        topk=5,
        pixel_mean=[120.0, 110.0, 100.0],
        pixel_std=[60.0, 57.0, 55.0],
    )
    model.load_state_dict(detr().state_dict())
    assert torch.equal(logits(model), logits(detr()))
    assert len(model.eval()(tiny.batch())[0]["instances"]) <= 5


def test_initial_values_are_the_papers() -> None:
    model = detr(HIDDEN_DIM=64)
    weight = model.transformer.decoder.layers[1].linear1.weight  # Xavier: uniform within +-sqrt(6 / (in + out))
    bound = (6 / sum(weight.shape)) ** 0.5
    assert 0.9 * bound < weight.abs().max() <= bound
    assert isinstance(model.transformer.decoder.norm, nn.LayerNorm) and model.transformer.encoder.norm is None


def test_best_class_per_query_leaves_no_object_out() -> None:
    values = torch.log(torch.tensor([[[0.1, 0.2, 0.7], [0.5, 0.1, 0.4], [0.25, 0.3, 0.45]]]))
    boxes = torch.arange(12.0).view(1, 3, 4)
    scores, classes, chosen = best_class_per_query(values, boxes, topk=2)
    torch.testing.assert_close(scores, torch.tensor([[0.5, 0.3]]))
    assert classes.tolist() == [[0, 1]] and chosen.tolist() == [boxes[0, [1, 2]].tolist()]
    assert best_class_per_query(values, boxes, topk=100)[0].shape == (1, 3)


def test_dropout_is_applied_only_in_training() -> None:
    model = detr(DROPOUT=0.5)
    assert torch.equal(logits(model), logits(model))
    model.train()
    a, b = (model.predict(model.preprocess_image(tiny.batch())).logits for _ in range(2))
    assert not torch.allclose(a, b, atol=1e-3)


@pytest.mark.parametrize("training", [True, False])
def test_attention_goes_through_scaled_dot_product_attention(training: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model = detr(ENC_LAYERS=1, DEC_LAYERS=2).train(training)
    calls = []
    original = torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(
        torch.nn.functional,
        "scaled_dot_product_attention",
        lambda *args, **kwargs: calls.append(args) or original(*args, **kwargs),
    )
    model.predict(model.preprocess_image(tiny.batch()))
    assert len(calls) == 1 + 2 * 2  # encoder; self- and cross-attention of two decoder layers
