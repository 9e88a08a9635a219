"""Files of weights: read without running code from them, written whole or not at all."""

from __future__ import annotations

import argparse
import errno
import json
import os
import pickle
import re
import shutil
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import IO, Any

import torch
from detectron2.utils.file_io import PathManager
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from detr_family.contents import told_by_head
from detr_family.errors import UserError

UNFINISHED = ".unfinished"


class CheckpointError(UserError, OSError):
    """A checkpoint that cannot be written; the message says why, and which one is the last."""


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


def unwritten(path: str, error: BaseException) -> CheckpointError | None:
    """The error that says why a checkpoint could not be written; None where it was not for the system.

    Args:
        path: of the checkpoint.
        error: what writing it raised, maybe in the handling of the system's own error.
    """
    cause: BaseException | None = error
    while cause is not None and not (isinstance(cause, OSError) and cause.errno):
        cause = cause.__context__
    if cause is None:
        return None
    folder = os.path.dirname(path) or "."
    why, remedy = os.strerror(cause.errno or 0), "Mend the cause"
    if not os.path.isdir(folder):
        why, remedy = f"{folder} is not there any more", "Bring it back"
    elif cause.errno in (errno.ENOSPC, errno.EDQUOT):
        why += f", {shutil.disk_usage(folder).free / 1e6:.1f} MB are free"
        remedy = "Make space (SOLVER.MAX_TO_KEEP keeps fewer checkpoints)"
    elif cause.errno == errno.EFBIG:
        remedy = "Have the limit on the size of files raised (ulimit -f)"
    try:
        with open(os.path.join(folder, "last_checkpoint"), encoding="utf-8") as file:
            last = f"The last whole checkpoint is {file.read().strip()}, and --resume goes on from it"
    except OSError:
        last = "--resume goes on from the last whole checkpoint"
    return CheckpointError(f"the checkpoint {path} cannot be written ({why}). {remedy}. {last}")


def is_whole(path: str) -> bool:
    """Whether a file written by torch.save is there and all its checksums are right."""
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.testzip() is None
    except Exception:  # whatever a damaged file makes zipfile raise
        return False


def load(filename: str) -> dict[str, Any]:
    """A file of weights, of whichever kind its first bytes say it is, without running code from it.

    Returns:
        `model`, a dict of whatever the file names, and what else there is in it.

    Raises:
        ValueError: it is none, is cut short, or holds what no checkpoint needs.
    """
    with open(filename, "rb") as file:
        head = file.read(9)
    try:
        if filename.endswith(".safetensors") or (head[8:] == b"{" and not head.startswith(b"PK")):
            return load_safetensors(filename)
        if filename.endswith(".pkl"):
            return load_pickle(filename)
        if head.startswith(b"PK"):
            if not zipfile.is_zipfile(filename):
                raise ValueError("it is cut short, as by a download that broke off: fetch it anew")
            if not is_whole(filename):  # torch does not look at the checksums
                raise ValueError("it is damaged, its checksums do not agree: fetch it anew")
        return load_torch(filename)
    except SafetensorError as error:
        raise ValueError(f"it is cut short or damaged ({error}): fetch it anew") from error
    except OSError:
        raise
    except Exception as error:  # whatever a damaged file makes its reader raise
        if "mmengine" in str(error) or "mmdet" in str(error):
            raise ValueError(
                "it is mmdetection's and holds objects of it, which are not loaded: load the weights of the paper's "
                "authors, of detrex or of transformers"
            ) from error
        told = None if head.startswith(b"PK") else told_by_head(filename, "the checkpoint (.pth or .safetensors)")
        if told:
            raise ValueError(f"it is {told[0]}. {told[1]}") from error
        raise ValueError(_why_not(error)) from error


def _why_not(error: Exception) -> str:
    """What torch and pickle say of a file, in a line; torch's advice to read it without a look at it is left out."""
    text = " ".join(str(error).split())
    held = re.search(r"Unsupported global: GLOBAL (\S+)", text)
    if held:
        return f"it holds objects of {held[1]}, and reading such runs code: save weights alone, model.state_dict()"
    if isinstance(error, ValueError) and text:
        return text
    if "Weights only load failed" in text or isinstance(error, (KeyError, EOFError)):
        return f"it is no file of torch.save, or damaged ({text.rsplit('WeightsUnpickler error: ', 1)[-1][:100]})"
    return text or type(error).__name__


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
    if "model" not in loaded and isinstance(loaded.get("state_dict"), dict):  # mmdetection's and others'
        return {"model": loaded["state_dict"]}
    return loaded if "model" in loaded else {"model": loaded}


def load_safetensors(filename: str) -> dict[str, Any]:
    """Tensors by name; the class names that `save_safetensors` put beside them."""
    with safe_open(filename, framework="pt") as file:
        loaded: dict[str, Any] = {"model": {name: file.get_tensor(name) for name in file.keys()}}  # noqa: SIM118
        names = (file.metadata() or {}).get("class_names")
    if names:
        loaded["class_names"] = json.loads(names)
    return loaded


def save_safetensors(path: str, state: Mapping[str, Tensor], metadata: Mapping[str, Any] | None = None) -> None:
    """Write tensors to a file that holds nothing else than them and texts.

    Args:
        path: where to.
        state: tensors by name; of those that share their memory the first is written, and `DETRCheckpointer` gives
            it back its other names.
        metadata: values that are no texts are written as JSON.
    """
    alone: dict[int, str] = {}
    for name, tensor in state.items():
        alone.setdefault(tensor.data_ptr() if tensor.numel() else -len(alone) - 1, name)
    texts = {k: v if isinstance(v, str) else json.dumps(v) for k, v in (metadata or {}).items()}
    with replacing(path) as file:
        file.write(save({name: state[name].detach().cpu().contiguous() for name in alone.values()}, texts))


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
