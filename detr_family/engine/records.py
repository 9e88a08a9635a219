"""What was recorded of a run, across a stop: metrics as if it had not been stopped, evaluations made up for."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

from detectron2.config import CfgNode
from detectron2.engine import HookBase
from detectron2.engine.hooks import EvalHook, PeriodicWriter
from detectron2.utils.events import EventStorage, EventWriter, JSONWriter, TensorboardXWriter
from fvcore.common.history_buffer import HistoryBuffer

# What a run is, as far as a resumed one may differ from what it was.
_RECIPE = ("MODEL", "SOLVER", "INPUT", "DATASETS", "DATALOADER")
_NOT_RECIPE = ("MODEL.WEIGHTS", "MODEL.DEVICE", "DATALOADER.NUM_WORKERS")
_KEPT = 1000  # values of each metric in memory; the longest window that Detectron2's writers look back on
_SMOOTHED = 20  # that the writers to files look back on


def keep_short(storage: EventStorage) -> None:
    """Bound the memory that a storage takes: Detectron2's keeps a million values of each metric."""
    storage._history = defaultdict(partial(HistoryBuffer, max_length=_KEPT))


def state_of(storage: EventStorage | None, hooks: Iterable[HookBase]) -> dict[str, Any]:
    """What a checkpoint holds of the records: the last values of each metric, and what was written to files."""
    if storage is None:
        return {}
    return {
        "scalars": {
            name: [storage.smoothing_hints()[name], [list(x) for x in history.values()[-_SMOOTHED:]]]
            for name, history in storage.histories().items()
        },
        "written": {
            type(writer).__name__: [writer._last_write, _size(writer) if isinstance(writer, JSONWriter) else -1]
            for writer in _writers(hooks)
        },
    }


def restore(state: dict[str, Any], storage: EventStorage, hooks: Iterable[HookBase], start_iter: int) -> None:
    """The reverse of `state_of`; lines of metrics.json that were written after the checkpoint are taken out."""
    for name, (hint, values) in state.get("scalars", {}).items():
        for value, iteration in values:
            storage.put_scalar(name, value, smoothing_hint=hint, cur_iter=int(iteration))
    writers = _writers(hooks)
    for writer in writers:
        if isinstance(writer, TensorboardXWriter):
            writer._writer_args["purge_step"] = start_iter
    for writer in writers:
        if (name := type(writer).__name__) not in state.get("written", {}):
            continue
        writer._last_write, size = state["written"][name]
        if isinstance(writer, JSONWriter):
            _cut(writer, size)


def make_up(trainer: Any, period: int) -> None:
    """What a run that was stopped after a checkpoint, and before all of its iteration was done, has missed.

    Evaluations, as far as the checkpoint does not say that they were done, and the line of metrics.

    Args:
        trainer: at the beginning of a resumed training; it has the iteration of its last evaluation in `evaluated`.
        period: TEST.EVAL_PERIOD.
    """
    done = trainer.start_iter
    if not 0 < done <= trainer.max_iter:
        return
    trainer.iter = trainer.storage.iter = done - 1
    ended = done == trainer.max_iter  # the last evaluation is made after the training in any case
    if not ended and period > 0 and done % period == 0 and trainer.evaluated != done - 1:
        for hook in trainer._hooks:
            if isinstance(hook, EvalHook):
                hook._do_eval()
        trainer.evaluated = done - 1
    for hook in trainer._hooks:
        if hasattr(hook, "make_up"):
            if not ended:
                hook.make_up()
        elif isinstance(hook, PeriodicWriter):
            hook.after_step()
    trainer.iter = trainer.storage.iter = done


def _writers(hooks: Iterable[HookBase]) -> list[EventWriter]:
    written = [writer for hook in hooks if isinstance(hook, PeriodicWriter) for writer in hook._writers]
    return [writer for writer in written if hasattr(writer, "_last_write")]


def _size(writer: JSONWriter) -> int:
    """Bytes in its file; -1 where that is not one of this machine's."""
    try:
        return os.fstat(writer._file_handle.fileno()).st_size
    except (AttributeError, OSError):
        return -1


def _cut(writer: JSONWriter, size: int) -> None:
    """Shorten the file to what it was, where that is the end of a line of it."""
    if size < 0 or _size(writer) <= size:
        return
    with open(writer._file_handle.name, "rb+") as file:
        file.seek(max(size - 1, 0))
        if size == 0 or file.read(1) == b"\n":
            file.truncate(size)


def recipe_of(cfg: CfgNode) -> dict[str, Any]:
    """The settings that a run's result depends on, by their full names."""
    flat: dict[str, Any] = {}

    def add(node: CfgNode, prefix: str) -> None:
        for key, value in node.items():
            if isinstance(value, CfgNode):
                add(value, f"{prefix}{key}.")
            elif prefix + key not in _NOT_RECIPE:
                flat[prefix + key] = _plain(value)

    for part in _RECIPE:
        add(cfg[part], f"{part}.")
    return flat


def _plain(value: Any) -> Any:
    """Tuples as lists: YAML files and command lines do not tell them apart."""
    return [_plain(x) for x in value] if isinstance(value, Sequence) and not isinstance(value, str) else value
