"""Weights & Biases, MLflow and ClearML as writers of Detectron2: scalars, drawings, and what is written at a run's end.

Each uses its vendor's client, which reads where and how to log from its own environment variables or files; offline
modes are theirs: WANDB_MODE=offline, MLFLOW_TRACKING_URI=sqlite:///runs.db, CLEARML_OFFLINE_MODE=1. Once a run goes on,
what a client raises is logged once and the training goes on.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import math
import os
import re
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from detectron2.config import CfgNode
from detectron2.engine import HookBase
from detectron2.utils.events import EventWriter, get_event_storage

from detr_family.config.files import similar
from detr_family.errors import UserError, require

PROJECT = "detr_family"  # where the vendor's own variable names none
_RUNS = "loggers.json"  # in OUTPUT_DIR, by logger: the vendor's id of this run, the last iteration sent of each scalar
_logger = logging.getLogger(__name__)


class RunLogger(EventWriter):
    """What the loggers share; a vendor's is a subclass with the methods below `finish`.

    `write` and `close` are Detectron2's; the run is begun and ended by `LoggerHook`, as the report is written after the
    writers are closed.

    Args:
        cfg: reads OUTPUT_DIR, and the settings that differ from the defaults.
    """

    NAME: ClassVar[str]  # of the logger, its package and the extra that installs it

    def __init__(self, cfg: CfgNode) -> None:
        self.cfg = cfg
        self.module: Any = require(self.NAME, self.NAME)
        self.run: Any = None
        self._id = ""
        self._sent: dict[str, int] = {}
        self._written = self._drawn = -1
        self._failed = False

    def start(self, iteration: int) -> None:
        """Begin a run, or go on with that of the training that is resumed.

        Args:
            iteration: the first of this training; what was sent of the ones before is not sent again.

        Raises:
            UserError: the vendor's client cannot begin one.
        """
        before = self._runs().get(self.NAME, {}) if iteration else {}
        name = os.path.basename(os.path.abspath(self.cfg.OUTPUT_DIR))
        try:
            self._id = self.begin(name, before.get("id"))
        except Exception as error:
            text = " ".join(str(error).split()) or type(error).__name__
            raise UserError(f"LOGGERS has {self.NAME!r}, which did not begin a run: {text}") from error
        self._sent = {key: min(last, iteration - 1) for key, last in before.get("sent", {}).items()}
        self._note()

    def _runs(self) -> dict[str, Any]:
        try:
            return dict(json.loads(Path(self.cfg.OUTPUT_DIR, _RUNS).read_text()))
        except (FileNotFoundError, ValueError):  # none yet, or cut off in the writing
            return {}

    def _note(self) -> None:
        runs = {**self._runs(), self.NAME: {"id": self._id, "sent": self._sent}}
        Path(self.cfg.OUTPUT_DIR, _RUNS).write_text(json.dumps(runs))

    def write(self) -> None:
        """Send what is new since the last time: finite scalars, drawings."""
        if self.run is None:
            return
        storage = get_event_storage()
        new: dict[int, dict[str, float]] = defaultdict(dict)
        for key, (value, iteration) in storage.latest_with_smoothing_hint(20).items():
            if iteration > self._sent.get(key, -1) and math.isfinite(value):
                new[iteration][key], self._sent[key] = float(value), iteration
        drawn = [(name, pixels, step) for name, pixels, step in storage._vis_data if step > self._drawn]
        self._written = max([self._written, *new])
        self._drawn = max([self._drawn, *(step for _, _, step in drawn)])
        for iteration in sorted(new):
            self._safely(self.scalars, new[iteration], iteration)
        if new:
            self._note()
        for name, pixels, step in drawn:
            self._safely(self.image, name, np.ascontiguousarray(np.asarray(pixels).transpose(1, 2, 0)), step)

    def finish(self, complete: bool) -> None:
        """Send configuration, curves and report, and end the run."""
        if self.run is None:
            return
        for name in ("config.yaml", "metrics.csv", "curves.png", "report.html"):
            path = os.path.join(self.cfg.OUTPUT_DIR, name)
            if os.path.isfile(path):
                self._safely(self.file, path)
        self._safely(self.end, complete)
        self.run = None

    def _safely(self, method: Any, *args: Any) -> None:
        try:
            method(*args)
        except Exception:
            if not self._failed:
                _logger.warning("%s has failed; the training goes on", self.NAME, exc_info=True)
            self._failed = True

    def settings(self) -> dict[str, str]:
        """What differs from the defaults."""
        from detr_family.visualization.report import changed_settings

        return {key: value for key, value, _ in changed_settings(self.cfg)}

    def begin(self, name: str, known: str | None) -> str:
        """Begin a run, or go on with the one of the id `known`; returns the run's id."""
        raise NotImplementedError

    def scalars(self, values: dict[str, float], iteration: int) -> None:
        """Of one iteration."""
        raise NotImplementedError

    def image(self, name: str, pixels: np.ndarray, iteration: int) -> None:
        """A drawing, (H, W, 3) uint8, RGB."""
        raise NotImplementedError

    def file(self, path: str) -> None:
        """A file of the run's output."""
        raise NotImplementedError

    def end(self, complete: bool) -> None:
        """No more comes."""
        raise NotImplementedError


class WandbLogger(RunLogger):
    """Weights & Biases; the project is $WANDB_PROJECT."""

    NAME = "wandb"

    def begin(self, name: str, known: str | None) -> str:
        """See RunLogger."""
        self.run = self.module.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            name=name,
            dir=self.cfg.OUTPUT_DIR,
            config=self.settings(),
            id=known,
            resume="allow" if known else None,
        )
        self.run.define_metric("*", step_metric="iteration")
        return str(self.run.id)

    def scalars(self, values: dict[str, float], iteration: int) -> None:
        """See RunLogger."""
        self.run.log({**values, "iteration": iteration})

    def image(self, name: str, pixels: np.ndarray, iteration: int) -> None:
        """See RunLogger."""
        self.run.log({name: self.module.Image(pixels), "iteration": iteration})

    def file(self, path: str) -> None:
        """See RunLogger."""
        if path.endswith(".png"):
            self.run.log({"curves": self.module.Image(path)})
        elif path.endswith(".html"):
            self.run.log({"report": self.module.Html(path)})
        else:
            self.run.save(path, base_path=self.cfg.OUTPUT_DIR, policy="now")

    def end(self, complete: bool) -> None:
        """See RunLogger."""
        self.run.finish(exit_code=0 if complete else 1)


class MlflowLogger(RunLogger):
    """MLflow; $MLFLOW_TRACKING_URI says where, $MLFLOW_EXPERIMENT_NAME the experiment."""

    NAME = "mlflow"

    def begin(self, name: str, known: str | None) -> str:
        """See RunLogger."""
        self.run = self.module.MlflowClient()
        if known is not None:
            self.run.update_run(known, status="RUNNING")
            self.id = known
            return known
        title = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
        experiment = self.run.get_experiment_by_name(title)
        number = experiment.experiment_id if experiment else self.run.create_experiment(title)
        self.id = self.run.create_run(number, run_name=name).info.run_id
        for key, value in self.settings().items():
            self.run.log_param(self.id, key, value[:500])
        return str(self.id)

    def scalars(self, values: dict[str, float], iteration: int) -> None:
        """See RunLogger."""
        now = int(time.time() * 1000)
        metric = self.module.entities.Metric
        self.run.log_batch(self.id, [metric(_plain(key), value, now, iteration) for key, value in values.items()])

    def image(self, name: str, pixels: np.ndarray, iteration: int) -> None:
        """See RunLogger."""
        stem, _ = os.path.splitext(name)
        self.run.log_image(self.id, pixels, f"{_plain(stem)}_{iteration:07d}.png")

    def file(self, path: str) -> None:
        """See RunLogger."""
        self.run.log_artifact(self.id, path)

    def end(self, complete: bool) -> None:
        """See RunLogger."""
        self.run.set_terminated(self.id, "FINISHED" if complete else "FAILED")


class ClearmlLogger(RunLogger):
    """ClearML; the project is $CLEARML_PROJECT."""

    NAME = "clearml"

    def begin(self, name: str, known: str | None) -> str:
        """See RunLogger."""
        self.run = self.module.Task.init(
            project_name=os.environ.get("CLEARML_PROJECT", PROJECT),
            task_name=name,
            reuse_last_task_id=False,
            continue_last_task=known or False,
            auto_connect_arg_parser=False,
            auto_connect_frameworks=False,
            auto_resource_monitoring=False,
        )
        self.run.connect(self.settings(), name="settings")
        return str(self.run.id)

    def scalars(self, values: dict[str, float], iteration: int) -> None:
        """See RunLogger."""
        logger = self.run.get_logger()
        for key, value in values.items():
            title, _, series = key.rpartition("/")
            logger.report_scalar(title or series, series, value, iteration)

    def image(self, name: str, pixels: np.ndarray, iteration: int) -> None:
        """See RunLogger."""
        self.run.get_logger().report_image("predictions", os.path.basename(name), iteration, image=pixels)

    def file(self, path: str) -> None:
        """See RunLogger."""
        name = os.path.basename(path)
        if path.endswith(".png"):
            self.run.get_logger().report_image("run", name, max(self._written, 0), local_path=path)
        elif path.endswith(".html"):
            self.run.get_logger().report_media("run", name, max(self._written, 0), local_path=path)
        else:
            self.run.upload_artifact(name, path, wait_on_upload=True)

    def end(self, complete: bool) -> None:
        """See RunLogger."""
        if not complete:
            self.run.mark_failed(status_reason="stopped", force=True)
        self.run.close()


LOGGERS: dict[str, type[RunLogger]] = {kind.NAME: kind for kind in (WandbLogger, MlflowLogger, ClearmlLogger)}


def check_loggers(cfg: CfgNode) -> None:
    """Whether LOGGERS can be had, in any process of a run.

    Raises:
        ValueError: a name is unknown, or its package is not installed.
    """
    for name in cfg.LOGGERS:
        if name not in LOGGERS:
            raise ValueError(f"LOGGERS has {name!r}{similar(str(name), LOGGERS)}; it may have {', '.join(LOGGERS)}")
        if importlib.util.find_spec(name) is None:
            raise ValueError(f"LOGGERS has {name!r}, which is not installed: pip install 'detr_family[{name}]'")


def build_loggers(cfg: CfgNode) -> list[EventWriter]:
    """A writer for each of LOGGERS; they come before Detectron2's for TensorBoard, which clears the drawings."""
    return [LOGGERS[name](cfg) for name in dict.fromkeys(cfg.LOGGERS)]


class LoggerHook(HookBase):
    """Begins the runs of loggers before the first step and ends them after the report; the last of the hooks.

    Args:
        loggers: those among the writers, in the main process.
    """

    def __init__(self, loggers: Sequence[RunLogger]) -> None:
        self.loggers = loggers

    def before_train(self) -> None:
        """Begin."""
        for logger in self.loggers:
            logger.start(self.trainer.start_iter)

    def after_train(self) -> None:
        """End."""
        stopped = any(getattr(hook, "stop", False) for hook in self.trainer._hooks)  # early, as was asked for
        complete = stopped or self.trainer.iter >= self.trainer.max_iter
        for logger in self.loggers:
            logger.finish(complete)


def _plain(key: str) -> str:
    """A name as MLflow takes it: letters, digits, and a few signs."""
    return re.sub(r"[^\w\-./ ]", "_", key)
