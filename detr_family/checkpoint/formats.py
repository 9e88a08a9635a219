"""What a file of weights is, told by the names in it, and how it becomes one of those here."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from re import Pattern, compile
from typing import Any

import torch
from torch import Tensor, nn

from detr_family.checkpoint import detrex, releases, transformers
from detr_family.checkpoint.architecture import config_file
from detr_family.checkpoint.rows import COCO_NAMES, head_rows

State = dict[str, Tensor]


@dataclass(frozen=True)
class Format:
    """A kind of file.

    Attributes:
        name: whose it is, for messages.
        sign: what the names of such a file, and of no other, begin with.
        convert: (its state dict, classes of the model, names here of tensors with one row more than classes) -> a
            state dict under the names here; may raise ValueError.
        backbone_only: an ImageNet backbone, not a detector.
        differences: (its state dict, config.json beside it, the model) -> where the model computes something else.
        dilated: (its state dict, config.json) -> whether the backbone's last stage is dilated; None: it does not say.
        folder: (its state dict) -> where in configs/ its settings are; "" where they are those of the papers' releases.
    """

    name: str
    sign: Pattern[str]
    convert: Callable[[State, int, Collection[str]], State]
    backbone_only: bool = False
    differences: Callable[[State, Mapping[str, Any], nn.Module], list[str]] = lambda *_: []
    dilated: Callable[[State, Mapping[str, Any]], bool | None] = lambda *_: None
    folder: Callable[[State], str] = lambda _: ""


def _mmdetection(*_: Any) -> State:
    raise ValueError(
        "it is mmdetection's, whose names and settings are documented nowhere: load the weights of the paper's "
        "authors, of detrex or of transformers"
    )


FORMATS = (
    Format("mmdetection", compile(r"(bbox_head|query_head|roi_head|panoptic_head)\."), _mmdetection),
    Format(
        "detrex",
        detrex.SIGN,
        lambda state, *_: detrex.convert_detrex(state),
        differences=lambda state, _, model: detrex.differences(state, model),
        dilated=lambda state, _: detrex.is_dilated(state),
        folder=lambda _: "detrex/",
    ),
    Format(
        "transformers",
        transformers.SIGN,
        lambda state, classes, _: transformers.convert_transformers(state, classes),
        differences=lambda _, config, model: transformers.differences(config, model),
        dilated=lambda _, config: transformers.is_dilated(config),
        folder=transformers.folder,
    ),
    Format("the paper's authors", releases.SIGN, releases.convert_released),
    Format(
        "torchvision",
        compile(r"layer1\.0\.conv1\.weight$"),
        lambda state, *_: releases.convert_resnet(state),
        backbone_only=True,
    ),
    Format(
        "Swin's authors",
        compile(r"layers\.0\.blocks\.0\.attn\.qkv\.weight$"),
        lambda state, *_: releases.convert_swin(state),
        backbone_only=True,
    ),
)


def recognise(names: Collection[str]) -> Format | None:
    """The format of a file with such names; None: Detectron2's or this project's own."""
    return next((x for x in FORMATS if any(x.sign.match(name) for name in names)), None)


def unfit(origin: Format, state: State, converted: State, config: Mapping[str, Any], model: nn.Module) -> str:
    """What is wrong with loading a foreign file's weights, which fit, into a model; empty if nothing is.

    Args:
        origin: the file's format.
        state: the file's.
        converted: the same under the names here.
        config: the config.json beside the file; empty if there is none.
        model: with these names and shapes.
    """
    found = origin.differences(state, config, model)
    dilated = origin.dilated(state, config)
    stride, right = _stride(model), 16 if dilated else 32
    if dilated is not None and "backbone.res5.0.conv1.weight" in converted and stride != right:
        found.append(f"the backbone's coarsest map has stride {stride} here, {right} there")
    return "; ".join(found)


def belongs_to(origin: Format, state: State, converted: State, config: Mapping[str, Any]) -> str:
    """The config file that a foreign file belongs to."""
    return config_file(converted, dilated=bool(origin.dilated(state, config)), folder=origin.folder(state))


def _stride(model: Any) -> int:
    shapes = model.backbone.output_shape() if hasattr(model, "backbone") else {}
    return max((int(shape.stride) for shape in shapes.values()), default=0)


def class_names(checkpoint: Mapping[str, Any]) -> list[str] | None:
    """The classes of a checkpoint: those that it names; COCO's 80 for a published COCO detector; else None.

    Args:
        checkpoint: as read, with `model`, and `class_names` or `config` (a config.json) where there were such.
    """
    names = checkpoint.get("class_names")
    if isinstance(names, (list, tuple)) and names and all(isinstance(name, str) for name in names):
        return list(names)
    state = checkpoint["model"]
    origin = recognise(state)
    rows = head_rows(state)
    if origin is None or not rows:
        return None
    if origin.name == "transformers" and (named := transformers.class_names(checkpoint.get("config", {}))):
        return named
    published = {80, 81} if origin.name == "detrex" else {91, 92}
    return list(COCO_NAMES) if rows <= published else None


def read_config(folder: str) -> dict[str, Any]:
    """The config.json of transformers in a folder; empty if there is none."""
    try:
        with open(os.path.join(folder, "config.json"), encoding="utf-8") as file:
            config = json.load(file)
    except (OSError, ValueError):
        return {}
    return config if isinstance(config, dict) else {}


def share(state: State, model: nn.Module) -> str:
    """Give what is one parameter in the model, but has several names, its value under all of them, in place.

    Returns:
        What is wrong, empty if nothing is: two names of one parameter with different values.
    """
    groups: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        groups.setdefault(id(parameter), []).append(name)
    for names in groups.values():
        known = [name for name in names if name in state]
        for name in known[1:]:
            one, other = torch.as_tensor(state[known[0]]), torch.as_tensor(state[name])
            if one.shape != other.shape or not torch.equal(one, other):
                return f"{known[0]} and {name} are one parameter here and two in the file"
        for name in names:
            if known:
                state.setdefault(name, state[known[0]])
    return ""
