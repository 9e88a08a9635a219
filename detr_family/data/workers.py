"""Data workers and the signal that asks a run to end."""

from __future__ import annotations

import ctypes
import functools
import multiprocessing
import multiprocessing.util
import os
import signal
from collections.abc import Callable
from types import FrameType
from typing import Any

# What a worker has left, in seconds, once it was asked to end: time for the main process to finish its step.
OUTLIVES = 60


def outliving_sigterm() -> Callable[[int], None]:
    """A DataLoader's `worker_init_fn`: a SIGTERM to all processes does not take the workers from under a step.

    Schedulers send it to every process of a job. The main process finishes its step and saves; a worker that ended at
    once would make it fail instead. A worker ends with the process that it works for, and by itself after a minute.
    """
    return functools.partial(_outlive, _leaving(os.getpid()))


@functools.lru_cache(maxsize=1)
def _leaving(_pid: int) -> Any:
    """What tells the workers of this process, forked or spawned, that it ends."""
    flag = multiprocessing.RawValue(ctypes.c_bool, False)
    # Before multiprocessing sends SIGTERM to the workers that are left, and waits for them.
    multiprocessing.util.Finalize(None, setattr, args=(flag, "value", True), exitpriority=0)
    return flag


def _outlive(leaving: Any, _worker: int) -> None:
    signal.set_wakeup_fd(-1)  # the main process's
    if hasattr(signal, "SIGALRM"):
        signal.signal(signal.SIGTERM, functools.partial(_end_later, leaving))


def _end_later(leaving: Any, _number: int, _frame: FrameType | None) -> None:
    if leaving.value:
        os._exit(0)
    signal.alarm(OUTLIVES)
