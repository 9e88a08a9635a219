"""Two trainings into one OUTPUT_DIR: the second is refused by the first's name; a killed one is no obstacle."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from detectron2.utils import comm
from engine_runs import run_cfg, train

from detr_family.engine import Trainer
from detr_family.engine.occupation import FILE, OccupiedError, leave, occupy

HOLD = """
import sys
from detr_family.engine.occupation import occupy
import os
occupy(sys.argv[1])
if not os.fork():  # as a data worker, which lives on for a while when the run is killed
    sys.stdin.read()
    os._exit(0)
print("held", flush=True)
sys.stdin.read()
"""


def test_the_second_run_is_refused_until_the_first_is_gone(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    other = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert other.stdout is not None and other.stdout.readline() == "held\n"
    with pytest.raises(OccupiedError) as refused:
        occupy(str(folder))
    owner = f"process {other.pid} on {socket.gethostname()}"
    assert str(refused.value) == (
        f"OUTPUT_DIR {folder} is in use by {owner}: wait for that run, end it, or choose another OUTPUT_DIR"
    )
    assert (folder / FILE).read_text().strip() == owner, "being refused leaves the first one's name"
    with pytest.raises(OccupiedError, match=f"in use by {owner}"):
        Trainer(run_cfg("DETR", tmp_path, "out"))
    other.send_signal(signal.SIGKILL)
    other.wait()
    try:
        occupy(str(folder))  # though the child lives and the file is there
        assert (folder / FILE).read_text() == f"process {os.getpid()} on {socket.gethostname()}\n"
    finally:
        leave(str(folder))
        other.communicate()
    assert not (folder / FILE).exists()


def test_a_training_gives_its_folder_back(tmp_path: Path) -> None:
    cfg = run_cfg("DETR", tmp_path, "out")
    train(cfg, stop_after=3)
    assert not (tmp_path / "out" / FILE).exists()
    trainer = Trainer(cfg)
    assert (tmp_path / "out" / FILE).is_file()
    trainer.resume_or_load(True)  # the process's own is no obstacle
    Trainer(cfg)
    leave(cfg.OUTPUT_DIR)


def test_all_processes_are_refused_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(comm, "is_main_process", lambda: False)
    monkeypatch.setattr(comm, "all_gather", lambda own: ["OUTPUT_DIR x is in use by process 1 on a", own])
    with pytest.raises(OccupiedError, match="in use by process 1 on a"):
        occupy(str(tmp_path))


def test_a_file_system_without_locks_is_no_obstacle(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    import errno
    import fcntl

    def none(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", none)
    occupy(str(tmp_path))
    assert "Nothing keeps a second run out of" in caplog.text and "No locks available" in caplog.text


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OccupiedError, match=r"file/out cannot be written to \(Not a directory\)"):
        occupy(str(tmp_path / "file" / "out"))
