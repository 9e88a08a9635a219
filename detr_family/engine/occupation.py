"""One training at a time in one OUTPUT_DIR: two would write over each other's checkpoints and metrics."""

from __future__ import annotations

import errno
import logging
import os
import socket
from typing import IO

from detectron2.utils import comm

from detr_family.errors import UserError

try:
    import fcntl
except ImportError:  # not a POSIX system
    fcntl = None  # type: ignore[assignment]

FILE = ".running"
_logger = logging.getLogger(__name__)
_held: dict[str, IO[str]] = {}


class OccupiedError(UserError):
    """OUTPUT_DIR belongs to another run, or cannot be written to."""


def occupy(folder: str) -> None:
    """Take an OUTPUT_DIR for the trainings of this process, until `leave` or the process's end, however that comes.

    The main process locks a file there, in which its host and number stand. The lock is POSIX's: the system takes it
    back from a process that is killed, children do not keep it, and network file systems have it too. Where one does
    not, a line in the log says so and the run goes on.

    Args:
        folder: made where it is not there; an address (s3://) is not locked.

    Raises:
        OccupiedError: in all processes of a run; another run has the folder, or it cannot be written to.
    """
    refused = comm.all_gather(_occupy(folder) if comm.is_main_process() else "")[0]
    if refused:
        raise OccupiedError(refused)


def leave(folder: str) -> None:
    """Give back what `occupy` took."""
    file = _held.pop(os.path.realpath(folder), None)
    if file is not None:
        try:
            os.remove(file.name)  # before the lock is gone; who has opened it meanwhile looks whether it is still there
        except OSError:  # with the folder, or on a disk that has become read-only: nothing depends on it
            _logger.debug("%s stays behind", file.name)
        file.close()


def is_still_there(folder: str) -> bool:
    """Whether a folder that was taken is the one that is there now, not renamed away, its disk not unmounted."""
    file = _held.get(os.path.realpath(folder))
    return file is None or _is_at(file, file.name)


def _occupy(folder: str) -> str:
    """Why the folder cannot be had; empty if it is."""
    place = os.path.realpath(folder)
    if "://" in folder or fcntl is None or place in _held:
        return ""
    try:
        os.makedirs(folder, exist_ok=True)
        while True:
            file = open(os.path.join(place, FILE), "a+", encoding="utf-8")  # noqa: SIM115  (held open)
            try:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                file.seek(0)
                owner = file.read().strip()
                file.close()
                if error.errno not in (errno.EACCES, errno.EAGAIN):
                    _logger.warning("Nothing keeps a second run out of %s: it cannot be locked (%s)", folder, error)
                    return ""
                return (
                    f"OUTPUT_DIR {folder} is in use by {owner or 'another process'}: wait for that run, end it, or "
                    "choose another OUTPUT_DIR"
                )
            if _is_at(file, os.path.join(place, FILE)):
                break
            file.close()  # of a run that has just ended
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
    except OSError as error:
        return f"OUTPUT_DIR {folder} cannot be written to ({error.strerror}): choose another one, or mend the cause"
    _held[place] = file
    return ""


def _is_at(file: IO[str], path: str) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), os.stat(path))
    except OSError:
        return False
