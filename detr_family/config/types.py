"""What values may be: their types, which files and command line are held to as they are read, choices, bounds.

Python may set a key to anything; and much of this would be found out hours later, by who uses it.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from detectron2.config import CfgNode, get_cfg

from detr_family.config.defaults import add_detr_family_config
from detr_family.config.files import similar

_OF_MODEL = ("MODEL.DETR.", "MODEL.DAB.", "MODEL.DN.", "MODEL.DINO.", "MODEL.PIXEL_", "MODEL.BACKBONE.", "MODEL.DEVICE")
_OTHERS: tuple[str, ...] = (
    "MODEL.WEIGHTS",
    "MODEL.META_ARCHITECTURE",
    "SOLVER.",
    "INPUT.",
    "DATASETS.",
    "DATALOADER.",
    "TEST.",
)
_OTHERS += ("OUTPUT_DIR", "SEED", "VIS_PERIOD", "VIS_REPORT", "LOGGERS")
# What Detectron2 takes in another type, too.
_ALSO: dict[str, Any] = {"INPUT.MIN_SIZE_TRAIN": 0, "INPUT.MIN_SIZE_TEST": ()}
_NAMES: dict[type, str] = {
    int: "a whole number",
    float: "a number",
    bool: "True or False",
    str: "a text",
    tuple: "a tuple",
    list: "a list",
}
_LARGEST = 2**63 - 1  # that torch takes
# Of Detectron2's keys: what it refuses in words that do not name the key, or late.
_CHOICES: dict[str, Sequence[str]] = {
    "SOLVER.LR_SCHEDULER_NAME": ("WarmupMultiStepLR", "WarmupCosineLR", "WarmupStepWithFixedGammaLR"),
    "SOLVER.WARMUP_METHOD": ("linear", "constant"),
    "SOLVER.CLIP_GRADIENTS.CLIP_TYPE": ("full_model", "norm", "value"),
    "DATALOADER.SAMPLER_TRAIN": (
        "TrainingSampler",
        "RepeatFactorTrainingSampler",
        "RandomSubsetTrainingSampler",
        "WeightedTrainingSampler",
        "WeightedCategoryTrainingSampler",
    ),
    "INPUT.CROP.TYPE": ("relative_range", "relative", "absolute", "absolute_range"),
    "INPUT.FORMAT": ("RGB", "BGR", "L", "YUV-BT.601", "YCbCr", "HSV", "LAB", "CMYK", "RGBA"),
}
_LEAST = {
    "SOLVER.MAX_ITER": 1,
    "SOLVER.CHECKPOINT_PERIOD": 1,
    "SOLVER.IMS_PER_BATCH": 1,
    "DATALOADER.NUM_WORKERS": 0,
    "TEST.DETECTIONS_PER_IMAGE": 1,
}


def check_types(cfg: CfgNode, *groups: str) -> None:
    """Whether the values are of their defaults' types, as in a file.

    Tuples and lists stand for each other, and whole numbers for numbers.

    Args:
        cfg: a configuration.
        groups: beginnings of the keys to look at; all that training and evaluation read without.

    Raises:
        ValueError: one is of another type.
    """
    for key, default in _defaults().items():
        if not key.startswith(groups or _OF_MODEL + _OTHERS):
            continue
        node = _value(cfg, key, default)
        if not _fits(node, default) and not (key in _ALSO and _fits(node, _ALSO[key])):
            raise ValueError(f"{key} is {_said(node, default)}")


def check_given(cfg: CfgNode) -> None:
    """Whether every key has a value: files with nothing behind a key, null, and None on a command line pass yacs.

    Raises:
        ValueError: one has none.
    """
    for key, default in _defaults().items():
        if default is not None and _value(cfg, key, default) is None:
            form = repr(type(default)()) if isinstance(default, (str, tuple, list)) else repr(default)
            what = "for none" if isinstance(default, (str, tuple, list)) else "the default"
            raise ValueError(f"{key} has no value (None, or nothing behind it in a file): give one; {form} is {what}")


def check_choices(cfg: CfgNode, own: Sequence[str] = ()) -> None:
    """Whether values are among those that there are.

    Args:
        cfg: a configuration whose types are right.
        own: beginnings of keys that a Trainer's own methods read, which may take others.

    Raises:
        ValueError: one is not.
    """
    _check_device(cfg.MODEL.DEVICE)
    check_input(cfg, training=not "INPUT".startswith(tuple(own)))
    for key in (*_CHOICES, *_LEAST):
        value = functools.reduce(CfgNode.__getitem__, key.split("."), cfg)
        if key.startswith(tuple(own)):
            continue
        if key in _CHOICES and value not in _CHOICES[key]:
            other = next((x for x in _CHOICES[key] if x.lower() == str(value).lower()), "")
            meant = f" (did you mean {other!r}?)" if other else similar(str(value), _CHOICES[key])
            raise ValueError(f"{key} is {value!r}{meant}; it may be {', '.join(_CHOICES[key])}")
        if key in _LEAST and value < _LEAST[key]:
            raise ValueError(f"{key} is {value}; it must be at least {_LEAST[key]}")


def _value(cfg: CfgNode, key: str, default: Any) -> Any:
    """The value of a key; `default` where a configuration does not have it."""
    node: Any = cfg
    for name in key.split("."):
        node = node.get(name, default) if isinstance(node, CfgNode) else default
    return node


def check_input(cfg: CfgNode, *, training: bool) -> None:
    """Whether images can be resized and mirrored as INPUT says, which Detectron2 finds out with the first of them.

    Args:
        cfg: a configuration.
        training: the keys of the training, too.

    Raises:
        ValueError: a key is at fault.
    """
    given = cfg.INPUT
    for name in ("TEST", "TRAIN") if training else ("TEST",):
        sizes, longest = given[f"MIN_SIZE_{name}"], given[f"MAX_SIZE_{name}"]
        sizes = sizes if isinstance(sizes, (tuple, list)) else (sizes,)
        if not sizes or min(sizes) < 0:
            raise ValueError(
                f"INPUT.MIN_SIZE_{name} is {sizes}; give shorter sides in pixels, or 0 for sizes as they are"
            )
        if longest < 1:
            raise ValueError(f"INPUT.MAX_SIZE_{name} is {longest}; it must be at least 1 (pixels of the longer side)")
    if not training:
        return
    sizes, sampling = given.MIN_SIZE_TRAIN, given.MIN_SIZE_TRAIN_SAMPLING
    if sampling not in ("choice", "range"):
        raise ValueError(f"INPUT.MIN_SIZE_TRAIN_SAMPLING is {sampling!r}; it may be 'choice' or 'range'")
    if sampling == "range" and not (len(sizes) == 2 and sizes[0] <= sizes[1]):
        raise ValueError(
            f"INPUT.MIN_SIZE_TRAIN is {sizes}; with MIN_SIZE_TRAIN_SAMPLING 'range' it must be two, the least and the "
            "greatest"
        )
    if given.RANDOM_FLIP not in ("none", "horizontal", "vertical"):
        raise ValueError(f"INPUT.RANDOM_FLIP is {given.RANDOM_FLIP!r}; it may be 'none', 'horizontal' or 'vertical'")


def _check_device(name: str) -> None:
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(
            f"MODEL.DEVICE is {name!r}, which torch does not know; it may be 'cuda', 'cuda:0', 'cpu'"
        ) from None
    found = torch.cuda.device_count() if device.type == "cuda" else 1
    if (device.index or 0) >= found:
        raise ValueError(
            f"MODEL.DEVICE is {name!r}, and torch finds {found or 'no'} CUDA device{'' if found == 1 else 's'} here: "
            "set it to 'cpu', or see why with python -m detr_family.collect_env"
        )


def _fits(value: Any, default: Any) -> bool:
    if default is None:
        return True
    if isinstance(default, (tuple, list)):
        numbers = bool(default) and all(isinstance(x, (int, float)) for x in default)
        return isinstance(value, (tuple, list)) and not (numbers and any(isinstance(x, str) for x in value))
    if isinstance(default, float):
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if isinstance(value, int) and abs(value) > _LARGEST:
        return False
    return isinstance(value, type(default)) and isinstance(value, bool) == isinstance(default, bool)


def _said(value: Any, default: Any) -> str:
    text, wanted = repr(value), _NAMES[type(default)]
    shown = text if len(text) < 200 else f"{text[:200]} ..."
    numbers = isinstance(default, (tuple, list)) and any(isinstance(x, (int, float)) for x in default)
    if isinstance(value, str) and numbers:
        return f"{shown}, a text; it must be {wanted} of numbers"
    if isinstance(value, (str, int, float)) and isinstance(default, (tuple, list)):
        form = f"[{shown}]" if isinstance(default, list) else f"({shown},)"
        what = "one text" if isinstance(value, str) else "one number"
        needs = " for one of it needs a comma" if isinstance(default, tuple) else " for one of it is"
        return f"{shown}, {what}, and must be {wanted}, which{needs}: {form}"
    form = f": {os.fspath(value)!r}" if isinstance(default, str) and isinstance(value, os.PathLike) else ""
    if isinstance(value, int) and isinstance(default, int) and abs(value) > _LARGEST:
        return f"{shown}; it must be {wanted} of at most 19 digits"
    return f"{shown}, of type {type(value).__name__}; it must be {wanted}{form}"


@functools.lru_cache(maxsize=1)
def _defaults() -> dict[str, Any]:
    cfg = get_cfg()
    add_detr_family_config(cfg)
    return dict(_leaves(cfg, ""))


def _leaves(node: CfgNode, prefix: str) -> Iterator[tuple[str, Any]]:
    for key, value in node.items():
        if isinstance(value, CfgNode):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value
