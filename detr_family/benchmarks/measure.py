"""Time and memory of a call on the CPU."""

from __future__ import annotations

import ctypes
import statistics
import time
from collections.abc import Callable
from pathlib import Path

Run = Callable[[], object]


def time_on_cpu(runs: dict[str, Run], repeats: int, wall: bool) -> dict[str, float]:
    """Median seconds per call: CPU time of the process (or wall-clock time), the contestants in turn."""
    clock = time.perf_counter if wall else time.process_time
    times: dict[str, list[float]] = {name: [] for name in runs}
    for round_number in range(repeats + 1):
        for name, run in runs.items():
            begin = clock()
            run()
            if round_number:  # the first round warms up
                times[name].append(clock() - begin)
    return {name: statistics.median(values) for name, values in times.items()}


def peak_of(run: Run) -> int:
    """Bytes that a call takes at its peak beyond what the process had before (Linux).

    A first call loads code and counts for more: make one on a smaller problem before. Memory that an earlier, larger
    call left to the process may go unseen, so measure in a process of its own.
    """
    ctypes.CDLL(None).malloc_trim(0)  # what is free is given back, lest it be used again unseen
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = _resident("VmRSS")
    kept = run()
    peak = _resident("VmHWM") - before
    del kept
    return peak


def _resident(field: str) -> int:
    """Bytes of this process in memory: VmRSS now, VmHWM at most."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {field}")
