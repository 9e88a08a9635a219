"""Data workers outlive a SIGTERM, but not the process that they work for."""

from __future__ import annotations

import multiprocessing
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from detr_family.data import workers

SCRIPT = """
import multiprocessing, sys, time
import workers  # alone: the package takes seconds

def work(outlive, ready):
    outlive(0)
    ready.set()
    time.sleep(600)

def begin():
    global worker
    ready = context.Event()
    worker = context.Process(target=work, args=(workers.outliving_sigterm(), ready), daemon=True)
    worker.start()
    ready.wait()
    worker.terminate()
    worker.join(0.5)
    print(worker.exitcode, time.monotonic(), flush=True)

if __name__ == "__main__":
    context = multiprocessing.get_context(sys.argv[1])
    if sys.argv[2] == "main":
        begin()
    else:  # in one of the processes of a run
        workers.outliving_sigterm()
        process = multiprocessing.get_context("fork").Process(target=begin)
        process.start()
        process.join()
"""


@pytest.mark.skipif(not hasattr(signal, "SIGALRM"), reason="workers end at once on this system")
@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="forks")
@pytest.mark.parametrize("process", ["main", "another"])
@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_a_worker_outlives_the_signal_but_does_not_hold_up_the_end_of_its_process(
    method: str, process: str, tmp_path: Path
) -> None:
    (tmp_path / "script.py").write_text(SCRIPT)
    (tmp_path / "workers.py").write_bytes(Path(workers.__file__).read_bytes())
    command = [sys.executable, str(tmp_path / "script.py"), method, process]
    ran = subprocess.run(command, capture_output=True, text=True, check=True, timeout=600)
    exitcode, started_to_leave = ran.stdout.split()
    assert exitcode == "None", "the worker has ended"
    assert time.monotonic() - float(started_to_leave) < 45  # it would end by itself after 60 seconds
