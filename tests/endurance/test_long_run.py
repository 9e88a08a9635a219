"""A long run takes no more memory and no more files at its end than at its beginning, its data workers neither.

ENDURANCE_STEPS=20000 makes it as long as a day's training has steps (docs/training.md); cut down by default.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
from detectron2.engine import HookBase
from engine_runs import run_cfg, train

from detr_family.engine import Trainer

STEPS = int(os.environ.get("ENDURANCE_STEPS", "240"))
SAMPLES = 24
WARM = SAMPLES // 3  # the first third is left out: caches fill


def children(pid: int) -> list[int]:
    tasks = Path(f"/proc/{pid}/task").iterdir()
    return [int(child) for task in tasks for child in (task / "children").read_text().split()]


def memory(pid: int) -> int:
    """What is resident, bytes."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")


def handles(pid: int) -> int:
    return len(list(Path(f"/proc/{pid}/fd").iterdir()))


class Watch(HookBase):
    """Samples (memory, file handles) of this process and its data workers, by process id."""

    def __init__(self, period: int) -> None:
        self.period = period
        self.samples: dict[int, list[tuple[int, int]]] = {}

    def after_step(self) -> None:
        if (self.trainer.iter + 1) % self.period == 0:
            for pid in [os.getpid(), *children(os.getpid())]:
                self.samples.setdefault(pid, []).append((memory(pid), handles(pid)))
            print(self.trainer.iter + 1, {pid: x[-1] for pid, x in self.samples.items()}, file=sys.stderr, flush=True)


@pytest.mark.long
@pytest.mark.skipif(not Path("/proc/self/statm").is_file(), reason="reads memory as Linux shows it")
def test_memory_and_file_handles_stay_flat(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cfg = run_cfg("DETR", tmp_path, "run", ["DATALOADER.NUM_WORKERS", 2, "SOLVER.IMS_PER_BATCH", 2])
    cfg.SOLVER.MAX_ITER, cfg.SOLVER.STEPS, cfg.SOLVER.EMA.ENABLED = STEPS, (), True
    cfg.MODEL.DETR.DEC_LAYERS, cfg.SOLVER.MAX_TO_KEEP = 1, 2
    cfg.SOLVER.CHECKPOINT_PERIOD = cfg.TEST.EVAL_PERIOD = max(STEPS // SAMPLES // 2, 1)
    cfg.DATASETS.TEST = (cfg.DATASETS.COCO_FORMAT[1][0],)
    watch = Watch(STEPS // SAMPLES)
    built = Trainer.build_hooks
    monkeypatch.setattr(Trainer, "build_hooks", lambda self: [watch, *built(self)])
    train(cfg)
    long_lived = {pid: x for pid, x in watch.samples.items() if len(x) == SAMPLES}
    assert len(long_lived) == 3, "the main process and two workers"  # those of evaluations come and go
    for pid, samples in long_lived.items():
        size = [x for x, _ in samples[WARM:]]
        first, last = sum(size[:4]) / 4, sum(size[-4:]) / 4
        assert last <= 1.02 * first, f"{'main' if pid == os.getpid() else 'worker'}: {[x >> 20 for x in size]} MiB"
        count = [n for _, n in samples[WARM:]]
        assert max(count[-4:]) <= max(count[:4]), f"file handles: {count}"
