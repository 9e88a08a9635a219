"""Starting and leaving runs of several processes."""

from __future__ import annotations

import argparse
import datetime
import gc
import logging
import multiprocessing
import os
import signal
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from detectron2.engine import default_argument_parser
from detectron2.engine import launch as detectron2_launch
from detectron2.utils import comm
from torch.multiprocessing.spawn import ProcessException, ProcessRaisedException

from detr_family.config.options import OptionsParser
from detr_family.engine.interruption import STATUS, ProcessLostError, explanation
from detr_family.errors import UserError, message_of

_LOST = "-lost"  # ends the name of a message of a process that ended because another one had
_BUG = "-bug"  # ends that of a traceback of a process that ended for no other's sake; its id stands before that
_TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def argument_parser(epilog: str | None = None) -> argparse.ArgumentParser:
    """Detectron2's command line and --data, flags and KEY VALUE pairs in any order.

    It also bears the --local-rank that some launchers add to it.
    """
    theirs = default_argument_parser(epilog)
    parser = OptionsParser(
        parents=[theirs], add_help=False, epilog=theirs.epilog, formatter_class=theirs.formatter_class
    )
    parser.add_argument("--data", metavar="DIR", help="a dataset's folder: COCO, YOLO, Pascal VOC, CSV")
    parser.add_argument("--local-rank", "--local_rank", type=int, help=argparse.SUPPRESS)
    return parser


def launch(
    main: Callable[[argparse.Namespace], Any], args: argparse.Namespace, *, going_on: str = "--resume goes on"
) -> None:
    """Run `main(args)` in every process of the run, and leave in good order.

    Where torchrun has started this process, one of several, its environment variables say which it is; else Detectron2
    starts `args.num_gpus` processes on each of `args.num_machines` machines.

    A `UserError` in any process ends the run with its message as the last line and the exit status 2; every other error
    keeps its traceback.

    Args:
        main: what each process runs.
        args: with the launcher's names, num_gpus, num_machines, machine_rank and dist_url.
        going_on: what to say to who asks how a run goes on of which a process was killed.

    Raises:
        SystemExit: after a `UserError`; both torchrun and the command line ask for several processes; or torchrun for
            more processes on this machine than it has GPUs; or counts that cannot be.
    """
    wrong = _wrong_counts(args)
    if wrong:
        _leave(wrong)
    logging.getLogger("detectron2.engine.train_loop").addFilter(_without_traceback)
    logging.raiseExceptions = False  # a log file that cannot be written to, as on a full disk, is no news
    with tempfile.TemporaryDirectory() as folder:
        try:
            if under_torchrun():
                _join(args)
                run_and_leave(main, args)
            elif args.num_gpus * args.num_machines > 1:
                with _passing_on():
                    detectron2_launch(
                        _main_of_several,
                        args.num_gpus,
                        num_machines=args.num_machines,
                        machine_rank=args.machine_rank,
                        dist_url=args.dist_url,
                        args=(main, args, folder),
                    )
            else:
                run_and_leave(main, args)
        except UserError as error:
            _leave(message_of(error))
        except ProcessException as error:  # of the process that ended first, maybe because another one did
            _leave_several(error, sorted(Path(folder).iterdir()), going_on)


def _wrong_counts(args: argparse.Namespace) -> str:
    """What cannot be of the launcher's arguments, where Detectron2 would assert, wait for processes, or start one."""
    if args.num_gpus < 0 or args.num_machines < 1:
        return f"--num-gpus is {args.num_gpus} and --num-machines {args.num_machines}: 0 and 1 at least"
    if torch.cuda.is_available() and args.num_gpus > torch.cuda.device_count():
        return f"--num-gpus is {args.num_gpus}, and torch finds {torch.cuda.device_count()} on this machine"
    if args.num_machines > 1 and not under_torchrun():
        if not 0 <= args.machine_rank < args.num_machines:
            return (
                f"--machine-rank is {args.machine_rank}; of {args.num_machines} machines (--num-machines) each has "
                f"its own, 0 to {args.num_machines - 1}"
            )
        if args.dist_url == "auto":
            return "--dist-url auto is for one machine: give tcp://HOST:PORT of the machine of rank 0"
    return ""


def under_torchrun() -> bool:
    """Whether torchrun has started this process."""
    return all(name in os.environ for name in _TORCHRUN)


def meeting() -> Callable[[], None]:
    """Where all processes wait for each other, for days if need be: one may have had the larger images."""
    if comm.get_world_size() == 1:
        return lambda: None
    group = dist.new_group(backend="gloo", timeout=datetime.timedelta(days=365))
    return lambda: dist.barrier(group)


def _leave(message: str) -> None:
    """End this process with a message that names the command."""
    rank = f", process {comm.get_rank()}" if comm.get_world_size() > 1 else ""
    print(f"{Path(sys.argv[0]).stem}{rank}: {message}", file=sys.stderr)
    sys.exit(2)


def _leave_several(error: ProcessException, messages: Sequence[Path], going_on: str) -> None:
    """End the launcher as the processes have ended; those that ended because another one had are not the cause."""
    status, name = getattr(error, "exit_code", 1), getattr(error, "signal_name", None)
    if status == STATUS or name == "SIGTERM":
        sys.exit(STATUS)
    causes = [path for path in messages if not path.name.endswith((_LOST, _BUG))]
    bugs = [path for path in messages if path.name.endswith(_BUG)]
    lost = [path for path in messages if path.name.endswith(_LOST)]
    if causes:
        _leave(causes[0].read_text(encoding="utf-8"))
    if bugs and name != "SIGKILL":  # a connection that a bug has closed may end its process before that of the bug
        rank, pid = bugs[0].name.removesuffix(_BUG).split("-")
        told = bugs[0].read_text(encoding="utf-8")
        raise ProcessRaisedException(f"\n\n-- Process {int(rank)} has:\n{told}", int(rank), int(pid)) from error
    if name is not None:
        _leave(
            f"process {error.error_index} of this run (process id {error.error_pid}) was ended by {name}, and the "
            f"others with it. SIGKILL is what the system sends where memory runs out. {going_on}"
        )
    if lost:
        _leave(lost[0].read_text(encoding="utf-8"))
    raise error


@contextmanager
def _passing_on() -> Iterator[None]:
    """SIGTERM to the launcher is one to the processes that it has started; it ends after them."""

    def pass_on(_number: int, _frame: FrameType | None) -> None:
        children = multiprocessing.active_children()
        for process in children:
            process.terminate()
        if not children:  # before the first of them, or after the last
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGTERM)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, pass_on)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _without_traceback(record: logging.LogRecord) -> bool:
    """Makes Detectron2's line on an exception in the training one that the user can read, where it is a UserError."""
    error = record.exc_info[1] if record.exc_info else None
    if isinstance(error, UserError):
        record.msg, record.args, record.exc_info = f"The training stops: {message_of(error)}", (), None
    return True


def run_and_leave(main: Callable[..., Any], *args: Any) -> None:
    """Run `main(*args)` in a process of a run, then wait for the other processes and close the connections.

    Detectron2's launcher leaves the closing to the interpreter's end, where a thread of gloo that still runs aborts the
    process after all its work was done. The threads end with the last reference to their group: those of
    `main` are gone when it has returned, those of Detectron2's are dropped here.
    """
    main(*args)
    if comm.get_world_size() == 1:
        return
    comm.synchronize()
    dist.destroy_process_group()
    comm._LOCAL_PROCESS_GROUP = None
    comm._get_global_gloo_group.cache_clear()
    gc.collect()  # DDP's wrapper is part of a cycle


def _main_of_several(main: Callable[[argparse.Namespace], Any], args: argparse.Namespace, folder: str) -> None:
    """What Detectron2's launcher runs in each process; a message or traceback of it goes into a file in `folder`."""
    logging.getLogger("detectron2.engine.train_loop").addFilter(_without_traceback)
    logging.raiseExceptions = False
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    rank = comm.get_rank()  # afterwards the connections may be closed
    try:
        run_and_leave(main, args)
    except UserError as error:
        lost = _LOST if type(error) is ProcessLostError else ""
        Path(folder, f"{rank:06d}{lost}").write_text(message_of(error), encoding="utf-8")
        _end(2)
    except SystemExit as error:
        _end(error.code if isinstance(error.code, int) else 1)
    except Exception as error:
        if not isinstance(explanation(error, ""), ProcessLostError):
            path = Path(folder, f"{rank:06d}-{os.getpid()}{_BUG}")
            path.write_text(traceback.format_exc(), encoding="utf-8")
        raise


def _end(status: int) -> None:
    """Leave one of several processes at once: a connection that is still open aborts an interpreter that ends."""
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _join(args: argparse.Namespace) -> None:
    """Join the processes that torchrun started, as Detectron2's launcher does for its own."""
    if args.num_gpus > 1 or args.num_machines > 1:
        raise UserError(
            "torchrun starts the processes (--nproc-per-node, --nnodes): leave out --num-gpus and --num-machines"
        )
    if int(os.environ["WORLD_SIZE"]) == 1:
        return
    local_rank, local_size = int(os.environ["LOCAL_RANK"]), int(os.environ["LOCAL_WORLD_SIZE"])
    if torch.cuda.is_available():
        if local_size > torch.cuda.device_count():
            raise UserError(
                f"torchrun started {local_size} processes on a machine with {torch.cuda.device_count()} GPUs: "
                "lower --nproc-per-node"
            )
        torch.cuda.set_device(local_rank)
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    _make_local_group(local_size)
    comm.synchronize()


def _make_local_group(size: int) -> None:
    """Tell Detectron2 which processes are on this machine."""
    if hasattr(comm, "create_local_process_group"):
        comm.create_local_process_group(size)
        return
    for first in range(0, comm.get_world_size(), size):  # Detectron2 0.6 does this in its launcher
        group = dist.new_group(list(range(first, first + size)))
        if first <= comm.get_rank() < first + size:
            comm._LOCAL_PROCESS_GROUP = group
