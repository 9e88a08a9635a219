"""Leaving a run of several processes in good order."""

from __future__ import annotations

import torch.distributed as dist
from detectron2.utils import comm


def leave_process_group() -> None:
    """Wait for the other processes and close the connections; nothing where there is one process.

    Detectron2's launcher leaves that to the interpreter's end, where a thread of gloo that still runs aborts
    the process after all its work was done.
    """
    if comm.get_world_size() > 1:
        comm.synchronize()
        dist.destroy_process_group()
