"""Values that Python sets: other types than the defaults', choices that there are not, bounds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from detectron2.config import CfgNode
from engine_runs import run_cfg

from detr_family.config.types import check_choices, check_input, check_types
from detr_family.data.dataset_mapper import DETRDatasetMapper
from detr_family.engine import Trainer
from detr_family.inference import Predictor


def with_value(cfg: CfgNode, key: str, value: Any) -> CfgNode:
    """As an assignment does, also of what yacs itself would refuse."""
    node = cfg
    *groups, last = key.split(".")
    for group in groups:
        node = node[group]
    dict.__setitem__(node, last, value)
    return cfg


@pytest.mark.parametrize(
    "key, value, message",
    [
        ("SOLVER.STEPS", 100, r"100, one number, and must be a tuple, which .* a comma: \(100,\)"),
        ("SOLVER.STEPS", "(100,)", r"'\(100,\)', a text; it must be a tuple of numbers"),
        ("MODEL.DETR.FREEZE", "backbone", r"'backbone', one text, and must be a list, .*: \['backbone'\]"),
        ("LOGGERS", "wandb", r"\['wandb'\]"),
        ("DATASETS.TEST", "cells_val", r"which for one of it needs a comma: \('cells_val',\)"),
        ("DATASETS.TEST", None, "of type NoneType; it must be a tuple"),
        ("SOLVER.IMS_PER_BATCH", 2.0, "2.0, of type float; it must be a whole number"),
        ("MODEL.DETR.FEEDFORWARD_DIM", 10**400, r"10{100,} \.\.\.; it must be a whole number of at most 19 digits"),
        ("SOLVER.MAX_ITER", True, "True, of type bool; it must be a whole number"),
        ("SOLVER.BASE_LR", "1e-4", "'1e-4', of type str; it must be a number"),
        ("SOLVER.EMA.ENABLED", "False", "'False', of type str; it must be True or False"),
        ("OUTPUT_DIR", Path("/tmp/a"), "it must be a text: '/tmp/a'"),
        ("INPUT.MIN_SIZE_TRAIN", "480", "a text; it must be a tuple of numbers"),
        ("DATALOADER.NUM_WORKERS", -1, "-1; it must be at least 0"),
        ("SOLVER.CHECKPOINT_PERIOD", 0, "0; it must be at least 1"),
        ("INPUT.FORMAT", "rgb", r"'rgb' \(did you mean 'RGB'\?\); it may be RGB"),
        ("DATALOADER.SAMPLER_TRAIN", "Training", "'Training'; similar: TrainingSampler.*it may be"),
        ("SOLVER.LR_SCHEDULER_NAME", "StepLR", "'StepLR'; it may be"),
        ("SOLVER.BEST_METRIC", "AP", "'AP', which no evaluation here gives; it may be bbox.AP, .*AP-NAME of a class"),
        ("SOLVER.BEST_METRIC", "val/bbox/AP", "'val/bbox/AP', which no evaluation"),
        ("MODEL.DEVICE", "gpu", "'gpu', which torch does not know"),
        ("MODEL.DEVICE", "cuda:99", r"'cuda:99', and torch finds (no|\d+) CUDA devices? here: set it to 'cpu'"),
    ],
)
def test_a_trainer_refuses_it_in_one_line(key: str, value: Any, message: str, tmp_path: Path) -> None:
    cfg = with_value(run_cfg("DETR", tmp_path, "out"), key, value)
    with pytest.raises(ValueError, match=rf"^{key} is .*{message}") as told:
        Trainer(cfg)
    assert "\n" not in str(told.value)


@pytest.mark.parametrize(
    "key, value",
    [
        ("SOLVER.STEPS", [100]),
        ("SOLVER.BASE_LR", 1),
        ("INPUT.MIN_SIZE_TRAIN", 480),
        ("INPUT.MIN_SIZE_TEST", (480,)),
        ("MODEL.PIXEL_MEAN", (1, 2.0, 3)),
        ("SOLVER.WEIGHT_DECAY_BIAS", 0.1),
        ("MODEL.ROI_HEADS.NUM_CLASSES", "80"),  # nothing here reads it
    ],
)
def test_forms_that_stand_for_each_other(key: str, value: Any, cfg: CfgNode) -> None:
    check_types(with_value(cfg, key, value))


def test_what_own_methods_read_may_be_otherwise(cfg: CfgNode) -> None:
    cfg.SOLVER.LR_SCHEDULER_NAME, cfg.DATALOADER.SAMPLER_TRAIN = "Mine", "Mine"
    check_choices(cfg, ["SOLVER.LR_SCHEDULER_NAME", "DATALOADER"])
    with pytest.raises(ValueError, match="SAMPLER_TRAIN"):
        check_choices(cfg, ["SOLVER.LR_SCHEDULER_NAME"])


@pytest.mark.parametrize(
    "key, value, message",
    [
        ("INPUT.MIN_SIZE_TRAIN", (), r"INPUT\.MIN_SIZE_TRAIN is \(\); give shorter sides in pixels"),
        ("INPUT.MIN_SIZE_TEST", -1, r"INPUT\.MIN_SIZE_TEST is \(-1,\)"),
        ("INPUT.MAX_SIZE_TRAIN", 0, r"INPUT\.MAX_SIZE_TRAIN is 0; it must be at least 1"),
        ("INPUT.MAX_SIZE_TEST", 0, r"INPUT\.MAX_SIZE_TEST is 0; it must be at least 1"),
        ("INPUT.MIN_SIZE_TRAIN_SAMPLING", "all", r"SAMPLING is 'all'; it may be 'choice' or 'range'"),
        ("INPUT.MIN_SIZE_TRAIN_SAMPLING", "range", r"'range' it must be two"),
        ("INPUT.RANDOM_FLIP", "both", r"INPUT\.RANDOM_FLIP is 'both'; it may be 'none', 'horizontal' or 'vertical'"),
    ],
)
def test_sizes_and_mirroring_that_cannot_be(key: str, value: Any, message: str, cfg: CfgNode) -> None:
    changed = with_value(cfg, key, value)
    changed.INPUT.MIN_SIZE_TRAIN = changed.INPUT.MIN_SIZE_TRAIN and (64, 48)  # no range, in this order
    tests = ["INPUT.MIN_SIZE_TEST", "INPUT.MAX_SIZE_TEST"]
    parts = [lambda: check_choices(changed), lambda: DETRDatasetMapper(changed, key not in tests)]
    if key in tests:
        parts.append(lambda: Predictor.from_config(changed))
    for part in parts:
        with pytest.raises(ValueError, match=message):
            part()


def test_sizes_that_can_be(cfg: CfgNode) -> None:
    cfg.INPUT.MIN_SIZE_TRAIN_SAMPLING, cfg.INPUT.MIN_SIZE_TRAIN, cfg.INPUT.MIN_SIZE_TEST = "range", (48, 64), 0
    check_input(cfg, training=True)
    cfg.INPUT.MIN_SIZE_TRAIN = 800
    cfg.INPUT.MIN_SIZE_TRAIN_SAMPLING, cfg.INPUT.RANDOM_FLIP = "choice", "vertical"
    check_input(cfg, training=True)
