"""Configurations and trained detectors by name, as Detectron2's own model_zoo has them for its models."""

from __future__ import annotations

import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from torch import nn

from detr_family.checkpoint import DETRCheckpointer
from detr_family.config import find_config, load_config
from detr_family.model_zoo.weights import address_of


def get_config_file(name: str) -> str:
    """The path of a configuration that comes with the package.

    Args:
        name: `dn_detr_r50`, `detrex/dino_r50_4scale`, with or without ".yaml".

    Raises:
        FileNotFoundError: there is none of that name; similar ones are named.
    """
    return find_config(name)


def get_config(name: str, trained: bool = False) -> CfgNode:
    """A configuration, complete with Detectron2's keys.

    Args:
        name: as for `get_config_file`.
        trained: MODEL.WEIGHTS are the published weights of that name; else what the recipe starts from, an ImageNet
            backbone.

    Raises:
        FileNotFoundError: there is no such configuration.
        ValueError: `trained`, and no address of the weights is known.
    """
    cfg = load_config(get_config_file(name))
    if trained:
        cfg.MODEL.WEIGHTS = get_checkpoint_url(name)
    return cfg


def get_checkpoint_url(name: str) -> str:
    """The address of the published weights of a configuration.

    Args:
        name: as for `get_config_file`; "@" and a word name further weights of the same configuration
            (`python -m detr_family.model_zoo` lists them).

    Returns:
        An https:// or hf:// address, for MODEL.WEIGHTS and Detectron2's path manager.

    Raises:
        ValueError: none are published, or a program cannot fetch them.
    """
    return address_of(name)


def get(name: str, trained: bool = False, device: str | None = None) -> nn.Module:
    """A detector in training mode, its weights loaded.

    Args:
        name: as for `get_checkpoint_url`.
        trained: with the published weights, which must fill it; else with what the recipe starts from. (For weights
            drawn at random: `build_model(get_config(name))`.)
        device: in place of MODEL.DEVICE, which is "cpu" where there is no CUDA.

    Raises:
        FileNotFoundError: there is no such configuration, or the weights cannot be fetched.
        ValueError: no address of the weights is known, or they do not fit.
    """
    cfg = get_config(name, trained)
    if device is not None:
        cfg.MODEL.DEVICE = device
    elif not torch.cuda.is_available():
        cfg.MODEL.DEVICE = "cpu"
    model = build_model(cfg)
    DETRCheckpointer(model, whole=trained).load(cfg.MODEL.WEIGHTS)
    return model
