"""Data workers and the signal that asks a run to end."""

from __future__ import annotations

import atexit
import mmap
import multiprocessing.util  # noqa: F401  (its function for the interpreter's end has to be registered before ours)
import os
import signal
from types import FrameType

# What a worker has left, in seconds, once it was asked to end: time for the main process to finish its step.
OUTLIVES = 60
_leaving = mmap.mmap(-1, 1)  # shared with the workers that this process forks; 1: it ends
_owner = os.getpid()


@atexit.register
def _leave() -> None:
    """Before multiprocessing sends SIGTERM to the workers that are left, and waits for them."""
    if os.getpid() == _owner:
        _leaving[0] = 1


def outlive_sigterm(_worker: int) -> None:
    """For a DataLoader's `worker_init_fn`: a SIGTERM to all processes does not take the workers from under a step.

    Schedulers send it to every process of a job. The main process finishes its step and saves; a worker that ended at
    once would make it fail instead. A worker ends with the main process, and by itself after a minute.
    """
    signal.set_wakeup_fd(-1)  # the main process's
    if hasattr(signal, "SIGALRM"):
        signal.signal(signal.SIGTERM, _end_later)


def _end_later(_number: int, _frame: FrameType | None) -> None:
    if _leaving[0]:
        os._exit(0)
    signal.alarm(OUTLIVES)
