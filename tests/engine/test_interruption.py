"""Which errors are said to be OUTPUT_DIR's; processes that end together."""

from __future__ import annotations

import errno
import io
import signal
import threading
import time
from multiprocessing import connection, resource_sharer
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from detectron2.utils import comm
from torch.distributed import distributed_c10d

from detr_family.engine import interruption
from detr_family.engine.interruption import StorageError, WorkerLostError, explained, explanation, leave_with_main
from detr_family.errors import UserError


@pytest.mark.parametrize("number", [errno.EACCES, errno.EIO, errno.ESTALE])
def test_an_image_that_cannot_be_read_is_no_error_of_the_output_folder(number: int, tmp_path: Path) -> None:
    folder = str(tmp_path / "out")  # of a machine that does not share it: it is not even there
    assert explanation(OSError(number, "no", str(tmp_path / "images" / "a.jpg")), folder) is None
    assert explanation(OSError(number, "no", str(tmp_path / "output" / "a.jpg")), folder) is None
    assert isinstance(explanation(OSError(number, "no", folder + "/metrics.json"), folder), StorageError)
    assert isinstance(explanation(OSError(number, "no"), folder), StorageError)


def test_the_others_end_once_the_main_process_has_saved(monkeypatch: pytest.MonkeyPatch) -> None:
    """Under torchrun nobody ends them else, and it kills them half a minute later."""
    store = dist.HashStore()
    monkeypatch.setattr(comm, "get_world_size", lambda: 2)
    monkeypatch.setattr(distributed_c10d, "_get_default_store", lambda: store)
    before = signal.getsignal(signal.SIGTERM)

    def save() -> None:
        time.sleep(0.2)
        store.set(interruption._SAVED, "")

    def seconds_of(main: bool) -> float:
        monkeypatch.setattr(comm, "is_main_process", lambda: main)
        start = time.monotonic()
        leave_with_main()
        return time.monotonic() - start

    try:
        threading.Thread(target=save).start()
        assert 0.1 < seconds_of(main=False) < interruption.GRACE / 2
        store.delete_key(interruption._SAVED)
        seconds_of(main=True)
        assert store.check([interruption._SAVED])
        store.delete_key(interruption._SAVED)
        monkeypatch.setattr(interruption, "GRACE", 0.3)
        assert seconds_of(main=False) >= 0.25, "it has nothing to wait for any more"
    finally:
        signal.signal(signal.SIGTERM, before)


@pytest.mark.parametrize("error", [ConnectionResetError(104, "reset"), EOFError(), FileNotFoundError(2, "no")])
def test_a_worker_that_ends_while_it_hands_a_batch_over(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise type(error)(*error.args)

    monkeypatch.setattr(connection, "Client", fail)
    remedy = r"while it handed a batch over .*lower DATALOADER.NUM_WORKERS"
    with pytest.raises(WorkerLostError, match=remedy), explained(str(tmp_path)):
        resource_sharer._resource_sharer.get_connection(("nowhere", 1))
    with pytest.raises(type(error)), explained(str(tmp_path)):
        fail()


def test_the_end_of_a_worker_is_told_where_it_cuts_into_a_save(tmp_path: Path) -> None:
    """torch's archive cannot be closed then, and says so in place of what came first."""

    class File(io.BytesIO):
        def write(self, data: Any) -> int:
            if not self.tell():
                return super().write(data)
            raise RuntimeError("DataLoader worker (pid 12) is killed by signal: Killed. ")

    with pytest.raises(RuntimeError, match="unexpected pos") as caught:
        torch.save(torch.zeros(3), File())
    with pytest.raises(WorkerLostError, match="process id 12 is killed"), explained(str(tmp_path)):
        raise caught.value


def test_what_comes_after_the_end_of_a_worker_is_not_told_as_it(tmp_path: Path) -> None:
    lost = RuntimeError("DataLoader worker (pid 12) is killed by signal: Killed. ")
    told = explanation(lost, str(tmp_path))
    assert told is not None
    told.__context__ = lost
    for way in ("told", "hidden", "circle"):
        error, other = RuntimeError("of another kind"), ValueError()
        if way == "told":
            error.__context__ = told
        elif way == "hidden":
            error.__context__, error.__suppress_context__ = lost, True
        else:
            error.__cause__, other.__cause__ = other, error
        assert explanation(error, str(tmp_path)) is None


def test_the_end_of_a_worker_is_told_once_also_where_its_signal_comes_late(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch raises from the handler of SIGCHLD: first in the middle of the telling, then in the wait after it."""
    told = interruption.explanation
    calls = []

    def disturbed(error: BaseException, folder: str) -> UserError | None:
        calls.append(error)
        if len(calls) == 1:
            raise RuntimeError("DataLoader worker (pid 12) is killed by signal: Killed. ")
        if len(calls) == 2:
            signal.setitimer(signal.ITIMER_REAL, 0.05)
        return told(error, folder)

    def second(*_: object) -> None:
        raise RuntimeError("DataLoader worker (pid 34) is killed by signal: Killed. ")

    monkeypatch.setattr(interruption, "explanation", disturbed)
    monkeypatch.setattr(interruption, "SIGNAL", 0.5)
    before = signal.signal(signal.SIGALRM, second)
    try:
        with pytest.raises(WorkerLostError, match="process id 34 is killed"), explained(str(tmp_path)):
            raise ConnectionResetError(104, "reset")
    finally:
        signal.signal(signal.SIGALRM, before)
    assert len(calls) == 3
