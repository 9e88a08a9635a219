"""What is DN-DETR's own: denoising in training alone, a mask that keeps the truth from the matching part."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from detectron2.modeling import build_model
from fvcore.nn import FlopCountAnalysis
from torch import Tensor

from detr_family.checkpoint import DETRCheckpointer
from detr_family.checkpoint.releases import convert_released
from detr_family.modeling.denoising import DenoisingPrediction
from detr_family.modeling.dn_detr import DNDETR, denoising_content

GROUPS = 3


def dn(dab: dict[str, Any] | None = None, detr: dict[str, Any] | None = None, **keys: Any) -> DNDETR:
    cfg = tiny.cfg_of("DNDETR")
    for node, values in ((cfg.MODEL.DN, keys), (cfg.MODEL.DAB, dab or {}), (cfg.MODEL.DETR, detr or {})):
        for key, value in values.items():
            node[key] = value
    torch.manual_seed(11)
    model = build_model(cfg)
    assert isinstance(model, DNDETR)
    return model


def predict(model: DNDETR, inputs: list[dict[str, Any]]) -> DenoisingPrediction:
    model.generator = torch.Generator().manual_seed(3)
    prediction = model.predict(model.preprocess_image(inputs), model.targets(inputs))
    assert isinstance(prediction, DenoisingPrediction)
    return prediction


def test_losses_of_both_parts() -> None:
    losses = dn().train()(tiny.batch())
    terms = ("loss_ce", "loss_bbox", "loss_giou")
    names = {term + part + layer for term in terms for part in ("", "_dn") for layer in ("", "_0")}
    assert losses.keys() == names
    alone = dn(detr={"AUX_LOSS": False}).train()(tiny.batch())
    assert alone.keys() == {name for name in names if not name.endswith("_0")}
    assert dn(GROUPS=0).train()(tiny.batch()).keys() == {name for name in names if "_dn" not in name}


def test_the_denoising_loss_is_a_mean_over_noised_boxes() -> None:
    """Twice the groups without noise are the same queries twice: the loss stays."""
    quiet = {"LABEL_NOISE": 0.0, "BOX_NOISE": 0.0}
    one, two = (dn(GROUPS=n, **quiet).train()(tiny.batch()) for n in (1, 2))
    for name in ("loss_ce_dn", "loss_bbox_dn", "loss_giou_dn_0"):
        assert two[name].item() == pytest.approx(one[name].item(), rel=1e-5)


def test_the_matching_part_does_not_see_the_denoising_part_by_a_bit() -> None:
    model = dn(BOX_NOISE=0.4).train()
    a = predict(model, tiny.batch())
    other = tiny.batch()
    for x in other:  # as many boxes, all of them elsewhere and of other classes
        x["instances"].gt_boxes.tensor[:] = x["instances"].gt_boxes.tensor * 0.5 + 3
        x["instances"].gt_classes[:] = (x["instances"].gt_classes + 1) % tiny.NUM_CLASSES
    b = predict(model, other)
    assert not torch.equal(a.denoised.logits, b.denoised.logits)
    assert torch.equal(a.layer_logits, b.layer_logits) and torch.equal(a.layer_boxes, b.layer_boxes)


@pytest.mark.parametrize("group", range(GROUPS))
def test_no_group_sees_another_by_a_bit(group: int) -> None:
    model = dn().train()
    inputs = tiny.batch()
    targets, images = model.targets(inputs), model.preprocess_image(inputs)
    groups = model.make_groups(targets)
    assert groups is not None
    size = len(groups) // GROUPS
    outputs: list[Tensor] = []
    for shift in (0.0, 0.7):
        groups.anchors[:, group * size : (group + 1) * size] += shift
        model.make_groups = lambda targets, groups=groups: groups  # type: ignore[method-assign]
        prediction = model.predict(images, targets)
        assert isinstance(prediction, DenoisingPrediction)
        outputs.append(torch.cat([prediction.denoised.layer_logits, prediction.layer_logits], 2))
    own = torch.zeros(outputs[0].shape[2], dtype=torch.bool)
    own[group * size : (group + 1) * size] = True
    assert torch.equal(outputs[0][:, :, ~own], outputs[1][:, :, ~own])
    assert (outputs[0][:, :, own] != outputs[1][:, :, own]).any(-1).all()


def test_denoising_queries_see_the_matching_part() -> None:
    model = dn().train()
    before = predict(model, tiny.batch()).denoised.logits.detach()
    with torch.no_grad():
        model.label_enc.weight[-1] += 1
    assert not torch.equal(before, predict(model, tiny.batch()).denoised.logits)


def test_evaluation_costs_what_dab_detr_costs() -> None:
    """The same operations to the last one, however many boxes were denoised in training."""
    flops = {}
    for name in ("DABDETR", "DNDETR"):
        model = tiny.build(name).eval()
        images = model.preprocess_image(tiny.batch())

        class Detector(torch.nn.Module):
            def __init__(self, model: Any, sizes: list[tuple[int, int]]) -> None:
                super().__init__()
                self.model, self.sizes = model, sizes

            def forward(self, tensor: Tensor) -> Tensor:
                from detectron2.structures import ImageList

                prediction = self.model.predict(ImageList(tensor, self.sizes))
                return torch.cat([prediction.logits, prediction.boxes], -1)

        analysis = FlopCountAnalysis(Detector(model, images.image_sizes), images.tensor)
        flops[name] = analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False).total()
    assert flops["DNDETR"] == flops["DABDETR"] > 1e5


def test_evaluation_makes_no_groups() -> None:
    model = dn().eval()
    inputs = tiny.batch()
    prediction = model.predict(model.preprocess_image(inputs), model.targets(inputs))
    assert not isinstance(prediction, DenoisingPrediction) and prediction.boxes.shape == (2, 7, 4)


def test_the_indicator_tells_the_parts_apart() -> None:
    model = dn()
    groups = model.make_groups(model.targets(tiny.batch((3, 1))))
    assert groups is not None
    content = denoising_content(model.label_enc, groups)
    assert (content[..., -1] == (~groups.padding).float()).all()
    assert not content[groups.padding].any()
    torch.testing.assert_close(content[0, 0, :-1], model.label_enc.weight[groups.labels[0, 0]])


def test_patterns_are_added_to_the_matching_part_alone() -> None:
    model = dn(dab={"NUM_PATTERNS": 2}).train()
    prediction = predict(model, tiny.batch())
    assert prediction.boxes.shape == (2, 14, 4) and prediction.denoised.boxes.shape == (2, 9, 4)
    by_pattern = prediction.logits[0].view(2, 7, -1)
    assert not torch.allclose(by_pattern[0], by_pattern[1], atol=1e-4)
    with torch.no_grad():
        model.transformer.patterns.weight.zero_()
    by_pattern = predict(model, tiny.batch()).logits[0].view(2, 7, -1)
    torch.testing.assert_close(by_pattern[0], by_pattern[1])


def test_fixed_centres_are_fixed() -> None:
    model = dn(dab={"FIX_CENTRES": True}).train()
    before = model.anchors().detach().clone()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.5)
    sum(model(tiny.batch()).values()).backward()
    optimizer.step()
    moved = (model.anchors().detach() - before).abs()
    assert (moved[:, :2] == 0).all() and (moved[:, 2:] > 0).all()


def test_a_crowded_image_takes_bounded_memory(caplog: pytest.LogCaptureFixture) -> None:
    model = dn(GROUPS=5, MAX_QUERIES=100).train()
    with caplog.at_level(logging.WARNING):
        prediction = predict(model, tiny.batch((300, 2)))
    assert prediction.denoised.boxes.shape[1] == 100 and prediction.groups.blocked.shape == (107, 107)
    losses = model(tiny.batch((300, 2)))
    assert all(torch.isfinite(x) for x in losses.values())


def test_released_label_embeddings_keep_their_last_row(tmp_path: Path) -> None:
    state = {"label_enc.weight": torch.arange(92.0)[:, None].expand(-1, 15)}
    converted = convert_released(state, 80)["label_enc.weight"]
    assert converted.shape == (81, 15) and converted[-1, 0] == 91 and converted[:3, 0].tolist() == [1, 2, 3]
    model = dn(detr={"NUM_CLASSES": 80})
    DETRCheckpointer(model, str(tmp_path)).save("mine")
    assert model.label_enc.weight.shape == (81, 15)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"GROUPS": -1}, r"MODEL\.DN\.GROUPS -1"),
        ({"GROUPS": 8, "MAX_QUERIES": 5}, r"MODEL\.DN\.MAX_QUERIES 5"),
        ({"LABEL_NOISE": 1.5}, r"MODEL\.DN\.LABEL_NOISE 1\.5"),
        ({"BOX_NOISE": -0.1}, r"MODEL\.DN\.BOX_NOISE -0\.1"),
    ],
)
def test_settings_that_cannot_be_are_named(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dn(**keys)
