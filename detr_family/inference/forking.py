"""Processes that were forked after a detector had run: gunicorn's preload, multiprocessing's "fork".

torch computes with a pool of threads, which the child of a fork does not have and waits for without end (libgomp's;
torch alone hangs in the same way). With one thread no pool is needed.
"""

from __future__ import annotations

import logging
import os

import torch

_used_in: int | None = None  # the process that has a pool of threads

_logger = logging.getLogger(__name__)


def before_computing() -> None:
    """Go on with one thread, and say so, where this process was forked from one that had computed with several."""
    global _used_in
    forked = _used_in is not None and _used_in != os.getpid()
    if forked and torch.get_num_threads() > 1:
        _logger.warning(
            "Process %d was forked from %d after a detector had been made or run there. torch's threads do not survive "
            "a fork: this process computes with one thread in place of %d. Make the Predictor in each process, after "
            "the fork, or start processes by spawn (docs/serving.md).",
            os.getpid(),
            _used_in,
            torch.get_num_threads(),
        )
        torch.set_num_threads(1)
    if forked or torch.get_num_threads() > 1:
        _used_in = os.getpid()
