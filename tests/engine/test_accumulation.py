"""A batch computed in parts is the batch computed at once, and the batch spread over processes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from detectron2.engine import create_ddp_model, launch
from detectron2.utils import comm
from detectron2.utils.events import EventStorage
from engine_runs import run_cfg, train
from torch import Tensor

from detr_family.config import departures, images_per_forward, load_config, parts_of_step
from detr_family.engine.optimizer import build_optimizer
from detr_family.engine.processes import run_and_leave
from detr_family.engine.step import TrainStep

CONFIGS = Path(__file__).resolve().parents[2] / "configs"

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


def run_all(folder: Path, output: str, images_per_forward: int, names: list[str]) -> None:
    for name in names:
        opts = ["SOLVER.MAX_ITER", 5, "SOLVER.STEPS", (), "SOLVER.IMS_PER_BATCH", 8, "SOLVER.BASE_LR", 1e-4]
        opts += ["SOLVER.IMAGES_PER_FORWARD", images_per_forward, "SOLVER.CHECKPOINT_PERIOD", 5]
        trainer = train(run_cfg(name, folder, f"{output}_{name}", opts))
        if comm.is_main_process():
            torch.save(trainer.checkpointer.model.state_dict(), folder / f"{output}_{name}.pth")


@pytest.mark.slow
def test_eight_parts_are_eight_processes(tmp_path: Path) -> None:
    """Whole trainings with augmentation and dropout: the parts draw what the processes draw."""
    names = list(tiny.DETECTORS)
    run_all(tmp_path, "parts", 1, names)
    launch(run_and_leave, 8, dist_url="auto", args=(run_all, tmp_path, "processes", 1, names))
    launch(run_and_leave, 2, dist_url="auto", args=(run_all, tmp_path, "both", 1, names))
    for name in names:
        parts = torch.load(tmp_path / f"parts_{name}.pth", weights_only=True)
        for output in ("processes", "both"):
            other = torch.load(tmp_path / f"{output}_{name}.pth", weights_only=True)
            for key, value in parts.items():
                torch.testing.assert_close(other[key], value, rtol=0, atol=1e-5, msg=f"{name} {output} {key}")


def one_step(name: str, parts: list[list[dict[str, Any]]]) -> tuple[dict[str, float], dict[str, Tensor]]:
    """Losses and gradients of one step on these parts, with the noise and dropout that a training draws."""
    cfg = tiny.cfg_of(name)
    cfg.MODEL.DETR.DROPOUT = 0.1
    torch.manual_seed(11)
    model = create_ddp_model(tiny.build_model(cfg), broadcast_buffers=False, device_ids=None)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.0)
    step = TrainStep(
        model, parts, optimizer, clip_norm=None, amp=False, accumulation=len(parts), seed=3, nonfinite="stop",
        output_dir="",
    )  # fmt: skip
    with EventStorage() as storage:
        step.iter = 0
        step.run_step()
        losses = {k: v for k, (v, _) in storage.latest().items() if k != "data_time"}
    return losses, {k.removeprefix("module."): p.grad for k, p in model.named_parameters() if p.requires_grad}


def part_of_rank(path: Path) -> None:
    torch.set_num_threads(1)
    parts = uneven_parts(comm.get_world_size())
    results = {name: one_step(name, [parts[comm.get_rank()]]) for name in tiny.DETECTORS}
    if comm.is_main_process():
        torch.save(results, path)


def uneven_parts(count: int) -> list[list[dict[str, Any]]]:
    """Parts of one image each, of several sizes and numbers of boxes, one of them without any."""
    counts = [3, 0, 2, 1, 4, 3, 1, 2]
    return [[tiny.image(64 + 16 * (i % 3), 96, counts[i], seed=i)] for i in range(count)]


@pytest.mark.parametrize("count", [2, pytest.param(8, marks=pytest.mark.slow)])
def test_parts_have_the_losses_and_gradients_of_processes(count: int, tmp_path: Path) -> None:
    launch(run_and_leave, count, dist_url="auto", args=(part_of_rank, tmp_path / "processes"))
    processes = torch.load(tmp_path / "processes", weights_only=True)
    for name in tiny.DETECTORS:
        losses, gradients = one_step(name, uneven_parts(count))
        assert processes[name][0] == pytest.approx(losses, rel=1e-5), name
        for key, gradient in gradients.items():
            torch.testing.assert_close(processes[name][1][key], gradient, rtol=1e-3, atol=2e-5, msg=f"{name} {key}")


@pytest.mark.parametrize(
    ("config", "processes", "images", "parts"),
    [
        ("detr_r50", 8, 2, 4), ("detr_r50", 32, 2, 1), ("detr_r50", 1, 2, 32), ("detr_r50", 64, 1, 1),
        ("detr_r50_dc5", 8, 1, 8), ("detr_r101_dc5", 8, 1, 8), ("conditional_detr_r50", 8, 2, 1),
        ("conditional_detr_r50_dc5", 8, 1, 2), ("dab_detr_r50", 4, 2, 2), ("dab_detr_r50_dc5_3pat", 4, 1, 4),
        ("dn_detr_r50", 2, 2, 4), ("dn_detr_r101_dc5", 2, 1, 8), ("dino_r50_4scale", 8, 2, 1),
        ("dino_r50_5scale", 8, 1, 2), ("dino_swin_l_5scale", 8, 1, 2), ("dino_swin_l_4scale_o365", 8, 1, 8),
        ("dino_quickstart", 1, 8, 1),
    ],
)  # fmt: skip
def test_one_forward_sees_as_many_images_as_in_the_release(
    config: str, processes: int, images: int, parts: int
) -> None:
    path = str(CONFIGS / f"{config}.yaml")
    cfg = load_config(path)
    assert (images_per_forward(cfg, processes), parts_of_step(cfg, processes)) == (images, parts)
    told = [f"images in one forward of a process are 1 (recipe: {cfg.SOLVER.IMAGES_PER_FORWARD})"]
    assert departures(cfg, path, processes) == (told if processes == 64 else [])


def test_parts_are_as_few_as_the_limit_allows_and_departures_are_told() -> None:
    path = str(CONFIGS / "detr_r50.yaml")
    cases = [(6, 4, 1, 2), (7, 2, 1, 7), (12, 5, 3, 3), (12, 5, 2, 3), (4, 0, 1, 1), (4, 9, 2, 2)]
    for share, most, steps, parts in cases:
        cfg = load_config(path, ["SOLVER.IMS_PER_BATCH", str(2 * share), "SOLVER.IMAGES_PER_FORWARD", str(most)])
        cfg.SOLVER.ACCUMULATION_STEPS = steps
        assert parts_of_step(cfg, 2) == parts
    cfg = load_config(path, ["SOLVER.IMAGES_PER_FORWARD", "0"])
    assert departures(cfg, path, 16) == ["images in one forward of a process are 4 (recipe: 2)"]
    cfg.SOLVER.ACCUMULATION_STEPS = 2
    assert departures(cfg, path, 16) == []
    cfg.SOLVER.IMAGES_PER_FORWARD = -1
    with pytest.raises(ValueError, match=r"SOLVER\.IMAGES_PER_FORWARD is -1"):
        parts_of_step(cfg, 2)


def test_a_batch_that_cannot_be_split_is_named() -> None:
    cfg = tiny.cfg_of("DETR")
    cfg.SOLVER.IMS_PER_BATCH, cfg.SOLVER.ACCUMULATION_STEPS = 16, 3
    with pytest.raises(ValueError, match=r"SOLVER\.IMS_PER_BATCH 16 .*SOLVER\.ACCUMULATION_STEPS 3"):
        parts_of_step(cfg, 1)
    cfg.SOLVER.ACCUMULATION_STEPS = 0
    with pytest.raises(ValueError, match=r"SOLVER\.ACCUMULATION_STEPS is 0"):
        parts_of_step(cfg, 1)
