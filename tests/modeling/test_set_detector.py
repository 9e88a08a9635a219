"""What every detector takes, said once; and what ends every constructor: freezing and activation checkpointing."""

from __future__ import annotations

import functools
import inspect
from typing import Any

import pytest
import tiny
import torch
from detectron2.config import CfgNode, configurable
from detectron2.modeling import META_ARCH_REGISTRY, build_model
from detectron2.structures import ImageList
from torch import nn

from detr_family.modeling.conditional_detr import focal_arguments
from detr_family.modeling.detr import DETR
from detr_family.modeling.postprocessing import best_pairs
from detr_family.modeling.set_detector import CommonArguments, SetDetector
from detr_family.modeling.structures import SetPrediction, Targets


def parameters_of(cls: type) -> dict[str, inspect.Parameter]:
    return dict(inspect.signature(cls.__init__).parameters)


def test_the_arguments_in_common_are_those_of_the_base() -> None:
    base = parameters_of(SetDetector)
    common = base.keys() - {"self", "select"}
    hints = CommonArguments.__annotations__
    assert common == hints.keys()
    optional = {name for name, hint in hints.items() if "NotRequired" in str(hint)}
    assert optional == {name for name in common if base[name].default is not inspect.Parameter.empty}


@pytest.mark.parametrize("name", tiny.DETECTORS)
def test_a_detector_names_only_its_own_arguments(name: str) -> None:
    own = parameters_of(META_ARCH_REGISTRY.get(name))
    assert own["common"].kind is inspect.Parameter.VAR_KEYWORD
    assert not own.keys() & CommonArguments.__annotations__.keys()


@pytest.mark.parametrize("name", tiny.DETECTORS)
def test_arguments_that_are_none_or_missing_are_refused(name: str) -> None:
    cls = META_ARCH_REGISTRY.get(name)
    arguments = cls.from_config(tiny.cfg_of(name))
    with pytest.raises(TypeError, match="number_of_classes"):
        cls(**arguments, number_of_classes=3)
    del arguments["topk"]
    with pytest.raises(TypeError, match="topk"):
        cls(**arguments)


def told_cfg(name: str, freeze: tuple[str, ...] = (r"^backbone\.",), parts: tuple[str, ...] = ("ENCODER",)) -> CfgNode:
    cfg = tiny.cfg_of(name)
    cfg.MODEL.DETR.FREEZE = list(freeze)
    for part in parts:
        cfg.MODEL.DETR.CHECKPOINT[part] = True
    return cfg


def trained(model: nn.Module) -> set[str]:
    return {name for name, p in model.named_parameters() if p.requires_grad}


def checkpointed(layers: nn.ModuleList) -> bool:
    return all(isinstance(layer.forward, functools.partial) for layer in layers)


@pytest.mark.parametrize("name", tiny.DETECTORS)
def test_a_detector_is_frozen_and_checkpointed_however_it_is_built(name: str) -> None:
    cls, cfg = META_ARCH_REGISTRY.get(name), told_cfg(name)
    for model in (cls(cfg), cls(**cls.from_config(cfg)), cls(cfg, topk=3)):
        assert trained(model) == {key for key, _ in model.named_parameters() if not key.startswith("backbone.")}
        assert checkpointed(model.transformer.encoder.layers) and not checkpointed(model.transformer.decoder.layers)


def test_without_a_configuration_they_are_arguments_like_others() -> None:
    arguments = DETR.from_config(tiny.cfg_of("DETR"))
    model = DETR(**{**arguments, "freeze": ["bbox_embed"], "checkpoint": ["DECODER"]})
    assert not model.bbox_embed.layers[0].weight.requires_grad and model.class_embed.weight.requires_grad
    assert checkpointed(model.transformer.decoder.layers)
    del arguments["freeze"], arguments["checkpoint"]
    model = DETR(**arguments)
    assert model.bbox_embed.layers[0].weight.requires_grad
    with pytest.raises(ValueError, match="no part 'NECK' to checkpoint; there are BACKBONE, ENCODER, DECODER"):
        DETR(**arguments, checkpoint=["NECK"])


class Renamed(DETR):
    """A detector of somebody's own that changes nothing of the constructor."""


class Widened(DETR):
    """One whose own constructor adds parameters."""

    @configurable
    def __init__(self, *, finishes: bool, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.second_encoder = nn.Linear(4, 4)
        if finishes:
            self.finish(Widened)

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        return {**super().from_config(cfg), "finishes": True}


class Blank(SetDetector):
    """One from the base class alone, which has no transformer."""

    @configurable
    def __init__(self, *, finishes: bool, **common: Any) -> None:
        super().__init__(select=best_pairs, **common)
        self.head = nn.Linear(20, 4 + self.num_classes)
        if finishes:
            self.finish(Blank)

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        return {**focal_arguments(cfg), "finishes": True}

    def predict(self, images: ImageList, targets: Targets | None = None) -> SetPrediction:
        both = self.head(self.backbone(images.tensor)["res5"].flatten(2).transpose(1, 2))[None]
        return SetPrediction(both[..., 4:], both[..., :4].sigmoid())


def test_a_detector_of_ones_own_is_frozen_too() -> None:
    assert not [key for key in trained(Renamed(told_cfg("DETR"))) if key.startswith("backbone.")]
    assert trained(Blank(told_cfg("DETR", parts=()))) == {"head.weight", "head.bias"}
    model = Widened(told_cfg("DETR", ("encoder",)))
    assert not [key for key in trained(model) if "encoder" in key] and checkpointed(model.transformer.encoder.layers)
    assert not Widened(told_cfg("DETR", ("second_encoder",))).second_encoder.weight.requires_grad
    with pytest.raises(ValueError, match="FREEZE has 'third_encoder', which no parameter's name matches"):
        Widened(told_cfg("DETR", ("third_encoder",)))


@pytest.mark.parametrize("cls", [Widened, Blank])
@pytest.mark.parametrize("freeze", ["^(second_encoder|head)", "(bias)$", "third_encoder"])
def test_a_constructor_that_forgets_to_freeze_is_noticed(cls: type[SetDetector], freeze: str) -> None:
    model = cls(told_cfg("DETR", (freeze,), ()), finishes=False).eval()
    with pytest.raises(TypeError, match=rf"constructor of {cls.__name__} must end with self\.finish\({cls.__name__}\)"):
        model(tiny.batch())


def test_a_constructor_that_forgets_runs_where_there_was_nothing_to_do() -> None:
    for cls, cfg in ((Blank, told_cfg("DETR", (), ())), (Widened, told_cfg("DETR"))):
        with torch.no_grad():
            assert len(cls(cfg, finishes=False).eval()(tiny.batch())) == 2
    with pytest.raises(TypeError, match=r"self\.finish\(Blank\)"):
        Blank(told_cfg("DETR", ()), finishes=False).eval()(tiny.batch())


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("TEST.DETECTIONS_PER_IMAGE", 0, r"at least one detection, got 0 \(TEST\.DETECTIONS_PER_IMAGE\)"),
        ("MODEL.PIXEL_STD", [60.0, 0.0, 60.0], r"deviations must be above 0, got \[60\.0, 0\.0, 60\.0\]"),
        ("MODEL.PIXEL_STD", [60.0, 60.0], r"3 means and 2 standard deviations were given"),
    ],
)
def test_settings_that_cannot_be_are_refused_wherever_a_detector_is_built(key: str, value: Any, message: str) -> None:
    cfg = tiny.cfg_of("DETR")
    cfg.merge_from_list([key, value])
    with pytest.raises(ValueError, match=message):
        build_model(cfg)


def test_the_type_of_the_weights_is_theirs_however_they_come() -> None:
    expected, model = (tiny.build("DINO").eval() for _ in range(2))
    expected.half()
    model.load_state_dict(expected.state_dict(), assign=True)
    assert model.dtype == torch.float16 and model.pixel_mean.dtype == torch.float32
    one, other = (x(tiny.batch((0,)))[0]["instances"] for x in (expected, model))
    assert torch.equal(one.scores, other.scores) and torch.equal(one.pred_boxes.tensor, other.pred_boxes.tensor)
    with pytest.raises(ValueError, match=r"weights are torch\.float16, too coarse"):
        model.train()(tiny.batch())
