"""How the threads of a CPU wait for each other, decided before torch loads.

torch's threads (OpenMP's, of GNU's libgomp) work on a piece of an operation each and then wait for the last one. By
default they wait busily, and where another process has one of the cores, that process runs in turn with a thread that
only waits for the one that it holds up. Waiting for a moment and then sleeping costs next to nothing on an idle
machine and most of the loss on a busy one: see "Threads" in docs/training.md.
"""

from __future__ import annotations

import os
import sys

SPINS = "1000"  # rounds of the loop that waits, a few microseconds
_SAID_BY_USER = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")


def sleep_while_waiting() -> bool:
    """Sets GOMP_SPINCOUNT for this process and those that it starts, unless the user has said how threads wait.

    libgomp reads it once, as torch is loaded.

    Returns:
        Whether it was set: False where the user has decided, or torch is loaded already.
    """
    if "torch" in sys.modules or any(name in os.environ for name in _SAID_BY_USER):
        return False
    os.environ["GOMP_SPINCOUNT"] = SPINS
    return True
