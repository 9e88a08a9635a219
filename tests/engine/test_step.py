"""One step: clipping, and what a loss that is not finite does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from detectron2.utils.events import EventStorage
from torch import Tensor, nn

from detr_family.engine import step as engine_step
from detr_family.engine.step import TrainStep


class Line(nn.Module):
    """Two losses of two weights; a batch of `bad` images has a loss of NaN."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor([3.0, 4.0]))

    def forward(self, batch: list[dict[str, Any]]) -> dict[str, Tensor]:
        bad = any("bad" in x["file_name"] for x in batch)
        return {"loss_bbox": self.w.square().sum() / 2, "loss_ce": self.w.sum() * (float("nan") if bad else 0.0)}


def step(tmp_path: Path, names: list[str], **settings: Any) -> tuple[TrainStep, Line]:
    images = [[{**tiny.image(8, 9, 2, seed=0), "file_name": name}] for name in names]
    model = Line()
    optimizer = torch.optim.SGD([{"params": [model.w], "lr": 0.5}])
    keys = {"clip_norm": None, "amp": False, "nonfinite": "stop", "output_dir": str(tmp_path), **settings}
    trainer = TrainStep(model, images, optimizer, **keys)
    trainer.iter = 0
    return trainer, model


def run(trainer: TrainStep, steps: int) -> dict[str, float]:
    with EventStorage() as storage:
        for _ in range(steps):
            trainer.run_step()
            storage.step()
        return {k: v[0] for k, v in storage.latest().items()}


def test_plain_step_and_what_it_logs(tmp_path: Path) -> None:
    trainer, model = step(tmp_path, ["a.jpg"])
    logged = run(trainer, 1)
    assert model.w.tolist() == [1.5, 2.0]
    assert logged["total_loss"] == logged["loss_bbox"] == 12.5 and logged["loss_ce"] == 0


def test_the_norm_of_the_whole_gradient_is_clipped(tmp_path: Path) -> None:
    trainer, model = step(tmp_path, ["a.jpg"], clip_norm=0.1)
    logged = run(trainer, 1)
    assert logged["grad_norm"] == pytest.approx(5.0)
    assert model.w.tolist() == pytest.approx([3 - 0.5 * 0.06, 4 - 0.5 * 0.08], abs=1e-5)


def test_nan_stops_before_the_weights_move_and_names_what_is_known(tmp_path: Path) -> None:
    trainer, model = step(tmp_path, ["a.jpg", "bad_cells.jpg"])
    run(trainer, 1)
    before = model.w.detach().clone()
    trainer.iter = 41
    with pytest.raises(FloatingPointError) as error, EventStorage():
        trainer.run_step()
    for part in ("loss_ce is nan", "iteration 41", "learning rate 0.5", "bad_cells.jpg", "SOLVER.NONFINITE"):
        assert part in str(error.value)
    assert torch.equal(model.w, before)
    saved = torch.load(tmp_path / "nonfinite_iter41_rank0.pth", weights_only=True)
    assert saved["batch"][0]["image"].shape == (3, 8, 9) and saved["batch"][0]["gt_boxes"].shape == (2, 4)
    assert saved["values"]["loss_bbox"] > 0


def test_an_accumulated_batch_is_logged_checked_and_saved_as_one(tmp_path: Path) -> None:
    trainer, model = step(tmp_path, ["a.jpg", "b.jpg", "c.jpg", "bad.jpg"], accumulation=2, nonfinite="stop")
    logged = run(trainer, 1)
    assert logged["total_loss"] == 12.5 and model.w.tolist() == [1.5, 2.0]  # the mean of two equal parts
    with pytest.raises(FloatingPointError, match=r"loss_ce is nan.*on the images c\.jpg, bad\.jpg"), EventStorage():
        trainer.run_step()
    assert model.w.tolist() == [1.5, 2.0]
    assert len(torch.load(tmp_path / "nonfinite_iter0_rank0.pth", weights_only=True)["batch"]) == 2


def test_nan_is_skipped_where_so_configured(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    trainer, model = step(tmp_path, ["bad1.jpg", "good.jpg"], nonfinite="skip", clip_norm=0.1)
    run(trainer, 1)
    assert model.w.tolist() == [3.0, 4.0] and trainer.skipped == 1 and "bad1.jpg" in caplog.text
    run(trainer, 1)
    assert model.w.tolist() != [3.0, 4.0] and torch.isfinite(model.w).all()


def test_batches_of_the_first_skipped_steps_alone_are_saved(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_step, "_SAVED_BATCHES", 2)
    trainer, _ = step(tmp_path, [f"bad{i}.jpg" for i in range(4)], nonfinite="skip")
    for i in range(4):
        trainer.iter = i
        run(trainer, 1)
    assert trainer.skipped == 4 and "the batches of the first 2 such steps are saved" in caplog.text
    assert sorted(path.name[:15] for path in tmp_path.glob("nonfinite*")) == ["nonfinite_iter0", "nonfinite_iter1"]


def test_an_infinite_gradient_of_a_finite_loss_is_seen(tmp_path: Path) -> None:
    trainer, model = step(tmp_path, ["a.jpg"], clip_norm=0.1)
    model.w.register_hook(lambda grad: grad * float("inf"))
    with pytest.raises(FloatingPointError, match="gradient norm is"), EventStorage():
        trainer.run_step()
    assert model.w.tolist() == [3.0, 4.0]


def test_mixed_precision_skips_what_its_scaler_skips_and_goes_on(tmp_path: Path) -> None:
    trainer, model = step(tmp_path, ["bad.jpg", "a.jpg"], amp=True, nonfinite="skip", clip_norm=10.0)
    scale = trainer.grad_scaler.get_scale()
    run(trainer, 1)
    assert model.w.tolist() == [3.0, 4.0] and trainer.grad_scaler.get_scale() < scale
    run(trainer, 1)
    assert model.w.tolist() == pytest.approx([1.5, 2.0])


def test_other_words_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"SOLVER\.NONFINITE is 'ignore'"):
        step(tmp_path, ["a.jpg"], nonfinite="ignore")
