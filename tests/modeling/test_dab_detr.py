"""What is DAB-DETR's own: anchors that move, modulated attention, temperature, patterns."""

from __future__ import annotations

from typing import Any

import pytest
import tiny
import torch
from detectron2.modeling import build_model
from torch import Tensor

from detr_family.layers.position_encoding import SinePositionEncoding, sine_of_coordinates
from detr_family.modeling.dab_detr import DABDETR, DABDecoder


def dab(**keys: Any) -> DABDETR:
    cfg = tiny.cfg_of("DABDETR")
    for key, value in keys.items():
        cfg.MODEL.DAB[key] = value
    torch.manual_seed(11)
    model = build_model(cfg)
    assert isinstance(model, DABDETR)
    return model


def positional_attention(anchor: list[float], temperature: float, widen: tuple[float, float] = (1, 1)) -> torch.Tensor:
    """Softmax of PE(anchor) . PE(place) over a map of 40 x 40 places, modulated as equation 6 says."""
    dim, size = 256, 40
    encoding = SinePositionEncoding(dim, temperature_x=temperature, temperature_y=temperature)
    places = encoding(torch.zeros(1, size, size, dtype=torch.bool)).view(size * size, dim)
    query = sine_of_coordinates(torch.tensor([anchor[:2]]), dim // 2, temperature)[0]
    ratio = torch.tensor([widen[1], widen[0]]).repeat_interleave(dim // 2)  # channels of y first
    return (places @ (query * ratio) / dim**0.5).softmax(0).view(size, size)


def spread(attention: torch.Tensor) -> tuple[float, float]:
    """Standard deviations of the attention along x and y, in places."""
    place = torch.arange(len(attention), dtype=torch.float32)
    result = []
    for weight in (attention.sum(0), attention.sum(1)):
        mean = (weight * place).sum()
        result.append(float(((weight * (place - mean) ** 2).sum()) ** 0.5))
    return result[0], result[1]


def test_a_low_temperature_sharpens_positional_attention() -> None:
    """Section 4.5: the higher the temperature, the flatter the map."""
    peaks = [positional_attention([0.5, 0.5], t).max().item() for t in (2.0, 20.0, 10000.0)]
    assert peaks[0] > peaks[1] > 2 * peaks[2]


@pytest.mark.parametrize(("width", "height"), [(0.2, 0.2), (0.3, 0.1), (0.1, 0.3)])
def test_modulation_widens_attention_along_the_longer_side(width: float, height: float) -> None:
    """Equation 6, by the decoder's own function: a reference of 0.2 x 0.2 over anchors of 1:1, 3:1 and 1:3."""
    decoder = DABDecoder(1, 256, 8, 32, 0.0, modulate=True)
    last = decoder.ref_anchor_head.layers[-1]
    torch.nn.init.zeros_(last.weight)
    torch.nn.init.constant_(last.bias, float(torch.logit(torch.tensor(0.2))))
    anchor = torch.tensor([[[0.5, 0.5, width, height]]])
    scale = decoder.modulation(torch.zeros(1, 1, 256), anchor)[0, 0]
    torch.testing.assert_close(scale[:128], torch.full((128,), 0.2 / height))  # channels of y
    torch.testing.assert_close(scale[128:], torch.full((128,), 0.2 / width))
    x, y = spread(positional_attention([0.5, 0.5], 20.0, (0.2 / width, 0.2 / height)))
    if width == height:
        assert x == pytest.approx(y, rel=1e-3)
    else:
        assert (x > 1.2 * y) == (width > height) and (y > 1.2 * x) == (height > width)


def test_modulation_is_a_setting() -> None:
    assert not [k for k in dab(MODULATE=False).state_dict() if "ref_anchor_head" in k]
    assert torch.isfinite(sum(dab(MODULATE=False).train()(tiny.batch()).values()))


def test_anchors_move_between_layers_and_receive_gradients() -> None:
    model = dab().train()
    with torch.no_grad():
        model.bbox_embed.layers[-1].weight.normal_(std=0.1)
    prediction = model.predict(model.preprocess_image(tiny.batch()))
    first, last = prediction.layer_boxes[0], prediction.layer_boxes[-1]
    assert (first - last).abs().max() > 1e-3
    sum(model(tiny.batch()).values()).backward()
    assert (model.refpoint_embed.weight.grad.abs() > 0).all()


def test_the_second_layers_box_still_feels_the_first_layers_move() -> None:
    """The anchor that a layer works on is detached; the one that its box is predicted from is not."""
    model = dab().train()
    with torch.no_grad():
        model.bbox_embed.layers[-1].weight.normal_(std=0.1)
    prediction = model.predict(model.preprocess_image(tiny.batch()))
    prediction.boxes[..., 0].sum().backward()
    assert model.refpoint_embed.weight.grad[:, 0].abs().min() > 0


def test_boxes_start_at_the_anchors() -> None:
    model = dab().eval()
    with torch.no_grad():
        prediction = model.predict(model.preprocess_image(tiny.batch()))
    expected = model.refpoint_embed.weight.sigmoid().expand(2, -1, -1)
    for boxes in prediction.layer_boxes.unbind(0):
        torch.testing.assert_close(boxes, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("fixed", [True, False])
def test_centres_are_fixed_for_real_or_not_at_all(fixed: bool) -> None:
    """Under weight decay too, which moves a parameter without a gradient."""
    model = dab(FIX_CENTRES=fixed).train()
    before = model.anchors().detach().clone()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.5)
    sum(model(tiny.batch()).values()).backward()
    optimizer.step()
    moved = (model.anchors().detach() - before).abs()
    assert (moved[:, :2] == 0).all() == fixed and (moved[:, 2:] > 0).all()
    if fixed:
        assert before[:, :2].sigmoid().std() > 0.1  # spread over the image
        assert "fixed_centres" in model.state_dict()


def anchors_at_the_start(name: str, size: float) -> Tensor:
    cfg = tiny.cfg_of(name)
    cfg.MODEL.DETR.NUM_QUERIES, cfg.MODEL.DAB.ANCHOR_SIZE = 400, size
    return build_model(cfg).anchors().detach()


@pytest.mark.parametrize("name", ["DABDETR", "DNDETR"])
def test_anchors_may_start_with_one_size_all_over_the_image(name: str) -> None:
    start = anchors_at_the_start(name, 0.125).sigmoid()
    torch.testing.assert_close(start[:, 2:], torch.full((400, 2), 0.125))
    assert torch.histc(start[:, :2], 10, 0, 1).min() > 40  # of 80 in each tenth, both axes together
    released = anchors_at_the_start(name, 0.0)
    assert abs(released.mean()) < 0.1 and abs(released.std() - 1) < 0.1
    with pytest.raises(ValueError, match=r"MODEL\.DAB\.ANCHOR_SIZE is 1\.5"):
        anchors_at_the_start(name, 1.5)


def test_patterns_multiply_the_queries() -> None:
    model = dab(NUM_PATTERNS=3).train()
    prediction = model.predict(model.preprocess_image(tiny.batch()))
    assert prediction.boxes.shape == (2, 21, 4)
    started = model.refpoint_embed.weight.sigmoid()
    torch.testing.assert_close(prediction.layer_boxes[0, 0], started.repeat(3, 1), rtol=1e-4, atol=1e-5)
    by_pattern = prediction.logits[0].view(3, 7, -1)
    assert not torch.allclose(by_pattern[0], by_pattern[1], atol=1e-4)
    sum(model(tiny.batch()).values()).backward()
    assert (model.transformer.patterns.weight.grad.abs().sum(1) > 0).all()


def test_one_box_head_under_the_releases_two_names() -> None:
    model = dab()
    names = {k for k in model.state_dict() if "bbox_embed" in k}
    assert {"bbox_embed.layers.0.weight", "transformer.decoder.bbox_embed.layers.0.weight"} <= names
    assert model.bbox_embed is model.transformer.decoder.bbox_embed


def test_counts_that_cannot_be_are_named() -> None:
    with pytest.raises(ValueError, match=r"MODEL\.DAB\.NUM_PATTERNS -1"):
        dab(NUM_PATTERNS=-1)
