"""Errors that are the user's: a command ends with their message alone."""

from __future__ import annotations

import importlib
import os
import re
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from opcode import opmap
from pathlib import Path
from typing import Any


class UserError(Exception):
    """What the user can mend: a command ends with this message alone, without a traceback."""


@contextmanager
def mistakes() -> Iterator[None]:
    """For what is done before the work begins, where an error is most likely in the files or settings that were given.

    A ValueError that only an operation can have raised, as unpacking does, is a bug and passes as it is.

    Raises:
        UserError: in place of an OSError, of a ValueError that a `raise` statement made, and of an AssertionError of
            Detectron2's, which has them for settings that it refuses.
    """
    try:
        yield
    except UserError:
        raise
    except (OSError, ValueError) as error:
        if isinstance(error, OSError) or _raised(error):
            raise UserError(str(error)) from error
        raise
    except AssertionError as error:
        refused = traceback.extract_tb(error.__traceback__)[-1]
        if not re.search(r"[/\\](detectron2|fvcore)[/\\]", refused.filename):
            raise
        setting = " ".join(str(error).split())
        raise UserError(
            f"Detectron2 refuses a setting{f' ({setting})' if setting else ''}: in {refused.name} of "
            f"{os.path.basename(refused.filename)} it has to hold that {(refused.line or '').removeprefix('assert ')}"
        ) from error


def _raised(error: Exception) -> bool:
    """Whether a `raise` statement made it."""
    place = error.__traceback__
    while place is not None and place.tb_next is not None:
        place = place.tb_next
    return place is not None and place.tb_frame.f_code.co_code[place.tb_lasti] == opmap["RAISE_VARARGS"]


def message_of(error: UserError) -> str:
    """What a command prints of it; what a data worker's traceback adds to the message is left out."""
    text = str(error)
    if text.startswith("Caught ") and "\nOriginal Traceback" in text:  # torch's, for an error in another process
        text = text.rstrip().rsplit(f"{type(error).__qualname__}: ", 1)[-1]
    return text


def check_output(path: str | os.PathLike[str], option: str, *, folder: bool) -> None:
    """Whether something can be written there, before the work whose result it is.

    Args:
        path: of a folder, or of a file.
        option: how the user gives it.
        folder: which of the two.

    Raises:
        ValueError: what is there is the other, or a part of the path is a file.
    """
    path = Path(path)
    if folder and path.is_file():
        raise ValueError(f"{option} {path} is a file: give a folder, which need not be there")
    if not folder and path.is_dir():
        raise ValueError(f"{option} {path} is a folder: give the file to write")
    for above in path.parents:
        if above.is_file():
            raise ValueError(f"{option} {path} cannot be made: {above} is a file, no folder")


def require(module: str, extra: str) -> Any:
    """An optional package, imported.

    Args:
        module: its name.
        extra: of setup.py, which installs it.

    Raises:
        UserError: it is not installed; the message says how to install it.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UserError(
            f"this needs {module}, which cannot be imported ({error}): pip install 'detr_family[{extra}]'"
        ) from error
