"""Ends that come from outside: SIGTERM, a full disk, a folder that is gone or read-only, workers that are killed."""

from __future__ import annotations

import ctypes
import inspect
import itertools
import os
import resource
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from detectron2.config import CfgNode
from detectron2.engine import HookBase
from engine_runs import assert_bit_equal, everything, metrics_of, run_cfg, train

from detr_family.checkpoint.files import CheckpointError
from detr_family.engine import Trainer, interruption
from detr_family.engine.interruption import StorageError, WorkerLostError
from detr_family.errors import UserError
from detr_family.modeling import DINO

OPTS = ["SOLVER.MAX_ITER", 26, "SOLVER.STEPS", (18,), "SOLVER.EMA.ENABLED", True, "SOLVER.EMA.DECAY", 0.5]
OPTS += ["SOLVER.CHECKPOINT_PERIOD", 4, "TEST.EVAL_PERIOD", 8, "SOLVER.IMAGES_PER_FORWARD", 2]


def dino(folder: Path, output: str, *opts: Any) -> CfgNode:
    cfg = run_cfg("DINO", folder, output, [*OPTS, *opts])
    cfg.DATASETS.TEST = (cfg.DATASETS.COCO_FORMAT[1][0],)
    return cfg


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, torch.Tensor], list[dict[str, str]]]:
    """A run that nothing stopped."""
    cfg = dino(tmp_path_factory.mktemp("whole"), "out")
    return everything(train(cfg)), metrics_of(cfg)


class At(HookBase):
    """Does something after an iteration, before the other hooks have done theirs."""

    def __init__(self, iteration: int, act: Callable[[], object]) -> None:
        self.iteration, self.act = iteration, act

    def after_step(self) -> None:
        if self.trainer.iter == self.iteration:
            self.act()


def train_until(cfg: CfgNode, iteration: int, act: Callable[[], object], monkeypatch: pytest.MonkeyPatch) -> None:
    """Train, and do something once after the step of an iteration."""
    built = Trainer.build_hooks
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "build_hooks", lambda self: [At(iteration, act), *built(self)])
        train(cfg)


def ask_in_call(patch: pytest.MonkeyPatch, owner: Any, name: str, count: int) -> None:
    """Send SIGTERM to this process at the beginning of the `count`-th call of a method."""
    method, calls = getattr(owner, name), itertools.count(1)

    def asking(*args: Any, **kwargs: Any) -> Any:
        if next(calls) == count:
            os.kill(os.getpid(), signal.SIGTERM)
        return method(*args, **kwargs)

    patch.setattr(owner, name, staticmethod(asking) if inspect.ismethod(method) else asking)


# What is called when the signal comes, for which time, and how many iterations have then been done. A step has two
# forwards; evaluations, two each for the average, come after 8, 16, 24 and 26 iterations.
MOMENTS = [
    pytest.param(DINO, "forward", 2, 0, id="first step"),
    pytest.param(DINO, "forward", 13, 6, id="forward", marks=pytest.mark.slow),
    pytest.param(torch.optim.AdamW, "step", 15, 15, id="optimizer"),
    pytest.param(Trainer, "build_evaluator", 4, 16, id="evaluation"),
    pytest.param(Trainer, "build_evaluator", 7, 26, id="last evaluation", marks=pytest.mark.slow),
]


@pytest.mark.parametrize("owner, name, count, done", MOMENTS)
def test_sigterm_saves_and_ends_and_the_resumed_run_is_the_whole_one(
    owner: Any,
    name: str,
    count: int,
    done: int,
    whole: tuple[dict[str, torch.Tensor], list[dict[str, str]]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cfg = dino(tmp_path, "out")
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as ended:
        ask_in_call(patch, owner, name, count)
        train(cfg)
    assert ended.value.code == 143
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    assert (Path(cfg.OUTPUT_DIR) / "last_checkpoint").is_file() == (done != 0)
    resumed = train(cfg, resume=True)
    assert resumed.start_iter == done
    assert_bit_equal(whole[0], everything(resumed))
    assert metrics_of(cfg) == whole[1]


def shrunk(folder: Path) -> CfgNode:
    """A run of six iterations with a checkpoint every two."""
    return run_cfg("DETR", folder, "out", ["SOLVER.MAX_ITER", 6, "SOLVER.STEPS", ()])


def goes_on(cfg: CfgNode, start: int) -> None:
    """Resume, and see that the result is that of a run that nothing stopped."""
    resumed = train(cfg, resume=True)
    assert resumed.start_iter == start
    other = cfg.clone()
    other.OUTPUT_DIR = cfg.OUTPUT_DIR + "_whole"
    assert_bit_equal(everything(train(other)), everything(resumed))


def full_disk(folder: Path) -> None:
    """The next checkpoint meets the kernel's own "No space left on device"."""
    (folder / "model_0000003.pth.unfinished").symlink_to("/dev/full")


def too_large(folder: Path) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, resource.RLIM_INFINITY))


@pytest.mark.parametrize(
    "fault, why",
    [
        (full_disk, r"\(No space left on device, [\d.]+ MB are free\)\. Make space"),
        (too_large, r"\(File too large\)\. Have the limit on the size of files raised"),
    ],
    ids=["full disk", "limit"],
)
def test_a_checkpoint_that_cannot_be_written(
    fault: Callable[[Path], None],
    why: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    cfg = shrunk(tmp_path)
    folder = Path(cfg.OUTPUT_DIR)
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        with pytest.raises(CheckpointError, match=rf"\S+model_0000003.pth cannot be written {why}") as told:
            train_until(cfg, 2, lambda: fault(folder), monkeypatch)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert "The last whole checkpoint is model_0000001.pth, and --resume goes on from it" in str(told.value)
    assert "\n" not in str(told.value)
    assert sorted(path.name for path in folder.glob("*.pth*")) == ["model_0000001.pth"]
    goes_on(cfg, 2)


def test_an_output_folder_that_is_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cfg = shrunk(tmp_path)
    folder, away = Path(cfg.OUTPUT_DIR), tmp_path / "away"
    with pytest.raises(StorageError, match=r"OUTPUT_DIR \S+ is not there any more.*: bring it back"):
        train_until(cfg, 2, lambda: folder.rename(away), monkeypatch)
    assert not folder.exists(), "nothing may be written where a network folder is missing"
    away.rename(folder)
    goes_on(cfg, 2)


def test_metrics_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cfg = shrunk(tmp_path)
    (Path(cfg.OUTPUT_DIR) / "metrics.json").symlink_to("/dev/full")
    with pytest.raises(StorageError, match=r"OUTPUT_DIR \S+ cannot be written to \(No space left on device\): make"):
        train(cfg)
    (Path(cfg.OUTPUT_DIR) / "metrics.json").unlink()
    assert train(cfg, resume=True).start_iter == 6


def bind_read_only(folder: str) -> None:
    subprocess.run(["mount", "--bind", folder, folder], check=True, capture_output=True)
    subprocess.run(["mount", "-o", "remount,bind,ro", folder], check=True, capture_output=True)


@pytest.fixture
def unmounted(tmp_path: Path) -> Iterator[None]:
    """What was mounted on OUTPUT_DIR is not any more afterwards."""
    yield
    subprocess.run(["umount", str(tmp_path / "out")], capture_output=True, check=False)


@pytest.mark.usefixtures("unmounted")
def test_an_output_folder_that_becomes_read_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cfg = shrunk(tmp_path)
    try:
        bind_read_only(cfg.OUTPUT_DIR)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"needs the right to mount: {error}")
    with pytest.raises(UserError, match=r"OUTPUT_DIR \S+ cannot be written to \(Read-only file system\)"):
        Trainer(cfg)
    subprocess.run(["umount", cfg.OUTPUT_DIR], check=True)
    with pytest.raises(CheckpointError, match=r"\(Read-only file system\)\. Mend the cause"):
        train_until(cfg, 2, lambda: bind_read_only(cfg.OUTPUT_DIR), monkeypatch)
    subprocess.run(["umount", cfg.OUTPUT_DIR], check=True)
    goes_on(cfg, 2)


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="finds workers as Linux shows them")
def test_a_data_worker_that_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cfg = shrunk(tmp_path)
    cfg.DATALOADER.NUM_WORKERS, cfg.SOLVER.MAX_ITER = 2, 40

    def kill() -> None:
        tasks = Path("/proc/self/task").iterdir()
        workers = [int(pid) for task in tasks for pid in (task / "children").read_text().split()]
        os.kill(workers[-1], signal.SIGKILL)

    with pytest.raises(WorkerLostError, match=r"data worker .*: lower DATALOADER.NUM_WORK"):
        train_until(cfg, 2, kill, monkeypatch)
    start = 1 + int((Path(cfg.OUTPUT_DIR) / "last_checkpoint").read_text()[6:13])
    assert 2 <= start < 40
    cfg.DATALOADER.NUM_WORKERS = 0
    goes_on(cfg, start)


def test_data_workers_outlive_the_signal_that_asks_a_run_to_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Schedulers send it to all processes; the step that runs needs its workers."""
    cfg = shrunk(tmp_path)
    cfg.DATALOADER.NUM_WORKERS = 2

    def ask_workers() -> None:
        tasks = Path("/proc/self/task").iterdir()
        for pid in [int(pid) for task in tasks for pid in (task / "children").read_text().split()]:
            os.kill(pid, signal.SIGTERM)

    train_until(cfg, 1, ask_workers, monkeypatch)
    assert (Path(cfg.OUTPUT_DIR) / "model_final.pth").is_file()


@pytest.mark.skipif(sys.platform != "linux", reason="waits in a function of Linux's C library")
def test_a_process_that_cannot_answer_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that waits in a library's code, as for processes that are gone: Python never comes to run the handler."""
    monkeypatch.setattr(interruption, "GRACE", 0.3)
    child = os.fork()
    if not child:
        try:
            library, mutex = ctypes.CDLL(None), ctypes.create_string_buffer(64)
            with interruption.Listener(lambda: False).listening():
                threading.Timer(1, os.kill, (os.getpid(), signal.SIGTERM)).start()
                library.pthread_mutex_lock(mutex)
                library.pthread_mutex_lock(mutex)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 143
