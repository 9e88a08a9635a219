"""A run that was stopped at any moment and resumed is, bit for bit, the run that was not."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from detectron2.engine import launch
from detectron2.utils import comm
from engine_runs import assert_bit_equal, everything, run_cfg, train

from detr_family.checkpoint import DETRCheckpointer
from detr_family.engine import Trainer
from detr_family.engine.processes import run_and_leave


@pytest.mark.parametrize("name", tiny.DETECTORS)
def test_a_stopped_and_resumed_run_is_bit_equal(name: str, tmp_path: Path) -> None:
    opts = ["SOLVER.MAX_ITER", 6, "SOLVER.STEPS", (4,), "SOLVER.EMA.ENABLED", True, "SOLVER.EMA.DECAY", 0.5]
    whole = train(run_cfg(name, tmp_path, "whole", opts))
    cfg = run_cfg(name, tmp_path, "stopped", opts)
    train(cfg, stop_after=5)  # the last checkpoint is from iteration 4
    torch.rand(7)  # wherever the generators are
    resumed = train(cfg, resume=True)
    assert resumed.start_iter == 4
    assert_bit_equal(everything(whole), everything(resumed))


@pytest.mark.parametrize(
    "opts",
    [
        ["SOLVER.AMP.ENABLED", True],
        ["SOLVER.AMP.ENABLED", True, "SOLVER.AMP.PRECISION", "bfloat16"],
        ["SOLVER.ACCUMULATION_STEPS", 2],
        ["DATALOADER.ASPECT_RATIO_GROUPING", True],
        ["DATALOADER.SAMPLER_TRAIN", "RepeatFactorTrainingSampler", "DATALOADER.REPEAT_THRESHOLD", 0.9],
    ],
    ids=lambda x: " ".join(map(str, x)),
)
def test_with_every_setting_that_carries_a_state(opts: list[Any], tmp_path: Path) -> None:
    opts = [*opts, "SOLVER.MAX_ITER", 5]
    whole = train(run_cfg("DETR", tmp_path, "whole", opts))
    cfg = run_cfg("DETR", tmp_path, "stopped", opts)
    train(cfg, stop_after=3)
    resumed = train(cfg, resume=True)
    assert_bit_equal(everything(whole), everything(resumed))
    assert whole._trainer.grad_scaler.state_dict() == resumed._trainer.grad_scaler.state_dict()


def test_a_seed_that_was_drawn_is_kept(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    cfg = run_cfg("DETR", tmp_path, "run", ["SEED", -1])
    caplog.set_level(logging.INFO)
    first = train(cfg, stop_after=3)
    assert f"The seed of this run is {first.seed}; SEED {first.seed} repeats it" in caplog.text
    second = train(cfg, resume=True)
    assert second.seed == first.seed and f"goes on with the seed {first.seed}" in caplog.text
    again = train(run_cfg("DETR", tmp_path, "again", ["SEED", -1]), stop_after=1)
    assert again.seed != first.seed
    one, other = everything(first), everything(train(run_cfg("DETR", tmp_path, "other", ["SEED", 6]), stop_after=3))
    assert not torch.equal(one["model.input_proj.weight"], other["model.input_proj.weight"])


def test_what_happens_between_steps_does_not_matter(tmp_path: Path) -> None:
    """Evaluation and data workers draw random numbers; a resumed run draws others, at other times."""
    plain = train(run_cfg("DETR", tmp_path, "plain"))
    cfg = run_cfg("DETR", tmp_path, "busy", ["TEST.EVAL_PERIOD", 1, "DATALOADER.NUM_WORKERS", 2])
    cfg.DATASETS.TEST = (cfg.DATASETS.COCO_FORMAT[1][0],)
    busy = train(cfg)
    assert_bit_equal(everything(plain), everything(busy))


def test_new_settings_are_applied_and_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    opts = ["SOLVER.MAX_ITER", 6, "SOLVER.STEPS", (5,), "SOLVER.WARMUP_ITERS", 0, "SOLVER.WEIGHT_DECAY", 0.01]
    train(run_cfg("DETR", tmp_path, "run", opts), stop_after=2)
    caplog.clear()
    opts += ["SOLVER.BASE_LR", 5e-4, "SOLVER.STEPS", (2,), "SOLVER.WEIGHT_DECAY", 0.02]
    trainer = Trainer(run_cfg("DETR", tmp_path, "run", opts))
    trainer.resume_or_load(True)
    assert {(g["lr"], g["weight_decay"]) for g in trainer.optimizer.param_groups} == {(5e-5, 0.02), (5e-6, 0.02)}
    assert "SOLVER.BASE_LR was 0.001 in the checkpoint and is 0.0005 from here on" in caplog.text
    assert "SOLVER.STEPS was [5] in the checkpoint and is [2] from here on" in caplog.text
    trainer.train()
    assert {round(g["lr"], 12) for g in trainer.optimizer.param_groups} == {5e-5, 5e-6}


def test_parameters_may_be_frozen_and_grouped_otherwise(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    opts = ["SOLVER.WARMUP_ITERS", 0, "SOLVER.STEPS", (), "MODEL.DETR.FREEZE", ["encoder"]]
    first = train(run_cfg("DETR", tmp_path, "run", opts), stop_after=2)
    before = moments(first)
    opts[-1] = ["input_proj"]
    second = Trainer(run_cfg("DETR", tmp_path, "run", [*opts, "SOLVER.BACKBONE_MULTIPLIER", 1.0]))
    second.resume_or_load(True)
    assert len(first.optimizer.param_groups) == 2 and len(second.optimizer.param_groups) == 1
    after = moments(second)
    assert len(after) > 20 and not [k for k in after if "encoder" in k or "input_proj" in k]
    for name, moment in after.items():
        assert torch.equal(moment, before[name]), name
    assert "12 parameters are trained from here on that were not, 2 are not trained any more" in caplog.text
    assert "MODEL.DETR.FREEZE was ['encoder'] in the checkpoint and is ['input_proj'] from here on" in caplog.text
    second.train()
    assert any("encoder" in k for k in moments(second))


def moments(trainer: Trainer) -> dict[str, torch.Tensor]:
    """The optimizer's first moment of each parameter that has one, by name."""
    state = trainer.optimizer.state
    return {k: state[p]["exp_avg"].clone() for k, p in trainer.model.named_parameters() if p in state}


def checkpoint_names(folder: Path) -> list[str]:
    return sorted(x.name for x in folder.iterdir() if "model_" in x.name)


@pytest.mark.parametrize("damage", ["cut", "bit", "empty", "gone"])
def test_a_damaged_checkpoint_is_passed_over(damage: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    opts = ["SOLVER.MAX_ITER", 6]
    whole = train(run_cfg("DETR", tmp_path, "whole", opts))
    cfg = run_cfg("DETR", tmp_path, "run", opts)
    train(cfg, stop_after=5)
    last = tmp_path / "run" / "model_0000003.pth"
    assert (tmp_path / "run" / "last_checkpoint").read_text() == last.name
    data = bytearray(last.read_bytes())
    weight = torch.load(last, weights_only=True)["model"]["input_proj.weight"].numpy().tobytes()
    data[data.index(weight) + 5] ^= 1
    if damage == "gone":
        last.unlink()
    else:
        last.write_bytes({"cut": data[: len(data) // 2], "bit": data, "empty": b""}[damage])
    resumed = train(cfg, resume=True)
    assert resumed.start_iter == 2
    assert f"{last} is missing or damaged: the checkpoint before it is tried" in caplog.text
    assert_bit_equal(everything(whole), everything(resumed))


def test_only_damaged_checkpoints_are_an_error(tmp_path: Path) -> None:
    cfg = run_cfg("DETR", tmp_path, "run")
    train(cfg, stop_after=3)
    (tmp_path / "run" / "model_0000001.pth").write_bytes(b"PK")
    with pytest.raises(ValueError, match=r"no checkpoint in .* is whole: leave out --resume"):
        train(cfg, resume=True)


def test_a_checkpoint_is_there_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.build("DETR")
    checkpointer = DETRCheckpointer(model, str(tmp_path))
    checkpointer.save("model_0000001")
    before = (tmp_path / "model_0000001.pth").read_bytes()

    def full_disk(data: Any, file: Any) -> None:
        file.write(b"half of it")
        raise OSError("No space left on device")

    monkeypatch.setattr(torch, "save", full_disk)
    for name in ("model_0000001", "model_0000002"):
        with pytest.raises(OSError, match="No space left"):
            checkpointer.save(name)
    assert checkpoint_names(tmp_path) == ["model_0000001.pth"]
    assert (tmp_path / "model_0000001.pth").read_bytes() == before
    assert (tmp_path / "last_checkpoint").read_text() == "model_0000001.pth"


def resume_in_processes(folder: Path) -> None:
    opts = ["SOLVER.MAX_ITER", 6, "SOLVER.EMA.ENABLED", True, "SOLVER.EMA.DECAY", 0.5, "DATALOADER.NUM_WORKERS", 1]
    whole = everything(train(run_cfg("DNDETR", folder, "whole", opts)))
    cfg = run_cfg("DNDETR", folder, "stopped", opts)
    train(cfg, stop_after=5)
    comm.synchronize()
    assert_bit_equal(whole, everything(train(cfg, resume=True)))


@pytest.mark.slow
def test_a_run_of_two_processes_is_resumed_exactly(tmp_path: Path) -> None:
    run_cfg("DNDETR", tmp_path, "whole")  # writes the data
    launch(run_and_leave, 2, dist_url="auto", args=(resume_in_processes, tmp_path))


def test_a_checkpoint_that_some_machine_cannot_read_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train(run_cfg("DETR", tmp_path, "run"), stop_after=3)
    checkpointer = DETRCheckpointer(tiny.build("DETR"), str(tmp_path / "run"))
    monkeypatch.setattr(comm, "all_gather", lambda x: [x, False] if isinstance(x, bool) else [x, x])
    with pytest.raises(ValueError, match=r"cannot be read by processes \[1\]: to resume, OUTPUT_DIR must be"):
        checkpointer.resume_or_load("", resume=True)
