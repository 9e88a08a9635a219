"""Small trainings for the tests of the engine: a tiny detector on generated shapes, with all that is random."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import tiny
import torch
from detectron2.config import CfgNode
from detectron2.engine import HookBase
from torch import Tensor

from detr_family.data.datasets.coco import register_datasets
from detr_family.data.datasets.shapes import write_shapes
from detr_family.engine import Trainer
from detr_family.engine.randomness import seed_all
from detr_family.engine.watch import RunWriter


def run_cfg(name: str, folder: Path, output: str, opts: list[Any] | None = None) -> CfgNode:
    """The named detector on shapes in `folder`/data: dropout, crops, flips, several sizes, a drop of the rate.

    Args:
        name: one of tiny.DETECTORS.
        folder: for the data and, below it, the output.
        output: name of the run's own folder.
        opts: keys and values over these.
    """
    entries = write_shapes(str(folder / "data"), 14, 3, size=(64, 80))
    cfg = tiny.cfg_of(name)
    cfg.DATASETS.COCO_FORMAT = [[f"{folder}/{entry[0]}", *entry[1:]] for entry in entries]
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = (cfg.DATASETS.COCO_FORMAT[0][0],), ()
    cfg.DATALOADER.NUM_WORKERS, cfg.DATALOADER.ASPECT_RATIO_GROUPING = 0, False
    cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS = False
    cfg.INPUT.MIN_SIZE_TRAIN, cfg.INPUT.MAX_SIZE_TRAIN = (48, 64), 96
    cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST = 64, 96
    cfg.INPUT.CROP.ENABLED, cfg.INPUT.CROP.TYPE = True, "absolute_range"
    cfg.INPUT.CROP.SIZE, cfg.INPUT.CROP.RESIZE = [32, 48], [48, 56]
    cfg.MODEL.DETR.NUM_CLASSES, cfg.MODEL.DETR.DROPOUT = -1, 0.1
    cfg.SOLVER.IMS_PER_BATCH, cfg.SOLVER.MAX_ITER, cfg.SOLVER.STEPS = 4, 4, (3,)
    cfg.SOLVER.BASE_LR, cfg.SOLVER.WARMUP_ITERS, cfg.SOLVER.CHECKPOINT_PERIOD = 1e-3, 2, 2
    cfg.SOLVER.CLIP_GRADIENTS.merge_from_list(["ENABLED", True, "CLIP_TYPE", "full_model", "CLIP_VALUE", 1.0])
    cfg.TEST.EVAL_PERIOD, cfg.SEED = 0, 5
    cfg.OUTPUT_DIR = str(folder / output)
    cfg.merge_from_list(opts or [])
    register_datasets(cfg)
    os.makedirs(cfg.OUTPUT_DIR, exist_ok=True)
    return cfg


class StopAfter(HookBase):
    """Ends a run after so many iterations as if it were killed: nothing is saved that was not before."""

    def __init__(self, iterations: int) -> None:
        self.iterations = iterations

    def after_step(self) -> None:
        if self.trainer.iter + 1 == self.iterations:
            raise KeyboardInterrupt


def train(cfg: CfgNode, resume: bool = False, stop_after: int | None = None) -> Trainer:
    """Train as train_net.py does, from the generators' start to the end, or to a stop."""
    torch.set_num_threads(1)
    seed_all(max(cfg.SEED, 0))
    trainer = Trainer(cfg)
    trainer._hooks = [hook for hook in trainer._hooks if not isinstance(hook, RunWriter)]  # draws for seconds
    trainer.resume_or_load(resume)
    if stop_after is not None:
        trainer.register_hooks([StopAfter(stop_after)])
        try:
            trainer.train()
        except KeyboardInterrupt:
            return trainer
        raise AssertionError("the run ended before it was stopped")
    trainer.train()
    return trainer


def everything(trainer: Trainer) -> dict[str, Tensor]:
    """Every tensor that a run carries on: weights, optimizer's states, averages; by name."""
    found: dict[str, Tensor] = {f"model.{k}": v for k, v in trainer._trainer.model.state_dict().items()}
    for i, state in trainer.optimizer.state_dict()["state"].items():
        found.update({f"optimizer.{i}.{k}": torch.as_tensor(v) for k, v in state.items()})
    if trainer.average is not None:
        found.update({f"ema.{k}": v for k, v in trainer.average.model.state_dict().items()})
    for i, group in enumerate(trainer.optimizer.param_groups):
        found[f"lr.{i}"] = torch.tensor(group["lr"], dtype=torch.float64)
    return found


def assert_bit_equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    different = [k for k in one if not torch.equal(one[k], other[k])]
    assert not different, f"{len(different)} of {len(one)}: {different[:5]}"


def weights_of(path: str) -> dict[str, Tensor]:
    """A checkpoint's weights, and its average's under `ema.`."""
    data = torch.load(path, weights_only=True)
    average = {f"ema.{k}": v for k, v in data.get("ema", {}).get("model", {}).items()}
    return {**data["model"], **average}


def metrics_of(cfg: CfgNode) -> list[dict[str, str]]:
    """metrics.json without what a clock measured; as texts, in which NaN equals itself."""
    lines = (Path(cfg.OUTPUT_DIR) / "metrics.json").read_text().splitlines()
    clock = ("time", "data_time", "eta_seconds", "rank_data_time")
    return [{k: repr(v) for k, v in json.loads(line).items() if k not in clock} for line in lines]
