"""Files of weights: read without running code from them, written whole or not at all."""

from __future__ import annotations

import argparse
import os
import pickle
import re
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO, Any

import torch
from detectron2.utils.file_io import PathManager

UNFINISHED = ".unfinished"


@contextmanager
def replacing(path: str) -> Iterator[IO[bytes]]:
    """A file to write that takes the place of `path` once it is wholly on the disk, and not before."""
    unfinished = path + UNFINISHED
    try:
        with open(unfinished, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    except BaseException:
        if os.path.exists(unfinished):
            os.remove(unfinished)
        raise
    folder = os.open(os.path.dirname(path) or ".", os.O_RDONLY)
    try:
        os.fsync(folder)  # the new name too
    finally:
        os.close(folder)


def is_whole(path: str) -> bool:
    """Whether a file written by torch.save is there and all its checksums are right."""
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.testzip() is None
    except (OSError, zipfile.BadZipFile):
        return False


class _ArraysOnly(pickle.Unpickler):
    """Unpickles numpy arrays in plain containers, which is all that model-zoo files hold."""

    allowed = re.compile(
        r"numpy(\._?core(\.multiarray|\.numeric)?)?\.(_reconstruct|ndarray|dtype|scalar|_frombuffer)"
        r"|collections\.OrderedDict|_codecs\.encode"
    )

    def find_class(self, module: str, name: str) -> Any:
        if not self.allowed.fullmatch(f"{module}.{name}"):
            raise pickle.UnpicklingError(f"it holds a {module}.{name}, which no checkpoint needs")
        return super().find_class(module, name)


def load_torch(filename: str) -> Any:
    """What torch.save wrote, without running code from it.

    Detectron2 leaves the choice to torch, and an environment variable (TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD) could undo it.
    """
    with torch.serialization.safe_globals([argparse.Namespace]):
        loaded = torch.load(filename, map_location="cpu", weights_only=True)
    if not isinstance(loaded, dict):
        return {}
    if "model_state" in loaded and filename.endswith(".pyth"):  # pycls'
        return {"model": loaded["model_state"], "__author__": "pycls", "matching_heuristics": True}
    return loaded if "model" in loaded else {"model": loaded}


def load_pickle(filename: str) -> dict[str, Any]:
    """A .pkl of Detectron2's model zoo, or of Caffe2's, which names its weights differently."""
    with PathManager.open(filename, "rb") as file:
        data = _ArraysOnly(file, encoding="latin1").load()
    if not isinstance(data, dict):
        return {}
    if "model" in data and "__author__" in data:
        return data
    blobs = data.get("blobs", data)
    model = {k: v for k, v in blobs.items() if not k.endswith("_momentum")}
    return {"model": model, "__author__": "Caffe2", "matching_heuristics": True}
