"""A batch computed in parts is the batch computed at once, and the batch spread over processes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from detectron2.engine import launch
from detectron2.utils import comm
from detectron2.utils.events import EventStorage
from engine_runs import run_cfg, train
from torch import Tensor

from detr_family.engine.optimizer import build_optimizer
from detr_family.engine.processes import run_and_leave
from detr_family.engine.step import TrainStep
from detr_family.engine.trainer import check_batch_size

# Parts of one image size and one greatest number of boxes, but with different numbers of boxes.
COUNTS = ((3, 1), (0, 3), (3, 0), (3, 3))


def images(step: int) -> list[list[dict[str, Any]]]:
    seeds = iter(range(100 * step, 100 * (step + 1)))
    return [[tiny.image(64, 96, count, seed=next(seeds)) for count in part] for part in COUNTS]


def five_steps(name: str, batches: list[list[dict[str, Any]]], accumulation: int) -> tuple[dict[str, Tensor], float]:
    cfg = tiny.cfg_of(name)
    for group in ("DN", "DINO"):
        if group in cfg.MODEL:  # whose noise would be drawn for other batches
            cfg.MODEL[group].LABEL_NOISE = cfg.MODEL[group].BOX_NOISE = 0.0
    cfg.SOLVER.BASE_LR, cfg.SOLVER.WEIGHT_DECAY = 1e-4, 1e-4
    torch.manual_seed(11)
    model = tiny.build_model(cfg)
    step = TrainStep(
        model, batches, build_optimizer(cfg, model), clip_norm=0.1, amp=False, accumulation=accumulation,
        nonfinite="stop", output_dir="",
    )  # fmt: skip
    with EventStorage() as storage:
        for step.iter in range(5):
            step.run_step()
            storage.step()
    return {k: p.detach() for k, p in model.named_parameters()}, storage.latest()["total_loss"][0]


@pytest.mark.parametrize("name", tiny.DETECTORS)
def test_parts_are_the_whole(name: str) -> None:
    whole, loss = five_steps(name, [[x for part in images(i) for x in part] for i in range(5)], 1)
    parts, parts_loss = five_steps(name, [part for i in range(5) for part in images(i)], len(COUNTS))
    assert parts_loss == pytest.approx(loss, rel=1e-5)
    for key, value in whole.items():
        torch.testing.assert_close(parts[key], value, rtol=0, atol=1e-5, msg=key)


def run_all(folder: Path, output: str, accumulation: int, names: list[str]) -> None:
    for name in names:
        opts = ["SOLVER.MAX_ITER", 5, "SOLVER.STEPS", (), "SOLVER.IMS_PER_BATCH", 8, "SOLVER.BASE_LR", 1e-4]
        opts += ["SOLVER.ACCUMULATION_STEPS", accumulation, "SOLVER.CHECKPOINT_PERIOD", 5]
        trainer = train(run_cfg(name, folder, f"{output}_{name}", opts))
        if comm.is_main_process():
            torch.save(trainer.checkpointer.model.state_dict(), folder / f"{output}_{name}.pth")


@pytest.mark.slow
def test_eight_parts_are_eight_processes(tmp_path: Path) -> None:
    """Whole trainings with augmentation and dropout: the parts draw what the processes draw."""
    names = list(tiny.DETECTORS)
    run_all(tmp_path, "parts", 8, names)
    launch(run_and_leave, 8, dist_url="auto", args=(run_all, tmp_path, "processes", 1, names))
    launch(run_and_leave, 2, dist_url="auto", args=(run_all, tmp_path, "both", 4, names))
    for name in names:
        parts = torch.load(tmp_path / f"parts_{name}.pth", weights_only=True)
        for output in ("processes", "both"):
            other = torch.load(tmp_path / f"{output}_{name}.pth", weights_only=True)
            for key, value in parts.items():
                torch.testing.assert_close(other[key], value, rtol=0, atol=1e-5, msg=f"{name} {output} {key}")


def test_a_batch_that_cannot_be_split_is_named() -> None:
    cfg = tiny.cfg_of("DETR")
    cfg.SOLVER.IMS_PER_BATCH, cfg.SOLVER.ACCUMULATION_STEPS = 16, 3
    with pytest.raises(ValueError, match=r"SOLVER\.IMS_PER_BATCH 16 .*SOLVER\.ACCUMULATION_STEPS 3"):
        check_batch_size(cfg)
    cfg.SOLVER.ACCUMULATION_STEPS = 0
    with pytest.raises(ValueError, match=r"SOLVER\.ACCUMULATION_STEPS is 0"):
        check_batch_size(cfg)
