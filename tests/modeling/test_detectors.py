"""What every detector must do; a detector joins by its line in tests/tiny.py."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from detectron2.engine import DefaultPredictor
from detectron2.modeling import build_model
from torch import Tensor

from detr_family.checkpoint import DETRCheckpointer

pytestmark = pytest.mark.parametrize("name", tiny.DETECTORS)


def test_training_gives_finite_losses_and_a_gradient_for_every_trainable_parameter(name: str) -> None:
    model = tiny.build(name).train()
    with torch.no_grad():
        for p in model.parameters():  # away from initial zeros, behind which nothing is felt
            p.add_(0.1 * torch.randn_like(p))
    losses = model(tiny.batch())
    assert all(torch.isfinite(x) and x.dtype == torch.float32 for x in losses.values())
    sum(losses.values()).backward()
    trained = {k: p for k, p in model.named_parameters() if p.requires_grad}
    assert not [k for k, p in trained.items() if p.grad is None]
    # The first self-attention of a decoder whose content starts from zeros sees the same value everywhere.
    blind = re.compile(r"decoder\.layers\.0\.(self_attn\.in_proj|sa_[qk]content_proj|sa_v_proj)(_|\.)weight")
    assert not [k for k, p in trained.items() if not p.grad.any() and not blind.search(k)]


def test_losses_are_named_for_every_decoder_layer(name: str) -> None:
    losses = tiny.build(name).train()(tiny.batch())
    assert {"loss_ce", "loss_bbox", "loss_giou", "loss_ce_0", "loss_bbox_0", "loss_giou_0"} <= losses.keys()
    alone = tiny.build(name, AUX_LOSS=False).train()(tiny.batch())
    assert not [k for k in alone if k.endswith("_0")]
    assert alone["loss_ce"].item() == pytest.approx(losses["loss_ce"].item(), rel=1e-5)


@pytest.mark.parametrize("counts", [(0, 2), (3, 0), (0, 0), (0,)])
def test_images_without_boxes_give_a_loss_with_a_graph(name: str, counts: tuple[int, ...]) -> None:
    model = tiny.build(name).train()
    losses = model(tiny.batch(counts))
    total = sum(losses.values())
    assert torch.isfinite(total)
    total.backward()
    assert not [k for k, p in model.named_parameters() if p.requires_grad and p.grad is None]
    if not any(counts):
        assert losses["loss_bbox"].item() == losses["loss_giou"].item() == 0
        assert losses["loss_ce"].item() > 0


def test_more_boxes_than_queries(name: str) -> None:
    losses = tiny.build(name).train()(tiny.batch((12, 1)))
    assert all(torch.isfinite(x) for x in losses.values())


def test_a_image_alone_equals_the_same_image_padded(name: str) -> None:
    model = tiny.build(name).eval()
    small, large = tiny.image(64, 96, 0, seed=1), tiny.image(128, 160, 0, seed=2)
    with torch.no_grad():
        alone = model.predict(model.preprocess_image([small]))
        padded = model.predict(model.preprocess_image([small, large]))
    torch.testing.assert_close(padded.logits[0], alone.logits[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(padded.boxes[0], alone.boxes[0], rtol=1e-4, atol=1e-5)
    # In training too: the loss of the small image's set does not know of the padding.
    assert not torch.allclose(padded.logits[0], padded.logits[1], atol=1e-3)


def test_padding_is_masked_in_training_too(name: str) -> None:
    model = tiny.build(name).train()
    small, large = tiny.image(64, 96, 0, seed=1), tiny.image(128, 160, 0, seed=2)
    with torch.no_grad():
        alone = model.predict(model.preprocess_image([small]), model.targets([small]))
        padded = model.predict(model.preprocess_image([small, large]), model.targets([small, large]))
    torch.testing.assert_close(padded.logits[0], alone.logits[0], rtol=1e-4, atol=1e-5)


def test_evaluation_returns_instances_of_the_asked_size(name: str) -> None:
    model = tiny.build(name).eval()
    inputs = tiny.batch()
    inputs[0].update(height=128, width=192)  # twice the size that the detector sees
    del inputs[1]["instances"]
    with torch.no_grad():
        results = [x["instances"] for x in model(inputs)]
        boxes = model.predict(model.preprocess_image(inputs)).boxes
    assert [x.image_size for x in results] == [(128, 192), (80, 48)]
    for result in results:
        height, width = result.image_size
        x = result.pred_boxes.tensor
        assert 0 < len(result) <= model.topk
        assert (x[:, 0::2] <= width).all() and (x[:, 1::2] <= height).all() and (x >= 0).all()
        assert (result.scores[:-1] >= result.scores[1:]).all() and result.scores.max() <= 1
        assert result.pred_classes.max() < tiny.NUM_CLASSES
    # A box in the middle of the image is scaled to pixels, not clipped.
    centre = results[0].pred_boxes.get_centers()[0] / torch.tensor([192.0, 128.0])
    assert (boxes[0, :, :2] - centre).abs().sum(-1).min() < 0.15


def test_prediction_has_the_promised_shapes(name: str) -> None:
    model = tiny.build(name).eval()
    prediction = model.predict(model.preprocess_image(tiny.batch()))
    batch, queries, classes = prediction.logits.shape
    assert (batch, queries) == (2, 7) and classes in (tiny.NUM_CLASSES, tiny.NUM_CLASSES + 1)
    assert prediction.boxes.shape == (2, 7, 4)
    assert (prediction.boxes >= 0).all() and (prediction.boxes <= 1).all()
    assert len(prediction.aux) == 1 and prediction.aux[0].logits.shape == prediction.logits.shape


@pytest.mark.parametrize("classes", [1, 5, 91])
def test_any_number_of_classes(name: str, classes: int, tmp_path: Path) -> None:
    model = tiny.build(name, NUM_CLASSES=classes).train()
    inputs = [tiny.image(64, 96, 4, seed=3, num_classes=classes)]
    inputs[0]["instances"].gt_classes[:] = classes - 1
    assert torch.isfinite(sum(model(inputs).values()))
    DETRCheckpointer(model, str(tmp_path)).save("model")
    with pytest.raises(ValueError, match="NUM_CLASSES"):
        DETRCheckpointer(tiny.build(name, NUM_CLASSES=2)).load(str(tmp_path / "model.pth"))


def test_own_checkpoint_comes_back_bit_for_bit(name: str, tmp_path: Path) -> None:
    model = tiny.build(name)
    DETRCheckpointer(model, str(tmp_path), class_names=["a", "b", "c"]).save("model")
    other = tiny.build(name)
    with torch.no_grad():
        for p in other.parameters():
            p.add_(1)
    extra = DETRCheckpointer(other).load(str(tmp_path / "model.pth"))
    assert extra["class_names"] == ["a", "b", "c"]
    for key, value in model.state_dict().items():
        assert torch.equal(other.state_dict()[key], value), key


def test_other_widths_heads_and_depths_need_no_other_code(name: str, tmp_path: Path) -> None:
    keys = {"HIDDEN_DIM": 32, "NUM_HEADS": 4, "ENC_LAYERS": 2, "DEC_LAYERS": 3, "FEEDFORWARD_DIM": 40}
    model = tiny.build(name, **keys).train()
    losses = model(tiny.batch())
    assert "loss_ce_1" in losses and torch.isfinite(sum(losses.values()))
    DETRCheckpointer(model, str(tmp_path)).save("model")
    DETRCheckpointer(tiny.build(name, **keys)).load(str(tmp_path / "model.pth"))
    with pytest.raises(ValueError, match="does not fit"):
        DETRCheckpointer(tiny.build(name)).load(str(tmp_path / "model.pth"))


def test_frozen_parameters_stay_as_they_are(name: str) -> None:
    model = tiny.build(name).train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3, weight_decay=0.1)
    sum(model(tiny.batch()).values()).backward()
    optimizer.step()
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key]) == key.startswith("backbone.stem"), key


def test_a_label_without_a_class_is_named(name: str) -> None:
    inputs = tiny.batch()
    inputs[1]["instances"].gt_classes[0] = 17
    with pytest.raises(ValueError, match=r"picture_1\.jpg has a box of class 17.*NUM_CLASSES"):
        tiny.build(name).train()(inputs)


def test_a_box_that_is_not_finite_is_named(name: str) -> None:
    inputs = tiny.batch()
    inputs[0]["instances"].gt_boxes.tensor[1, 2] = float("nan")
    with pytest.raises(ValueError, match=r"picture_0\.jpg has a box whose coordinates are not finite"):
        tiny.build(name).train()(inputs)


@pytest.mark.parametrize("shape", [(3, 0, 20), (1, 30, 30), (30, 30)])
def test_a_image_of_a_wrong_shape_is_named(name: str, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"odd\.png has shape"):
        tiny.build(name).eval()([{"image": torch.zeros(shape), "file_name": "odd.png"}])


def test_weights_of_nan_do_not_trip_the_matcher(name: str) -> None:
    model = tiny.build(name).train()
    with torch.no_grad():
        next(p for k, p in model.input_proj.named_parameters() if k.endswith("bias")).fill_(float("nan"))
    losses = model(tiny.batch())
    assert torch.isnan(losses["loss_ce"])


def test_mixed_precision_keeps_boxes_and_losses_in_float32(name: str) -> None:
    model = tiny.build(name).train()
    plain = {k: v.item() for k, v in model(tiny.batch()).items()}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        prediction = model.predict(model.preprocess_image(tiny.batch()), model.targets(tiny.batch()))
        losses = model(tiny.batch())
    assert prediction.boxes.dtype == torch.float32 and prediction.logits.dtype == torch.bfloat16
    assert all(x.dtype == torch.float32 for x in losses.values())
    assert sum(losses.values()).item() == pytest.approx(sum(plain.values()), rel=0.05)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_weights_of_another_type_predict_the_same(
    name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny.build(name).eval()
    with torch.no_grad():
        for p in model.parameters():  # away from initial zeros, behind which nothing is felt
            p.add_(0.05 * torch.randn_like(p))
    chosen: dict[str, Any] = {}  # the encoder's tokens, where there is a choice: rounding may make it another one
    top = Tensor.topk
    with monkeypatch.context() as patch, torch.no_grad():
        patch.setattr(Tensor, "topk", lambda *a, **k: chosen["at"] if chosen else chosen.setdefault("at", top(*a, **k)))
        expected = model.predict(model.preprocess_image(tiny.batch()))
        same = model.to(dtype).predict(model.preprocess_image(tiny.batch()))
    eps = max(torch.finfo(dtype).eps, 1e-5)
    assert same.logits.dtype == dtype and same.boxes.dtype == torch.float32
    assert (same.boxes - expected.boxes).abs().max() < eps
    assert (same.logits.float() - expected.logits).abs().max() < 10 * eps
    with torch.no_grad():
        found = [x["instances"] for x in model(tiny.batch())]
    assert all(x.scores.dtype == x.pred_boxes.tensor.dtype == torch.float32 and len(x) for x in found)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_training_of_weights_of_16_bits_is_refused(name: str, dtype: torch.dtype) -> None:
    with pytest.raises(ValueError, match=rf"weights are {dtype}.*SOLVER\.AMP\.ENABLED"):
        tiny.build(name).to(dtype).train()(tiny.batch())


def test_training_of_weights_of_64_bits_is_the_same(name: str) -> None:
    plain = tiny.quiet(name).train()
    precise = tiny.quiet(name).double().train()
    torch.manual_seed(0)
    expected = plain(tiny.batch())
    torch.manual_seed(0)
    losses = precise(tiny.batch())
    sum(losses.values()).backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float64 for p in precise.parameters() if p.requires_grad)
    for key, value in expected.items():
        assert losses[key].item() == pytest.approx(value.item(), rel=1e-4), key


def test_an_existing_detectron2_script_can_predict(name: str, tmp_path: Path) -> None:
    cfg = tiny.cfg_of(name)
    DETRCheckpointer(tiny.build(name), str(tmp_path)).save("model")
    cfg.MODEL.WEIGHTS = str(tmp_path / "model.pth")
    cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST = 64, 100
    predictor = DefaultPredictor(cfg)
    image = tiny.image(90, 120, 0, seed=5)["image"].permute(1, 2, 0).numpy()
    instances = predictor(image)["instances"]
    assert instances.image_size == (90, 120) and len(instances) > 0


def test_plain_keyword_arguments_build_it_without_a_configuration(name: str) -> None:
    model = tiny.build(name).eval()
    cls = type(model)
    same = cls(**cls.from_config(tiny.cfg_of(name)))
    same.load_state_dict(model.state_dict())
    inputs = tiny.batch()
    with torch.no_grad():
        a, b = (x.eval().predict(x.preprocess_image(inputs)) for x in (model, same))
    assert torch.equal(a.layer_logits, b.layer_logits) and torch.equal(a.layer_boxes, b.layer_boxes)


def test_it_trains_on_what_it_is_shown(name: str) -> None:
    torch.manual_seed(0)
    model = tiny.build(name).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-3)
    inputs = tiny.batch()
    values = []
    for _ in range(80):
        losses = model(inputs)
        optimizer.zero_grad()
        sum(losses.values()).backward()
        optimizer.step()
        values.append(sum(x.item() for k, x in losses.items() if "_dn" not in k))  # noise would hide it
    assert values[-1] < 0.6 * values[0]


def test_the_registry_knows_it(name: str) -> None:
    assert type(build_model(tiny.cfg_of(name))).__name__ == name
