"""The shared libraries with kernels in C++ and CUDA, built beside this file by setup.py.

They are built against torch's stable ABI, so that one build serves torch 2.10 and later. Any may be missing.
"""

from __future__ import annotations

import ctypes
from pathlib import Path

import torch

FOLDER = Path(__file__).parent
REBUILD = "pip install -e . --no-build-isolation (it prints what it misses)"


def load(library: str, title: str, needs: str) -> tuple[ctypes.CDLL | None, str]:
    """Loads one library, and with it its operators.

    Args:
        library: its file's name, without what stands behind the first dot.
        title: what an explanation calls it.
        needs: what builds it.

    Returns:
        (handle, ""), or (None, the reason in one line).
    """
    files = sorted(FOLDER.glob(library + ".*so")) + sorted(FOLDER.glob(library + "*.pyd"))
    if not files:
        return None, f"the {title} library was not built; with {needs} installed, run {REBUILD}"
    try:
        torch.ops.load_library(str(files[0]))
        return ctypes.CDLL(str(files[0])), ""
    except (OSError, RuntimeError) as error:
        return None, f"the {title} library {files[0].name} does not load ({error}); run {REBUILD}"


def file_of(handle: ctypes.CDLL | None) -> str | None:
    """Path of a loaded library; None where there is none."""
    return None if handle is None else str(handle._name)


__all__ = ["FOLDER", "REBUILD", "file_of", "load"]
