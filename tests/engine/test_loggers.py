"""Loggers of other vendors: what they are sent and when, in whole and resumed runs, and their own offline modes."""

from __future__ import annotations

import json
import logging
import os
import signal
import time
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from detectron2.engine import HookBase
from detectron2.utils import comm
from engine_runs import run_cfg, train

from detr_family.engine import Trainer
from detr_family.engine import loggers as module
from detr_family.engine.loggers import LoggerHook, RunLogger
from detr_family.errors import UserError


class Recorder(RunLogger):
    """Notes what it is sent, by its name's package, which Python has."""

    NAME = "json"
    sent: ClassVar[list[tuple[Any, ...]]] = []
    fails = False

    def begin(self, name: str, known: str | None) -> str:
        self.run = name
        self.sent.append(("begin", name, known))
        return known or "id 1"

    def scalars(self, values: dict[str, float], iteration: int) -> None:
        if self.fails:
            raise ConnectionError("no network")
        self.sent.append(("scalars", values, iteration))

    def image(self, name: str, pixels: np.ndarray, iteration: int) -> None:
        self.sent.append(("image", name, pixels.shape, iteration))

    def file(self, path: str) -> None:
        self.sent.append(("file", Path(path).name))

    def end(self, complete: bool) -> None:
        self.sent.append(("end", complete))


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    monkeypatch.setitem(module.LOGGERS, "json", Recorder)
    monkeypatch.setattr(Recorder, "sent", [])
    return Recorder.sent


def cfg_of(folder: Path, *opts: Any) -> Any:
    cfg = run_cfg("DETR", folder, "run", ["LOGGERS", ["json"], "VIS_PERIOD", 2, *opts])
    (folder / "run" / "report.html").write_text("of a run before")
    return cfg


def test_scalars_drawings_and_files_of_a_run_and_its_resumption(sent: list[Any], tmp_path: Path) -> None:
    train(cfg_of(tmp_path), stop_after=2)
    assert sent[0] == ("begin", "run", None) and sent[-2:] == [("file", "report.html"), ("end", False)]
    seen = [(kind, *rest) for kind, *rest in sent if kind == "image"]
    assert len(seen) == 4 and all(shape[2] == 3 and step == 1 for _, _, shape, step in seen)
    sent.clear()
    train(cfg_of(tmp_path), resume=True)
    assert sent[0] == ("begin", "run", "id 1") and sent[-1] == ("end", True)
    scalars = {iteration: values for kind, values, iteration in (x for x in sent if x[0] == "scalars")}
    assert max(scalars) == 3 and scalars[3]["total_loss"] > 0 and "lr" in scalars[3]


def test_what_was_sent_before_a_stop_is_not_sent_again(sent: list[Any], tmp_path: Path) -> None:
    cfg = cfg_of(tmp_path, "TEST.EVAL_PERIOD", 1)
    cfg.DATASETS.TEST = (cfg.DATASETS.COCO_FORMAT[1][0],)
    train(cfg, stop_after=2)
    before = {(iteration, key) for kind, values, iteration in _scalars(sent) for key in values}
    assert (1, "bbox/AP") in before
    sent.clear()
    train(cfg, resume=True)
    after = [(iteration, key) for kind, values, iteration in _scalars(sent) for key in values]
    assert not before & set(after)
    assert max(iteration for iteration, key in after if key == "bbox/AP") >= 3


def _scalars(sent: list[Any]) -> list[Any]:
    return [x for x in sent if x[0] == "scalars"]


def test_a_run_that_is_asked_to_end_ends_its_loggers(sent: list[Any], tmp_path: Path) -> None:
    built = Trainer.build_hooks

    class Ask(HookBase):
        def after_step(self) -> None:
            if self.trainer.iter == 1:
                os.kill(os.getpid(), signal.SIGTERM)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(Trainer, "build_hooks", lambda self: [Ask(), *built(self)])
        train(cfg_of(tmp_path))
    assert _scalars(sent)[-1][2] == 1 and sent[-1] == ("end", False)


def test_a_failing_logger_is_told_once_and_stops_nothing(
    sent: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(Recorder, "fails", True)
    with caplog.at_level(logging.WARNING):
        trainer = train(cfg_of(tmp_path))
    assert trainer.iter == 4 and sent[-1] == ("end", True)
    assert [r.message for r in caplog.records].count("json has failed; the training goes on") == 1


def test_one_that_cannot_begin_is_one_line(sent: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def begin(self: Any, name: str, known: str | None) -> str:
        raise RuntimeError("no API key\n  log in first")

    monkeypatch.setattr(Recorder, "begin", begin)
    with pytest.raises(UserError, match=r"^LOGGERS has 'json', which did not begin a run: no API key log in first$"):
        train(cfg_of(tmp_path))
    assert not list((tmp_path / "run").glob("model*"))


def test_names_and_packages_are_checked_in_all_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(comm, "is_main_process", lambda: False)
    for names, message in (
        (["wanbd"], "'wanbd'.*wandb"),
        (["mlflow"], r"not installed: pip install 'detr_family\[mlf"),
    ):
        with pytest.raises(ValueError, match=message):
            Trainer(cfg_of(tmp_path, "LOGGERS", names))


def test_only_the_main_process_logs(sent: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(comm, "is_main_process", lambda: False)
    trainer = Trainer(cfg_of(tmp_path))
    assert not any(isinstance(hook, LoggerHook) for hook in trainer._hooks) and not sent


@pytest.mark.slow
@pytest.mark.parametrize("name", ["wandb", "mlflow", "clearml"])
def test_offline(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each vendor's client, twice as far as a run is resumed, without a network."""
    for variable in ("WANDB_PROJECT", "MLFLOW_EXPERIMENT_NAME", "CLEARML_PROJECT"):
        monkeypatch.setenv(variable, "cells")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "mlruns").as_uri())
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("CLEARML_OFFLINE_MODE", "1")
    monkeypatch.setenv("CLEARML_CACHE_DIR", str(tmp_path / "clearml"))
    pytest.importorskip(name)  # after the variables: ClearML reads its own when it is imported
    train(cfg_of(tmp_path, "LOGGERS", [name]), stop_after=2)
    if name != "clearml":  # offline it has no server to go on with
        train(cfg_of(tmp_path, "LOGGERS", [name]), resume=True)
    known = json.loads((tmp_path / "run" / "loggers.json").read_text())[name]["id"]
    if name == "wandb":
        runs = [path for path in (tmp_path / "run" / "wandb").iterdir() if path.name.startswith("offline-run")]
        assert runs and all(path.name.endswith(known) for path in runs)
        written = [next(path.glob("*.wandb")) for path in runs]
        until = time.monotonic() + 60  # the client's own process may write after the run's end
        while not all(b"total_loss" in path.read_bytes() for path in written) and time.monotonic() < until:
            time.sleep(0.2)
        assert all(b"total_loss" in path.read_bytes() for path in written)
        assert all(list(path.glob("files/media/html/*.html")) and list(path.rglob("*.png")) for path in runs)
    elif name == "mlflow":
        client = pytest.importorskip("mlflow").MlflowClient()
        run = client.get_run(known)
        assert run.info.status == "FINISHED" and run.data.params["SOLVER.MAX_ITER"] == "4"
        assert [point.step for point in client.get_metric_history(known, "total_loss")] == [1, 3]
        assert {x.path for x in client.list_artifacts(known)} >= {"predictions", "report.html"}
    else:
        written = [path.read_text() for path in (tmp_path / "clearml").rglob("metrics.jsonl")]
        assert written and "total_loss" in written[0]
