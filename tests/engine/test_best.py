"""The best checkpoint, early stopping and the number of checkpoints, of whole runs and of stopped and resumed ones."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from detectron2.engine import launch
from detectron2.engine.hooks import CallbackHook
from detectron2.utils import comm
from engine_runs import StopAfter, assert_bit_equal, everything, run_cfg, train, weights_of

from detr_family.engine import Trainer
from detr_family.engine.best import KeepBest, check_best_metric
from detr_family.engine.processes import run_and_leave
from detr_family.engine.watch import RunWriter


def script(monkeypatch: pytest.MonkeyPatch, values: dict[int, float], killed_at: int | None = None) -> list[int]:
    """Evaluations give these APs, by iterations done; returns the list of those that were made."""
    made: list[int] = []

    def test(self: Trainer, *args: Any) -> dict[str, Any]:
        done = min(self.iter, self.max_iter - 1) + 1
        if done == killed_at:
            raise KeyboardInterrupt
        made.append(done)
        return {"bbox": {"AP": values[done]}}

    monkeypatch.setattr(Trainer, "test", test)
    return made


def cfg_of(folder: Path, name: str, iterations: int = 6, opts: list[Any] | None = None) -> Any:
    cfg = run_cfg("DETR", folder, name, ["SOLVER.MAX_ITER", iterations, "TEST.EVAL_PERIOD", 1, *(opts or [])])
    cfg.DATASETS.TEST = (cfg.DATASETS.COCO_FORMAT[1][0],)
    return cfg


def names(cfg: Any) -> list[str]:
    return sorted(name for name in os.listdir(cfg.OUTPUT_DIR) if name.endswith(".pth"))


def keeper(trainer: Trainer) -> KeepBest:
    (hook,) = [hook for hook in trainer._hooks if isinstance(hook, KeepBest)]
    return hook


@pytest.mark.parametrize("best", [2, 3, 4])
def test_the_best_is_kept_and_the_last_few(best: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    values = {done: 10.0 - abs(done - best) for done in range(1, 5)}
    script(monkeypatch, values)
    opts = ["SOLVER.CHECKPOINT_PERIOD", 1, "SOLVER.MAX_TO_KEEP", 2]
    cfg = cfg_of(tmp_path, "run", 4, opts)
    trainer = train(cfg)
    assert names(cfg) == ["model_0000002.pth", "model_0000003.pth", "model_best.pth", "model_final.pth"]
    assert (keeper(trainer).best_metric, keeper(trainer).best_iter) == (10.0, best - 1)
    data = torch.load(f"{cfg.OUTPUT_DIR}/model_best.pth", weights_only=True)
    assert data["iteration"] == data["trainer"]["iteration"] == best - 1
    plain = train(run_cfg("DETR", tmp_path, "plain", ["SOLVER.MAX_ITER", 4, *opts, "SOLVER.MAX_TO_KEEP", 0]))
    same = f"{plain.cfg.OUTPUT_DIR}/model_{best - 1:07d}.pth"
    assert_bit_equal(weights_of(same), weights_of(f"{cfg.OUTPUT_DIR}/model_best.pth"))
    assert len(names(plain.cfg)) == 5


@pytest.mark.parametrize("killed_at", [3, 4, 5])
def test_a_run_that_was_stopped_knows_what_was_best(
    killed_at: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped in an evaluation, after the checkpoint of that iteration (the 4th) was written or without one."""
    values = {1: 3.0, 2: 9.0, 3: 2.0, 4: 9.5, 5: 9.2, 6: 1.0}
    opts = ["SOLVER.CHECKPOINT_PERIOD", 2, "SOLVER.MAX_TO_KEEP", 1]
    script(monkeypatch, values)
    whole = train(cfg_of(tmp_path, "whole", 6, opts))
    cfg = cfg_of(tmp_path, "stopped", 6, opts)
    script(monkeypatch, values, killed_at)
    with pytest.raises(KeyboardInterrupt):
        train(cfg)
    script(monkeypatch, values)
    resumed = train(cfg, resume=True)
    assert names(cfg) == names(whole.cfg) == ["model_0000005.pth", "model_best.pth", "model_final.pth"]
    assert keeper(resumed).state_dict() == keeper(whole).state_dict()
    assert_bit_equal(everything(whole), everything(resumed))
    both = [weights_of(f"{run.cfg.OUTPUT_DIR}/model_best.pth") for run in (whole, resumed)]
    assert_bit_equal(*both)


@pytest.mark.parametrize("killed_at", [None, 4, 5])
def test_patience(killed_at: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The rise at the 4th evaluation is too small to count, and still the best."""
    values = {1: 5.0, 2: 8.0, 3: 7.0, 4: 8.2, 5: 8.1, 6: 99.0}
    opts = ["SOLVER.EARLY_STOP.PATIENCE", 3, "SOLVER.EARLY_STOP.MIN_DELTA", 0.5]
    cfg = cfg_of(tmp_path, "run", 6, opts)
    made = script(monkeypatch, values, killed_at)
    if killed_at is not None:
        with pytest.raises(KeyboardInterrupt):
            train(cfg)
        made = script(monkeypatch, values)
    trainer = train(cfg, resume=killed_at is not None)
    assert made[-1] == 5 and keeper(trainer).best_iter == 3
    assert torch.load(f"{cfg.OUTPUT_DIR}/model_final.pth", weights_only=True)["trainer"]["iteration"] == 4
    again = train(cfg, resume=True)  # it has ended, and stays so
    assert again.start_iter == 5
    assert_bit_equal(everything(trainer), everything(again))
    cfg.SOLVER.EARLY_STOP.PATIENCE = 4
    assert keeper(train(cfg, resume=True)).best_metric == 99.0


@pytest.mark.parametrize("metric", ["bbox/AP", "ema/bbox/AP", ""])
def test_the_test_split_sees_the_best_weights(metric: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}

    def test(cls: Any, cfg: Any, model: Any) -> dict[str, Any]:
        if cfg.OUTPUT_DIR.endswith("test"):
            seen.update({k: v.clone() for k, v in model.state_dict().items()})
        seen["evaluations"] = done = seen.get("evaluations", 0) + 1
        return {"bbox": {"AP": 10.0 - abs(done - (4 if metric.startswith("ema/") else 3))}}  # after two steps

    monkeypatch.setattr(Trainer, "test", classmethod(test))
    opts = ["SOLVER.BEST_METRIC", metric, "SOLVER.EMA.ENABLED", True, "SOLVER.EMA.DECAY", 0.5]
    cfg = cfg_of(tmp_path, "run", 4, opts)
    cfg.DATASETS.FINAL_TEST = cfg.DATASETS.TRAIN
    trainer = train(cfg)
    assert seen.pop("evaluations") == 9
    saved = weights_of(f"{cfg.OUTPUT_DIR}/{'model_best' if metric else 'model_final'}.pth")
    averaged = metric != "bbox/AP"  # without a best it is the average of the last weights
    assert_bit_equal(seen, {k: saved[f"ema.{k}" if averaged else k] for k in seen})
    assert_bit_equal(
        trainer.model.state_dict(),
        {k: v for k, v in weights_of(f"{cfg.OUTPUT_DIR}/model_final.pth").items() if not k.startswith("ema.")},
    )  # the trainer's own stay
    assert not metric or keeper(trainer).best_iter == 1


def stop_early_in_two_processes(cfg: Any) -> None:
    """The evaluations' results are known to the main process alone; all end at the same step."""

    def test(cls: Any, cfg: Any, model: Any) -> dict[str, Any]:
        return {"bbox": {"AP": 9.0 if model.steps == 2 else 1.0}} if comm.is_main_process() else {}

    Trainer.test = classmethod(test)  # type: ignore[method-assign, assignment]
    torch.set_num_threads(1)
    trainer = Trainer(cfg)
    trainer._hooks = [hook for hook in trainer._hooks if not isinstance(hook, RunWriter)]
    trainer.register_hooks([CallbackHook(before_step=lambda t: setattr(t.model, "steps", t.iter + 1))])
    trainer.train()
    assert comm.all_gather(trainer.iter) == [3, 3], "best after 2, and two evaluations without a rise"
    weights = comm.all_gather({k: v.clone() for k, v in trainer.best_model().state_dict().items()})
    assert_bit_equal(*weights)
    assert_bit_equal(weights[1], weights_of(f"{cfg.OUTPUT_DIR}/model_best.pth"))


@pytest.mark.slow
def test_all_processes_stop_together_and_find_the_best(tmp_path: Path) -> None:
    cfg = cfg_of(tmp_path, "run", 6, ["SOLVER.EARLY_STOP.PATIENCE", 2, "MODEL.DEVICE", "cpu"])
    launch(run_and_leave, 2, dist_url="auto", args=(stop_early_in_two_processes, cfg))
    assert torch.load(f"{cfg.OUTPUT_DIR}/model_final.pth", weights_only=True)["trainer"]["iteration"] == 3


def test_the_metric_of_one_of_several_test_sets(tmp_path: Path) -> None:
    cfg = cfg_of(tmp_path, "run")
    cfg.DATASETS.TEST = ("cells", "mice")
    found = {}
    for metric in ("bbox/AP50", "mice/bbox/AP", "ema/bbox/AP", "ema/mice/bbox/AP"):
        cfg.SOLVER.BEST_METRIC = metric
        found[metric] = KeepBest(cfg, None)._val_metric
    assert list(found.values()) == ["cells/bbox/AP50", "mice/bbox/AP", "ema/cells/bbox/AP", "ema/mice/bbox/AP"]


def test_a_metric_is_one_that_there_will_be(tmp_path: Path) -> None:
    cfg = cfg_of(tmp_path, "run")
    cfg.DATASETS.TEST = ("cells", "mice")
    for metric in ("", "bbox/APs", "ema/mice/bbox/AP-red cell", "mice/ema/bbox/AR100", "bbox/AP@300"):
        cfg.SOLVER.BEST_METRIC = metric
        check_best_metric(cfg)
    cfg.SOLVER.BEST_METRIC = "loss/val"
    check_best_metric(cfg, ["SOLVER.BEST_METRIC"])
    with pytest.raises(ValueError, match="which no evaluation here gives"):
        check_best_metric(cfg, ["INPUT"])


@pytest.mark.parametrize(
    "opts, message",
    [
        (["SOLVER.MAX_TO_KEEP", -1], "SOLVER.MAX_TO_KEEP is -1"),
        (["SOLVER.EARLY_STOP.PATIENCE", -2], "SOLVER.EARLY_STOP.PATIENCE is -2"),
        (["SOLVER.EARLY_STOP.PATIENCE", 2, "TEST.EVAL_PERIOD", 0], "nothing is evaluated during the training"),
        (["SOLVER.EARLY_STOP.PATIENCE", 2, "SOLVER.BEST_METRIC", ""], "nothing is evaluated during the training"),
        (["SOLVER.BEST_METRIC", "ema/bbox/AP50"], "SOLVER.EMA.ENABLED False leaves out: set it to 'bbox/AP50'"),
    ],
)
def test_what_cannot_be_meant_is_refused(opts: list[Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        Trainer(cfg_of(tmp_path, "run", 6, opts))


def test_a_run_shorter_than_its_first_evaluation_keeps_the_best_of_its_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = script(monkeypatch, {2: 5.0})
    for period in (2, 9):
        opts = ["TEST.EVAL_PERIOD", period, "SOLVER.EARLY_STOP.PATIENCE", 3]
        cfg = cfg_of(tmp_path, f"run{period}", 2, opts)
        assert keeper(train(cfg)).best_metric == 5.0 and "model_best.pth" in names(cfg)
    assert made == [2, 2]


def test_stopping_for_other_reasons_is_as_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script(monkeypatch, dict.fromkeys(range(1, 7), 1.0))
    trainer = Trainer(cfg_of(tmp_path, "run"))
    trainer.register_hooks([StopAfter(2)])
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
