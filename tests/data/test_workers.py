"""Data workers outlive a SIGTERM, but not the process that they work for."""

from __future__ import annotations

import multiprocessing
import signal
import subprocess
import sys
import time

import pytest

from detr_family.data import workers

SCRIPT = """
import importlib.util, multiprocessing, sys, time
spec = importlib.util.spec_from_file_location("workers", sys.argv[1])  # alone: the package takes seconds
workers = importlib.util.module_from_spec(spec)
spec.loader.exec_module(workers)

def work(ready):
    workers.outlive_sigterm(0)
    ready.set()
    time.sleep(600)

context = multiprocessing.get_context("fork")
ready = context.Event()
worker = context.Process(target=work, args=(ready,), daemon=True)
worker.start()
ready.wait()
worker.terminate()
worker.join(0.5)
print(worker.exitcode, time.monotonic(), flush=True)
"""


@pytest.mark.skipif(not hasattr(signal, "SIGALRM"), reason="workers end at once on this system")
@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="forks")
def test_a_worker_outlives_the_signal_but_does_not_hold_up_the_end_of_its_process() -> None:
    ran = subprocess.run(
        [sys.executable, "-c", SCRIPT, workers.__file__], capture_output=True, text=True, check=True, timeout=600
    )
    exitcode, started_to_leave = ran.stdout.split()
    assert exitcode == "None", "the worker has ended"
    assert time.monotonic() - float(started_to_leave) < 45  # it would end by itself after 60 seconds
