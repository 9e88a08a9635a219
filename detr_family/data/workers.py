"""Data workers and the signal that asks a run to end."""

from __future__ import annotations

import signal
from types import FrameType

# What a worker has left, in seconds, once it was asked to end: time for the main process to finish its step.
OUTLIVES = 60


def outlive_sigterm(_worker: int) -> None:
    """For a DataLoader's `worker_init_fn`: a SIGTERM to all processes does not take the workers from under a step.

    Schedulers send it to every process of a job. The main process finishes its step and saves; a worker that ended at
    once would make it fail instead. A worker ends with the main process, and by itself after a minute.
    """
    signal.set_wakeup_fd(-1)  # the main process's
    if hasattr(signal, "SIGALRM"):
        signal.signal(signal.SIGTERM, _end_later)


def _end_later(_number: int, _frame: FrameType | None) -> None:
    signal.alarm(OUTLIVES)
