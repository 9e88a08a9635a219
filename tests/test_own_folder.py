"""From a folder to a drawn detection, as a user runs it: two commands, with one process and with two."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from folders import yolo

from detr_family.commands.data_check import command as command_of_check
from detr_family.config import load_config
from detr_family.model_zoo.weights import find_weights

ROOT = Path(__file__).resolve().parents[1]
CONFIG = ROOT / "configs" / "detr_quickstart.yaml"
RECIPES = [ROOT / "configs" / f"finetune_dino_r50{end}.yaml" for end in ("", "_cpu")]
_TINY = (
    *("MODEL.DETR.HIDDEN_DIM", "16", "MODEL.DETR.NUM_HEADS", "2", "MODEL.DETR.FEEDFORWARD_DIM", "24"),
    *("MODEL.DEVICE", "cpu", "SOLVER.IMS_PER_BATCH", "2", "SOLVER.MAX_ITER", "2", "SOLVER.STEPS", "()"),
    *("DATALOADER.NUM_WORKERS", "0", "TEST.EVAL_PERIOD", "2", "VIS_REPORT", "False"),
)


# The recipe for a CPU, of all lengths and sizes only as much.
_SMALL = (
    *("MODEL.WEIGHTS", "", "MODEL.RESNETS.DEPTH", "18", "MODEL.RESNETS.RES2_OUT_CHANNELS", "64"),
    *("MODEL.DETR.HIDDEN_DIM", "16", "MODEL.DETR.NUM_HEADS", "2", "MODEL.DETR.FEEDFORWARD_DIM", "24"),
    *("INPUT.MIN_SIZE_TRAIN", "(32,)", "INPUT.MIN_SIZE_TEST", "32", "SOLVER.IMS_PER_BATCH", "2"),
    *("SOLVER.EPOCHS", "3", "SOLVER.DROP_EPOCHS", "(2,)", "DATALOADER.NUM_WORKERS", "0", "VIS_REPORT", "False"),
)


def command(script: str, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, str(ROOT / script), "--config-file", *arguments],
        capture_output=True,
        text=True,
        timeout=500,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("processes", ["1", "2"])
def test_from_a_folder_to_a_drawn_detection(tmp_path: Path, processes: str) -> None:
    folder = yolo(tmp_path / "pets", splits={"train": "abc", "test": "a"})
    output = tmp_path / "output"
    flags = ["--data", str(folder), "--num-gpus", processes, "DATASETS.VAL_SEED", "2"]  # image a, with objects
    said = command("train_net.py", str(RECIPES[1]), *flags, *_SMALL, "OUTPUT_DIR", str(output))
    assert f"{folder}: YOLO; train 2 images" in said and "1 of 3 images are cut off" in said
    assert {path.name for path in (output / "datasets").iterdir()} == {"train.json", "val.json", "test.json"}
    assert (output / "test" / "inference" / "coco_instances_results.json").is_file()
    known = yaml.safe_load((output / "config.yaml").read_text())["DATASETS"]
    assert (known["TRAIN"], known["TEST"], known["FINAL_TEST"]) == (["pets_train"], ["pets_val"], ["pets_test"])

    weights = ["--weights", str(output / "model_best.pth")]
    inputs = ["--input", str(folder / "images" / "train"), "--output", str(tmp_path / "drawn")]
    command("demo.py", str(output / "config.yaml"), *weights, *inputs, "--confidence-threshold", "0")
    assert (tmp_path / "drawn" / "a.jpg").is_file()
    shown = json.loads((tmp_path / "drawn" / "images.json").read_text())
    assert [entry["name"] for entry in shown["categories"]] == ["cat", "dog"]


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_the_recipes_judge_keep_and_use_averaged_weights_and_end_early(recipe: Path) -> None:
    cfg = load_config(str(recipe))
    assert cfg.SOLVER.EPOCHS > cfg.SOLVER.DROP_EPOCHS[0] > 0 < cfg.SOLVER.WARMUP_ITERS and cfg.TEST.EVAL_EPOCHS == 1
    assert cfg.SOLVER.EMA.ENABLED and cfg.TEST.EMA and cfg.SOLVER.BEST_METRIC == "ema/bbox/AP"
    assert 0 < cfg.SOLVER.EARLY_STOP.PATIENCE < cfg.SOLVER.EPOCHS and cfg.MODEL.DETR.CLASS_ROWS == "match"
    if recipe is RECIPES[0]:  # a program can fetch them, and they are of its own configuration
        weights = find_weights(cfg.MODEL.WEIGHTS)
        assert weights.fetchable and cfg.MODEL.DINO == load_config(weights.name).MODEL.DINO


@pytest.mark.slow
def test_a_fault_in_a_folder_ends_every_process_with_one_line(tmp_path: Path) -> None:
    folder = yolo(tmp_path / "pets")
    (folder / "labels" / "train" / "a.txt").write_text("7 0.5 0.5 0.1 0.1\n")
    script = [sys.executable, str(ROOT / "train_net.py"), "--config-file", str(CONFIG), "--data", str(folder)]
    done = subprocess.run(
        [*script, "--num-gpus", "2", *_TINY, "OUTPUT_DIR", str(tmp_path / "output")],
        capture_output=True,
        text=True,
        timeout=500,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 2
    last = done.stderr.strip().splitlines()[-1]
    assert "a.txt:1: class 7, but" in last and last.startswith("train_net")


def test_a_folder_is_checked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = yolo(tmp_path / "pets", splits={"train": "ab", "val": "c", "test": "a"})
    sheet = tmp_path / "sheet.png"
    status = command_of_check(["--config-file", str(CONFIG), "--data", str(folder), "--sheet", str(sheet)])
    said = capsys.readouterr()
    assert status == 1 and "pets_train / pets_test: 1 of 1 test images are training images" in said.out
    assert f"{folder}: YOLO" in said.err and sheet.is_file() and not Path("output", "datasets").exists()
