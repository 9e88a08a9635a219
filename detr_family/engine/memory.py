"""How a training on the CPU comes by its memory.

glibc gives large blocks back to the system as they are freed, and the system clears every page that it hands out anew:
a training step, which takes and frees the same gigabyte each time, spends a twentieth of its time on that. Here the
process keeps what it has once had, so that its memory stays at its peak; see "Threads" in docs/training.md.
"""

from __future__ import annotations

import ctypes
import os
import sys

# <malloc.h>
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4
_SETTINGS = ("mmap_max", "mmap_threshold", "trim_threshold", "top_pad")


def keep_freed_memory() -> bool:
    """Lets this process keep what it frees, for its own next use, unless the user has said what malloc does.

    Returns:
        Whether it does: False where the user has decided, and elsewhere than with Linux's glibc.
    """
    tunables = os.environ.get("GLIBC_TUNABLES", "")
    decided = any(f"MALLOC_{name.upper()}_" in os.environ or f"malloc.{name}=" in tunables for name in _SETTINGS)
    if decided or sys.platform != "linux":
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):  # another C library
        return False
    mallopt.argtypes = [ctypes.c_int, ctypes.c_int]
    return bool(mallopt(_M_MMAP_MAX, 0)) and bool(mallopt(_M_TRIM_THRESHOLD, -1))  # -1: never
