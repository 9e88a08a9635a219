"""Which checkpoints stay, and when a training has learned what it will: the best one, the last few, an early end."""

from __future__ import annotations

import logging
import math
import os
import re
from collections.abc import Sequence
from typing import Any

from detectron2.checkpoint import Checkpointer
from detectron2.config import CfgNode
from detectron2.engine import HookBase
from detectron2.engine.hooks import BestCheckpointer, EvalHook, PeriodicCheckpointer
from detectron2.utils import comm

from detr_family.config.files import similar

_METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl")
_logger = logging.getLogger(__name__)


class EarlyStop(BaseException):
    """Ends the loop of a training that is done; no error, so Detectron2 logs no traceback of it."""


class KeepBest(BestCheckpointer):
    """Detectron2's `BestCheckpointer` with a state that resumed runs go on with, and with early stopping.

    It comes after the hooks that evaluate, in all processes. Whenever its state changes model_best.pth is written, so
    that no checkpoint is newer than what it knows; how many evaluations have passed since follows from the iteration.

    Args:
        cfg: reads TEST.EVAL_PERIOD, DATASETS.TEST, SOLVER.BEST_METRIC and SOLVER.EARLY_STOP.
        checkpointer: what saves.

    Attributes:
        reference: the metric that SOLVER.EARLY_STOP.MIN_DELTA is counted from, in %, and its iteration.
        stop: whether the training shall end with this iteration.
    """

    def __init__(self, cfg: CfgNode, checkpointer: Checkpointer) -> None:
        metric = cfg.SOLVER.BEST_METRIC
        several = len(cfg.DATASETS.TEST) > 1 and not any(f"{name}/" in metric for name in cfg.DATASETS.TEST)
        head, _, rest = metric.partition("ema/")
        if several:  # the results of several test sets carry their names
            first = cfg.DATASETS.TEST[0]
            metric = f"ema/{first}/{rest}" if rest and not head else f"{first}/{metric}"
        super().__init__(cfg.TEST.EVAL_PERIOD, checkpointer, metric)
        self.best_metric: float | None = None
        self.best_iter: int | None = None
        self.patience, self.min_delta = cfg.SOLVER.EARLY_STOP.PATIENCE, cfg.SOLVER.EARLY_STOP.MIN_DELTA
        self.reference: tuple[float, int] | None = None
        self.stop = False

    def make_up(self) -> None:
        """What a run that was stopped between a checkpoint and the end of its iteration has missed."""
        if (self.trainer.iter + 1) % self._period == 0:
            self.after_step()
        else:
            self._judge(self.trainer.iter + 1)

    def after_step(self) -> None:
        """Save the best, and see whether it is time to stop, after an evaluation."""
        if comm.is_main_process():
            super().after_step()
        done = self.trainer.iter + 1
        if done % self._period == 0 and done != self.trainer.max_iter:
            self._judge(done)

    def after_train(self) -> None:
        """Save the last, where it is the best."""
        if comm.is_main_process():
            ended = self.trainer.iter
            self.trainer.iter = min(ended, self.trainer.max_iter - 1)  # the loop counts one further at its end
            super().after_train()
            self.trainer.iter = ended

    def _best_checking(self) -> None:
        latest = self.trainer.storage.latest().get(self._val_metric)
        if latest is None or latest[1] != self.trainer.storage.iter:
            _logger.warning("There is no %s among the results: it is not known what is best", self._val_metric)
            return
        value, iteration = float(latest[0]), self.trainer.iter
        if not math.isfinite(value) or (self.best_metric is not None and value <= self.best_metric):
            return
        if self.reference is None or value > self.reference[0] + self.min_delta:
            self.reference = value, iteration
        self.best_metric, self.best_iter = value, iteration  # before it is saved: the checkpoint carries it
        self._checkpointer.save(self._file_prefix, iteration=iteration)
        _logger.info("The best so far: %s %.3f after %d iterations", self._val_metric, value, iteration + 1)

    def _judge(self, done: int) -> None:
        stale = 0 if self.reference is None else (done - self.reference[1] - 1) // self._period
        self.stop = comm.all_gather(0 < self.patience <= stale)[0]  # the main process knows the results
        if self.stop and self.reference is not None:
            _logger.info(
                "%s has not risen by more than %g in %d evaluations; the training ends",
                self._val_metric, self.min_delta, stale,
            )  # fmt: skip

    def state_dict(self) -> dict[str, Any]:
        """The best and the reference."""
        return {"best_metric": self.best_metric, "best_iter": self.best_iter, "reference": self.reference}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """The reverse of `state_dict`."""
        self.best_metric, self.best_iter = state_dict["best_metric"], state_dict["best_iter"]
        self.reference = state_dict["reference"]


def check_best_metric(cfg: CfgNode, own: Sequence[str] = ()) -> None:
    """Whether SOLVER.BEST_METRIC is one that COCO's evaluation gives.

    Args:
        cfg: a configuration whose types are right.
        own: beginnings of keys that a Trainer's own methods read: with an evaluator or hooks of its own it may be any.

    Raises:
        ValueError: it is not; nothing would ever be the best.
    """
    metric = rest = cfg.SOLVER.BEST_METRIC
    if "TEST" in own or "SOLVER.BEST_METRIC" in own:
        return
    for beginning in ("ema/", *(f"{name}/" for name in cfg.DATASETS.TEST), "ema/"):
        rest = rest.removeprefix(beginning)
    if metric and not re.fullmatch(r"bbox/(AP(50|75|[sml]|@\d+|-.+)?|AR(\d+|[sml]))", rest):
        near = similar(rest, [f"bbox/{name}" for name in _METRICS])
        raise ValueError(
            f"SOLVER.BEST_METRIC is {metric!r}, which no evaluation here gives{near}; it may be "
            f"{', '.join(f'bbox/{name}' for name in _METRICS)}, or bbox/AP-NAME of a class"
        )


def keeping_hooks(cfg: CfgNode, hooks: list[HookBase], checkpointer: Checkpointer) -> list[HookBase]:
    """The hooks of a run with the number of checkpoints limited, and `KeepBest` after those that evaluate.

    Raises:
        ValueError: a number below 0, early stopping without evaluations, or averaged weights judged that there are not.
    """
    for key, value in (("MAX_TO_KEEP", cfg.SOLVER.MAX_TO_KEEP), ("EARLY_STOP.PATIENCE", cfg.SOLVER.EARLY_STOP.PATIENCE),
                       ("EARLY_STOP.MIN_DELTA", cfg.SOLVER.EARLY_STOP.MIN_DELTA)):  # fmt: skip
        if value < 0:
            raise ValueError(f"SOLVER.{key} is {value}; it has to be 0 or more")
    evaluated = bool(cfg.DATASETS.TEST) and cfg.TEST.EVAL_PERIOD > 0  # in a shorter run than that, once, at its end
    if cfg.SOLVER.EARLY_STOP.PATIENCE and not (evaluated and cfg.SOLVER.BEST_METRIC):
        raise ValueError(
            "SOLVER.EARLY_STOP.PATIENCE is set, but nothing is evaluated during the training: it needs DATASETS.TEST, "
            "TEST.EVAL_EPOCHS or TEST.EVAL_PERIOD, and SOLVER.BEST_METRIC"
        )
    if evaluated and cfg.SOLVER.BEST_METRIC.startswith("ema/") and not cfg.SOLVER.EMA.ENABLED:
        raise ValueError(
            f"SOLVER.BEST_METRIC is {cfg.SOLVER.BEST_METRIC!r}, of averaged weights, which SOLVER.EMA.ENABLED False "
            f"leaves out: set it to {cfg.SOLVER.BEST_METRIC.removeprefix('ema/')!r} (and TEST.EMA False)"
        )
    for hook in hooks:
        if isinstance(hook, PeriodicCheckpointer):
            hook.max_to_keep = cfg.SOLVER.MAX_TO_KEEP or None
    if evaluated and cfg.SOLVER.BEST_METRIC:
        after = 1 + max(i for i, hook in enumerate(hooks) if isinstance(hook, EvalHook))
        hooks.insert(after, KeepBest(cfg, checkpointer))
    return hooks


def remember_checkpoints(hooks: list[HookBase], folder: str, start_iter: int) -> None:
    """Tell the hook that limits the number of checkpoints of those that the resumed run has written already."""
    for hook in hooks:
        if isinstance(hook, PeriodicCheckpointer) and hook.max_to_keep and os.path.isdir(folder):
            numbers = {name: re.fullmatch(r"model_(\d+)\.pth", name) for name in os.listdir(folder)}
            kept = sorted(name for name, match in numbers.items() if match and int(match[1]) < start_iter)
            hook.recent_checkpoints = [os.path.join(folder, name) for name in kept]
