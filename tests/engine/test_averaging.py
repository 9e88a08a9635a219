"""The moving average of the weights: what it is, where it is kept, and that it is what is evaluated."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tiny
import torch
from engine_runs import run_cfg, train, weights_of
from torch import nn

from detr_family.checkpoint import DETRCheckpointer
from detr_family.engine.averaging import WeightAverage
from detr_family.inference.predictor import Predictor


def test_it_is_the_moving_average_of_weights_and_statistics() -> None:
    model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    average = WeightAverage(model, 0.75)
    expected = None
    for i in range(4):
        with torch.no_grad():
            for p in model.parameters():
                p.fill_(float(i))
            model[1].running_mean.fill_(10.0 * i)
        average.update()
        expected = 0.0 if expected is None else 0.75 * expected + 0.25 * i
    assert average.model[0].weight.unique().item() == pytest.approx(expected)
    assert average.model[1].running_mean.unique().item() == pytest.approx(10 * expected)
    assert not average.model.training and not any(p.requires_grad for p in average.model.parameters())
    assert model[0].weight.requires_grad and model.training


@pytest.mark.parametrize("decay", [1.0, -0.1])
def test_other_decays_are_refused(decay: float) -> None:
    with pytest.raises(ValueError, match=r"SOLVER\.EMA\.DECAY"):
        WeightAverage(nn.Linear(2, 2), decay)


def test_it_is_saved_evaluated_and_loaded_beside_the_plain_weights(tmp_path: Path) -> None:
    opts = ["SOLVER.EMA.ENABLED", True, "SOLVER.EMA.DECAY", 0.5, "TEST.EVAL_PERIOD", 4]
    cfg = run_cfg("DETR", tmp_path, "run", opts)
    cfg.DATASETS.TEST = (cfg.DATASETS.COCO_FORMAT[1][0],)
    trainer = train(cfg)
    lines = [json.loads(x) for x in (tmp_path / "run" / "metrics.json").read_text().splitlines()]
    assert any({"bbox/AP", "ema/bbox/AP"} <= line.keys() for line in lines)
    assert (tmp_path / "run" / "inference").is_dir() and (tmp_path / "run" / "ema" / "inference").is_dir()

    path = str(tmp_path / "run" / "model_final.pth")
    saved = weights_of(path)
    averaged, plain = (trainer.build_model(cfg) for _ in range(2))
    DETRCheckpointer(averaged, averaged=True).load(path)
    DETRCheckpointer(plain).load(path)
    for key, value in averaged.state_dict().items():
        assert torch.equal(value, saved[f"ema.{key}"]) and torch.equal(plain.state_dict()[key], saved[key])
    assert not torch.equal(averaged.class_embed.weight, plain.class_embed.weight)

    cfg.TEST.EMA = True
    predictor = Predictor.from_config(cfg, path)
    assert torch.equal(predictor.model.class_embed.weight, averaged.class_embed.weight)


def test_a_checkpoint_without_an_average_is_told(tmp_path: Path) -> None:
    DETRCheckpointer(tiny.build("DETR"), str(tmp_path)).save("model")
    with pytest.raises(ValueError, match=r"no averaged weights.*SOLVER\.EMA\.ENABLED.*TEST\.EMA False"):
        DETRCheckpointer(tiny.build("DETR"), averaged=True).load(str(tmp_path / "model.pth"))


def test_it_may_begin_at_a_resume_and_end_at_one(tmp_path: Path) -> None:
    train(run_cfg("DETR", tmp_path, "run"), stop_after=2)
    on = ["SOLVER.EMA.ENABLED", True, "SOLVER.EMA.DECAY", 0.5, "SOLVER.MAX_ITER", 4]
    begun = train(run_cfg("DETR", tmp_path, "run", on), resume=True)
    assert int(begun.average.averaged.n_averaged) == 2
    ended = train(run_cfg("DETR", tmp_path, "run", ["SOLVER.MAX_ITER", 5]), resume=True)
    assert ended.start_iter == 4 and ended.average is None
