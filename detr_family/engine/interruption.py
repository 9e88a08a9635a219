"""Runs that end before their time: asked to (SIGTERM), for want of disk, or since another process has ended.

What is then saved is the state after the last whole step: between the moment that the optimizer begins to move the
weights and the moment that schedule and average have followed, nothing is saved and no signal is answered.
"""

from __future__ import annotations

import errno
import logging
import os
import re
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from types import FrameType
from typing import Any

from detectron2.utils import comm
from torch.distributed import distributed_c10d

from detr_family.errors import UserError

SIGNAL = 1  # seconds in which a data worker's end is told by the system after the connection to it is lost
GRACE = 60  # seconds after SIGTERM in which a process has to be where Python can answer it
_SAVED = "detr_family/saved"  # in the processes' store: the main one has
STATUS = 128 + signal.SIGTERM  # as shells give it
_WORKER = re.compile(r"DataLoader worker \(pid\(?s?\)?:? ?(?P<pids>[\d, ]+)\) (?P<what>[^\n]*)")
_CONNECTION = re.compile(
    r"connection (closed|reset|was closed)|closed by peer|reset by peer|broken pipe|remote process exited"
    r"|watchdog.*timeout|timed out waiting",
    re.IGNORECASE,
)
_STORAGE = {
    errno.ENOSPC: "make space",
    errno.EDQUOT: "make space, or have the quota raised",
    errno.EFBIG: "have the limit on the size of files raised (ulimit -f)",
    errno.EROFS: "make it writable again (disks with errors are set to read-only)",
    errno.EACCES: "give this process the right to write there",
    errno.EIO: "look to the disk or network folder that it is on",
    errno.ESTALE: "connect the network folder again",
    errno.ENOTCONN: "connect the network folder again",
    errno.EHOSTDOWN: "connect the network folder again",
}


class Interrupted(BaseException):
    """SIGTERM has come; no error, so Detectron2 logs no traceback of it."""


class StorageError(UserError):
    """OUTPUT_DIR cannot be written to any more."""


class ProcessLostError(UserError):
    """Another process of the run has ended, which is not the cause itself."""


class WorkerLostError(ProcessLostError):
    """A data worker has ended."""


def explanation(error: BaseException, folder: str) -> UserError | None:
    """One line for an error that comes from outside of the program; None for every other.

    Args:
        error: as caught.
        folder: OUTPUT_DIR.
    """
    text = str(error)
    if isinstance(error, RuntimeError) and (worker := _WORKER.search(text) or _worker_behind(error)):
        return WorkerLostError(
            f"the data worker with process id {worker['pids']} {worker['what'].rstrip(' .')}. Where the system killed "
            "it for want of memory: lower DATALOADER.NUM_WORKERS. --resume goes on"
        )
    if isinstance(error, (ConnectionError, FileNotFoundError, EOFError)) and _handed_over(error):
        return WorkerLostError(
            f"a data worker has ended while it handed a batch over ({text or 'end of file'}). Where the system killed "
            "it for want of memory: lower DATALOADER.NUM_WORKERS. --resume goes on"
        )
    if isinstance(error, RuntimeError) and _CONNECTION.search(text):
        last = text.strip().splitlines()[0]
        return ProcessLostError(
            f"another process of this run has ended, the connection to it is lost ({last}): look for its own message, "
            "and for one of the system on a lack of memory. --resume goes on"
        )
    if isinstance(error, OSError) and error.errno is not None and _in_folder(error.filename, folder):
        remedy = _STORAGE.get(error.errno)
        if not os.path.isdir(folder) and "://" not in folder:
            error.strerror, remedy = "it is not there any more", "bring it back"
        if remedy:
            return StorageError(
                f"OUTPUT_DIR {folder} cannot be written to ({error.strerror}): {remedy}. --resume then goes on from "
                "the last checkpoint"
            )
    return None


def _worker_behind(error: BaseException) -> re.Match[str] | None:
    """What torch told of a worker's end, where it cut into something whose own clean-up then failed, as a save's."""
    seen = {id(error)}
    while True:
        earlier = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
        if earlier is None or id(earlier) in seen or isinstance(earlier, UserError):  # that was told
            return None
        if isinstance(earlier, RuntimeError) and (worker := _WORKER.search(str(earlier))):
            return worker
        seen.add(id(earlier))
        error = earlier


def _handed_over(error: BaseException) -> bool:
    """Whether the error came while a tensor was taken over from another process of this machine."""
    files = (frame.f_code.co_filename for frame, _ in traceback.walk_tb(error.__traceback__))
    return any(os.path.basename(file) == "resource_sharer.py" for file in files)


def _in_folder(name: object, folder: str) -> bool:
    """Whether an error's file lies in a folder; the writing to an open file names none."""
    if not isinstance(name, (str, os.PathLike)):
        return True
    path, parent = os.path.abspath(name), os.path.abspath(folder)
    return path == parent or path.startswith(os.path.join(parent, ""))


def _undisturbed(error: BaseException, folder: str) -> UserError | None:
    """`explanation`, waiting for the signal of a worker's end, which torch turns into an exception wherever it comes.

    It can come after the connection to the worker is lost, and would else cut into the checkpoint that follows.
    """
    try:
        told = explanation(error, folder)
        if isinstance(told, WorkerLostError):
            time.sleep(SIGNAL)
        return told
    except RuntimeError as news:
        return _undisturbed(news, folder)


@contextmanager
def explained(folder: str) -> Iterator[None]:
    """Errors that come from outside of the program become one line each, see `explanation`."""
    try:
        yield
    except UserError:
        raise
    except (OSError, EOFError, RuntimeError) as error:
        told = _undisturbed(error, folder)
        if told is None:
            raise
        raise told from error


class Listener:
    """What a run does with SIGTERM.

    Where it may be answered `Interrupted` is raised at once, elsewhere it is kept until `check`. A process in which
    Python does not come to answer, as it waits in a collective of processes that have ended, is ended after GRACE
    seconds.

    Args:
        busy: whether the state is between two steps, and the signal has to wait.

    Attributes:
        requested: whether the signal has come.
    """

    def __init__(self, busy: Callable[[], bool]) -> None:
        self.busy = busy
        self.requested = False
        self._answered = threading.Event()

    @contextmanager
    def listening(self) -> Iterator[None]:
        """For the training; signals can be listened to in the main thread only, elsewhere nothing changes."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        self.requested = False
        self._answered.clear()
        ours, theirs = socket.socketpair()
        theirs.setblocking(False)
        before = signal.signal(signal.SIGTERM, self._hear)
        waker = signal.set_wakeup_fd(theirs.fileno(), warn_on_full_buffer=False)
        watch = threading.Thread(target=_end_if_stuck, args=(ours, self._answered), daemon=True)
        watch.start()
        try:
            yield
        finally:
            self._answered.set()
            signal.set_wakeup_fd(waker)
            signal.signal(signal.SIGTERM, before)
            theirs.send(b"\0")  # closing it would not do: data workers have it open too
            watch.join()
            theirs.close()
            ours.close()

    def check(self) -> None:
        """Raise what the signal asked for while it could not be answered."""
        if self.requested:
            self._answered.set()
            raise Interrupted

    def _hear(self, _number: int, _frame: FrameType | None) -> None:
        if not self.requested:
            self.requested = True
            logging.getLogger(__name__).warning("SIGTERM: the run saves a checkpoint and ends")
            if not self.busy():
                self.check()


def _end_if_stuck(receiver: socket.socket, answered: threading.Event) -> None:
    """The system writes a signal's number to the socket at once, wherever the main thread is."""
    while signals := receiver.recv(64):
        if signal.SIGTERM in signals:
            if not answered.wait(GRACE):
                print(f"SIGTERM came {GRACE} seconds ago and cannot be answered: the process ends", file=sys.stderr)
                os._exit(STATUS)
            return
        if answered.is_set():
            return


def in_flight(outer: BaseException | None) -> Any:
    """The exception that a `finally` clause runs under, if it is another than at the beginning."""
    error = sys.exc_info()[1]
    return None if error is outer else error


def leave_with_main() -> None:
    """Let the other processes end once the main one has saved; in those, which have nothing to save, wait for that.

    Launchers end all once one has ended. A second SIGTERM, a launcher's, ends the waiting, and GRACE seconds do.
    """
    if comm.get_world_size() == 1 or threading.current_thread() is not threading.main_thread():
        return
    store = distributed_c10d._get_default_store()
    if comm.is_main_process():
        store.set(_SAVED, "")
        return
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    with suppress(RuntimeError):  # nobody came, or who kept the store is gone
        store.wait([_SAVED], timedelta(seconds=GRACE))
