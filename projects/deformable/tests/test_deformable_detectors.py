"""This project's detectors in the suite that every detector must pass, and what is their own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import tiny
import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from test_detectors import *  # noqa: F403  (the suite itself)

import projects.deformable  # noqa: F401
from detr_family.modeling.set_detector import SetDetector


def deformable(cfg: CfgNode) -> None:
    cfg.MODEL.META_ARCHITECTURE = "DeformableDETR"
    cfg.MODEL.DETR.COST.CLASS = cfg.MODEL.DETR.LOSS.CLASS = 2.0
    cfg.MODEL.DEFORMABLE.NUM_LEVELS = 3
    cfg.MODEL.DEFORMABLE.ENC_POINTS = cfg.MODEL.DEFORMABLE.DEC_POINTS = 2
    cfg.MODEL.DEFORMABLE.IGNORE_PADDING = True


def refined(cfg: CfgNode) -> None:
    deformable(cfg)
    cfg.MODEL.DEFORMABLE.BOX_REFINEMENT = True


def two_stage(cfg: CfgNode) -> None:
    refined(cfg)
    cfg.MODEL.DEFORMABLE.TWO_STAGE = True


def dab(cfg: CfgNode) -> None:
    deformable(cfg)
    cfg.MODEL.META_ARCHITECTURE = "DABDeformableDETR"


def dn(cfg: CfgNode) -> None:
    deformable(cfg)
    cfg.MODEL.META_ARCHITECTURE = "DNDeformableDETR"
    cfg.MODEL.DN.GROUPS = 3


DETECTORS: dict[str, Callable[[CfgNode], None]] = {
    "DeformableDETR": deformable,
    "DeformableDETR refined": refined,
    "DeformableDETR two-stage": two_stage,
    "DABDeformableDETR": dab,
    "DNDeformableDETR": dn,
}


@pytest.fixture(scope="module", autouse=True)
def known_to_the_suite() -> Iterator[None]:
    """The suite builds what tests/tiny.py lists; the list is as it was afterwards."""
    tiny.DETECTORS.update(DETECTORS)
    yield
    for name in DETECTORS:
        del tiny.DETECTORS[name]


pytestmark = pytest.mark.parametrize("name", DETECTORS)


def cfg_of(name: str, **keys: Any) -> CfgNode:
    """The named tiny configuration; `keys` are keys of MODEL.DEFORMABLE."""
    cfg = tiny.cfg_of(name)
    for key, value in keys.items():
        cfg.MODEL.DEFORMABLE[key] = value
    return cfg


def build(name: str, **keys: Any) -> SetDetector:
    torch.manual_seed(11)
    return build_model(cfg_of(name, **keys))


def test_the_registry_knows_it(name: str) -> None:
    assert type(build(name)).__name__ == name.split()[0]


@pytest.mark.parametrize("keys", [{"NUM_LEVELS": 1}, {"NUM_LEVELS": 4, "ENC_POINTS": 3, "DEC_POINTS": 1}])
def test_other_levels_and_points_need_no_other_code(name: str, keys: dict[str, int]) -> None:
    losses = build(name, **keys).train()(tiny.batch())
    sum(losses.values()).backward()
    assert all(torch.isfinite(x) for x in losses.values())


@pytest.mark.parametrize("key", ["NUM_LEVELS", "ENC_POINTS", "DEC_POINTS"])
def test_counts_that_cannot_be_are_named(name: str, key: str) -> None:
    with pytest.raises(ValueError, match=rf"{key} 0"):
        build(name, **{key: 0})


def test_images_with_fewer_tokens_than_queries(name: str) -> None:
    model = build(name)
    inputs = [tiny.image(16, 32, 1, seed=3), tiny.image(32, 16, 2, seed=4)]
    losses = model.train()(inputs)
    sum(losses.values()).backward()
    assert all(torch.isfinite(x) for x in losses.values())
    with torch.no_grad():
        boxes = model.eval().predict(model.preprocess_image(inputs)).boxes
    assert torch.isfinite(boxes).all() and 0 < boxes.shape[1] <= 7


def test_boxes_of_a_layer_are_relative_to_those_of_the_layer_before(name: str) -> None:
    model = build(name).eval()
    with torch.no_grad():
        for head in model.bbox_embed:
            head.zero_last_layer()
            head.layers[-1].bias[0] = 0.5
        inputs = model.preprocess_image(tiny.batch())
        prediction = model.predict(inputs)
    first, last = (x[..., 0].logit() for x in prediction.layer_boxes)
    moved = 0.0 if name == "DeformableDETR" else 0.5  # without refinement all layers start from the same point
    inside = last < 4  # further out the inverse sigmoid's bound is felt
    torch.testing.assert_close(last[inside], (first + moved)[inside], rtol=1e-3, atol=1e-3)


def test_gradients_of_refined_boxes_stop_at_the_layer_before(name: str) -> None:
    model = build(name).train()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    if name == "DeformableDETR":
        assert len(set(model.bbox_embed)) == 1
        return
    prediction = model.predict(model.preprocess_image(tiny.batch()), model.targets(tiny.batch()))
    assert len(set(model.bbox_embed)) == len(model.bbox_embed)
    prediction.boxes.square().sum().backward()
    first, last = (head.layers[0].weight.grad for head in model.bbox_embed[:2])
    assert not first.any() and last.any()


def test_heads_start_from_the_releases_values(name: str) -> None:
    model = build(name)
    sizes = [head.layers[-1].bias.tolist() for head in model.bbox_embed]
    expected = [[0.0] * 4] * len(sizes)
    if name == "DeformableDETR":
        expected = [[0.0, 0.0, -2.0, -2.0]] * len(sizes)
    elif "two-stage" not in name:
        expected = [[0.0, 0.0, -2.0, -2.0], *expected[1:]]
    assert sizes == expected
    assert {round(float(b), 3) for head in model.class_embed for b in head.bias.detach()} == {-4.595}
