"""A run that is killed at any moment, as often as it may be, and resumed ends as one that nothing stopped."""

from __future__ import annotations

import argparse
import multiprocessing
import os
import random
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from detectron2.config import CfgNode
from detectron2.engine import HookBase
from detectron2.evaluation import COCOEvaluator
from detectron2.utils import comm
from engine_runs import assert_bit_equal, metrics_of, run_cfg, train

from detr_family.data.datasets.coco import register_datasets
from detr_family.engine import Trainer, processes

STEPS = 54
MOMENTS = ["first step", "save", "random", "evaluation", "save", "random", "first step", "evaluation", "random", "save"]


def killed_cfg(folder: Path, output: str, *opts: Any) -> CfgNode:
    """DINO with an average, a batch in parts, two data workers, and evaluations between."""
    settings: list[Any] = ["SOLVER.MAX_ITER", STEPS, "SOLVER.STEPS", (30,), "SOLVER.CHECKPOINT_PERIOD", 3]
    settings += ["SOLVER.EMA.ENABLED", True, "SOLVER.EMA.DECAY", 0.9, "SOLVER.IMAGES_PER_FORWARD", 2]
    settings += ["TEST.EVAL_PERIOD", 6, "DATALOADER.NUM_WORKERS", 2]
    cfg = run_cfg("DINO", folder, output, [*settings, *opts])
    cfg.DATASETS.TEST = (cfg.DATASETS.COCO_FORMAT[1][0],)
    return cfg


def state_of(cfg: CfgNode) -> dict[str, torch.Tensor]:
    """Every tensor of the last checkpoint of a run: weights, average, optimizer."""
    data = torch.load(Path(cfg.OUTPUT_DIR) / "model_final.pth", weights_only=True)
    found = dict(data["model"])
    found.update({f"ema.{k}": v for k, v in data["ema"]["model"].items()})
    for i, state in data["trainer"]["_trainer"]["optimizer"]["state"].items():
        found.update({f"optimizer.{i}.{k}": torch.as_tensor(v) for k, v in state.items()})
    return found


def kill_in_call(owner: Any, name: str, count: int) -> None:
    """This process ends in the `count`-th call of a method, after it has done its work."""
    method, calls = getattr(owner, name), 0

    def deadly(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        result = method(*args, **kwargs)
        if calls == count:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    setattr(owner, name, deadly)


def kill_in_save(seed: int, count: int) -> None:
    """This process ends when the `count`-th checkpoint is written in part."""
    save, calls = torch.save, 0

    def deadly(data: Any, file: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == count:
            save(data, part := file.name + ".part")
            content = Path(part).read_bytes()
            os.remove(part)
            file.write(content[: random.Random(seed).randrange(len(content))])
            file.flush()
            os.kill(os.getpid(), signal.SIGKILL)
        save(data, file)

    torch.save = deadly


def kill_after_steps(draw: random.Random) -> None:
    """This process ends at a random moment of the two steps after the first, or of what comes between them."""
    step, calls, start = Trainer.run_step, 0, 0.0

    def timed(self: Trainer) -> None:
        nonlocal calls, start
        start = start or time.monotonic()
        step(self)
        calls += 1
        if calls == 1:  # in time of this process's own, on a machine that is busy, too
            wait = draw.uniform(0, 2) * (time.monotonic() - start)
            threading.Timer(wait, os.kill, (os.getpid(), signal.SIGKILL)).start()

    Trainer.run_step = timed


def run_until_killed(cfg: CfgNode, moment: str, seed: int) -> None:
    """Resume and train in a process of its own."""
    multiprocessing.set_start_method("fork", force=True)  # data workers see that this process is gone
    if moment == "save":
        kill_in_save(seed, 1 + seed % 2)
    elif moment == "evaluation":  # of the weights or of the average, in the middle or before its figures
        kill_in_call(COCOEvaluator, ("process", "evaluate")[seed % 2], 1 + seed % 3)
    elif moment == "first step":
        kill_in_call(torch.optim.AdamW, "step", 1)
    elif moment == "random":
        kill_after_steps(random.Random(seed))
    register_datasets(cfg)
    train(cfg, resume=True)


@pytest.mark.long
def test_ten_kills_at_random_moments(tmp_path: Path) -> None:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["detr_family.engine", "detectron2.utils.events", "tensorboard", "engine_runs"])
    whole = killed_cfg(tmp_path, "whole")
    train(whole)
    cfg = killed_cfg(tmp_path, "killed")
    draw = random.Random(7)
    unfinished = kills = 0
    for moment in [*MOMENTS, "none", "none"]:
        process = context.Process(target=run_until_killed, args=(cfg, moment, draw.randrange(1000)))
        process.start()
        process.join()
        unfinished += bool(list(Path(cfg.OUTPUT_DIR).glob("*.unfinished")))
        if process.exitcode == 0:
            break
        assert process.exitcode == -signal.SIGKILL
        kills += 1
    assert kills == len(MOMENTS) and unfinished >= 1
    assert_bit_equal(state_of(whole), state_of(cfg))
    assert metrics_of(whole) == metrics_of(cfg)


class KillAt(HookBase):
    """Ends this process after an iteration's step."""

    def __init__(self, iteration: int) -> None:
        self.iteration = iteration

    def after_step(self) -> None:
        if self.trainer.iter == self.iteration:
            (Path(self.trainer.cfg.OUTPUT_DIR) / "killed").write_text("")
            os.kill(os.getpid(), signal.SIGKILL)


def one_of_two(args: argparse.Namespace) -> None:
    """What each of two processes runs; the second ends where it is told to."""
    folder, output, kill_at = args.opts
    opts = ["SOLVER.MAX_ITER", 14, "SOLVER.IMAGES_PER_FORWARD", 1, "DATALOADER.NUM_WORKERS", 0]  # workers start slowly
    cfg = killed_cfg(Path(folder), output, *opts)
    if comm.get_rank() == 1 and int(kill_at):
        built = Trainer.build_hooks
        Trainer.build_hooks = lambda self: [KillAt(int(kill_at)), *built(self)]
    train(cfg, resume=True)


def in_two_processes(folder: Path, output: str, kill_at: int = 0) -> int:
    """The status that the launcher ends with."""
    flags = ["--num-gpus", "2", "--dist-url", "auto", str(folder), output, str(kill_at), "x"]
    args = processes.argument_parser().parse_args(flags)
    args.opts = args.opts[:3]
    try:
        processes.launch(one_of_two, args)
    except SystemExit as ended:
        return int(ended.code or 0)
    return 0


def ask_when(path: Path) -> None:
    """Send SIGTERM to this process, the launcher, once a file is there."""
    while not path.exists():
        time.sleep(0.01)
    os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.long
def test_of_two_processes_one_is_killed_then_both_are_asked_to_end(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run_cfg("DINO", tmp_path, "whole")  # writes the data
    assert in_two_processes(tmp_path, "whole") == 0
    assert in_two_processes(tmp_path, "out", kill_at=4) == 2
    out = tmp_path / "out"
    assert time.time() - (out / "killed").stat().st_mtime < 60
    last = capfd.readouterr().err.strip().splitlines()[-1]
    assert "process 1 of this run (process id " in last and "was ended by SIGKILL, and the others with it" in last

    threading.Thread(target=ask_when, args=(out / "model_0000008.pth",), daemon=True).start()
    assert in_two_processes(tmp_path, "out") == 143
    reached = int((out / "last_checkpoint").read_text()[6:13])
    assert 8 <= reached < 14
    assert in_two_processes(tmp_path, "out") == 0
    one, other = (killed_cfg(tmp_path, name) for name in ("whole", "out"))
    assert_bit_equal(state_of(one), state_of(other))
    assert metrics_of(one) == metrics_of(other)
