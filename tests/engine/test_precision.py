"""Mixed precision in float16, with a scaled loss, and in bfloat16."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from detectron2.engine import HookBase
from detectron2.utils.events import EventStorage
from engine_runs import run_cfg
from torch import Tensor

from detr_family.engine import Trainer
from detr_family.engine.optimizer import build_optimizer
from detr_family.engine.randomness import seed_all
from detr_family.engine.step import PRECISIONS, TrainStep


def steps(name: str, precision: str, count: int) -> tuple[TrainStep, dict[str, float]]:
    cfg = tiny.cfg_of(name)
    cfg.SOLVER.BASE_LR = 1e-4
    model = tiny.build(name)
    step = TrainStep(
        model, [tiny.batch()] * count, build_optimizer(cfg, model), clip_norm=0.1, amp=True, precision=precision,
        nonfinite="stop", output_dir="",
    )  # fmt: skip
    with EventStorage() as storage:
        for step.iter in range(count):
            step.run_step()
            storage.step()
        return step, {k: v[0] for k, v in storage.latest().items()}


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", tiny.DETECTORS)
def test_layers_compute_in_it_and_boxes_and_losses_in_float32(name: str, precision: str) -> None:
    model = tiny.build(name).train()
    seen: list[tuple[torch.dtype, torch.dtype]] = []
    predict = model.criterion.__class__.__call__

    def spy(criterion: Any, prediction: Any, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        seen.append((prediction.layer_logits.dtype, prediction.layer_boxes.dtype))
        return predict(criterion, prediction, *args, **kwargs)

    model.criterion.__class__.__call__ = spy
    try:
        plain = sum(x.item() for x in model(tiny.batch()).values())
        seen.clear()
        with torch.autocast("cpu", dtype=PRECISIONS[precision]):
            losses = model(tiny.batch())
    finally:
        model.criterion.__class__.__call__ = predict
    assert seen and all(logits == PRECISIONS[precision] and boxes == torch.float32 for logits, boxes in seen)
    assert all(x.dtype == torch.float32 for x in losses.values())
    assert sum(x.item() for x in losses.values()) == pytest.approx(plain, rel=0.1)


@pytest.mark.parametrize("name", tiny.DETECTORS)
def test_only_float16_scales_the_loss(name: str) -> None:
    step, logged = steps(name, "float16", 12)  # the first ones find the scale
    assert step.grad_scaler.is_enabled() and step.grad_scaler.state_dict()["scale"] > 1
    assert logged["total_loss"] > 0
    before = tiny.build(name).state_dict()
    assert any(not torch.equal(value, before[key]) for key, value in step.model.state_dict().items())
    step, logged = steps(name, "bfloat16", 1)
    assert not step.grad_scaler.is_enabled() and logged["grad_norm"] > 0


def test_other_words_are_refused() -> None:
    with pytest.raises(ValueError, match=r"SOLVER\.AMP\.PRECISION is 'fp16'; it may be 'float16' or 'bfloat16'"):
        steps("DETR", "fp16", 1)


class Losses(HookBase):
    def __init__(self) -> None:
        self.values: list[float] = []

    def after_step(self) -> None:
        self.values.append(self.trainer.storage.latest()["total_loss"][0])


@pytest.mark.slow
@pytest.mark.parametrize("name", tiny.DETECTORS)
def test_it_trains_to_the_loss_of_float32(name: str, tmp_path: Path) -> None:
    """On shapes as the quickstart's: the mean loss of the last of 240 steps, within 2 %."""
    torch.set_num_threads(1)
    reached = {}
    for precision in ("float32", *PRECISIONS):
        opts: list[Any] = ["SOLVER.MAX_ITER", 240, "SOLVER.STEPS", (), "SOLVER.IMS_PER_BATCH", 4]
        opts += ["SOLVER.CHECKPOINT_PERIOD", 1000, "SOLVER.AMP.ENABLED", precision != "float32"]
        if precision != "float32":
            opts += ["SOLVER.AMP.PRECISION", precision]
        cfg = run_cfg(name, tmp_path, precision, opts)
        seed_all(5)
        trainer, losses = Trainer(cfg), Losses()
        trainer.register_hooks([losses])
        trainer.train()
        reached[precision] = sum(losses.values[-100:]) / 100
        first = sum(losses.values[:10]) / 10
    assert reached["float32"] < 0.8 * first
    for precision in PRECISIONS:
        assert reached[precision] == pytest.approx(reached["float32"], rel=0.02), reached
