"""Every command that README and docs print is executed, but for those that NOT_RUN names with a reason.

In a folder of a user's, in this process, cut down: tiny images and detectors, one step, one process. What starts
several processes is tests/test_train_net.py's and tests/inference/test_many.py's. In place of published weights there
are files of the same name, made of the cut-down detector.
"""

from __future__ import annotations

import importlib
import importlib.util
import re
import runpy
import shlex
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from printed_commands import COMMANDS, EXECUTED, NOT_RUN, ROOT

from detr_family.analysis import command_line as analysis
from detr_family.analysis.loading import datasets_for_now
from detr_family.commands import convert_checkpoint, data_check, demo, export_model, predict, train
from detr_family.data.datasets.shapes import write_shapes
from detr_family.engine.processes import argument_parser
from detr_family.model_zoo import listing
from detr_family.modeling.backbone import swin

SIZES = "INPUT.MIN_SIZE_TRAIN (48,) INPUT.MAX_SIZE_TRAIN 64 INPUT.MIN_SIZE_TEST 48 INPUT.MAX_SIZE_TEST 64 "
MODEL = (
    "MODEL.DEVICE cpu MODEL.DETR.HIDDEN_DIM 16 MODEL.DETR.NUM_HEADS 2 MODEL.DETR.FEEDFORWARD_DIM 16 "
    "MODEL.DETR.ENC_LAYERS 1 MODEL.DETR.DEC_LAYERS 2 MODEL.DETR.NUM_QUERIES 12 "
    "MODEL.RESNETS.STEM_OUT_CHANNELS 8 MODEL.RESNETS.RES2_OUT_CHANNELS 16 MODEL.RESNETS.WIDTH_PER_GROUP 4 "
    "MODEL.SWIN.WINDOW_SIZE 7 MODEL.TIMM.PRETRAINED False "
)
STEPS = (
    "SOLVER.EPOCHS 0 SOLVER.DROP_EPOCHS () SOLVER.MAX_ITER 2 SOLVER.STEPS () SOLVER.IMS_PER_BATCH 4 SEED 1 "
    "SOLVER.CHECKPOINT_EPOCHS 0 SOLVER.CHECKPOINT_PERIOD 2 TEST.EVAL_EPOCHS 0 TEST.EVAL_PERIOD 1 VIS_REPORT False "
    "DATALOADER.NUM_WORKERS 0 INPUT.CROP.ENABLED False OUTPUT_DIR output/run "
)
COCO = [
    *("DATASETS.COCO_FORMAT", "[['own_train', 'train.json', 'images'], ['own_val', 'val.json', 'images']]"),
    *("DATASETS.TRAIN", "('own_train',)", "DATASETS.TEST", "('own_val',)"),
]
# Said after a command's own words, which the last of a kind overrides.
CUT_DOWN = {
    "build_timm_backbone": ["MODEL.TIMM.NAME", "test_convnext"],
    "detr_family.benchmarks.inference": ["--forms", "eager", "prepared", "--size", "48", "64", "--repeats", "1"],
    "detr_family.benchmarks.evaluation": ["--images", "12"],
    "tools/export_model.py": ["--format", "torchscript"],  # the quickest; tests/export has the others
}
# What one command makes and another needs.
MADE_BY = {"output/model.ts": "tools/export_model.py", "cells_tiled": "tools/convert_dataset.py"}
# In place of what would be fetched, or has to be another detector's.
STAND_INS = {
    "detr_r50": "detr-r50-e632da11.pth",
    "R-50.pkl": "",
    "CONFIG": "output/cells/config.yaml",
    "WEIGHTS": "output/cells/model_final.pth",
}


def test_what_is_not_executed_is_printed() -> None:
    assert not [command for command in NOT_RUN if not any(re.fullmatch(command, printed) for _, printed in COMMANDS)]
    assert len(EXECUTED) > 40


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Swin has sizes, no key for each of its numbers; loggers stay offline."""
    for size in swin.SIZES:
        monkeypatch.setitem(swin.SIZES, size, {"embed_dim": 8, "depths": (1, 1, 1, 1), "num_heads": (1, 1, 2, 2)})
    monkeypatch.setenv("WANDB_MODE", "offline")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A user's folder: a checkout's scripts, images, annotations, and what two trainings left."""
    place = tmp_path_factory.mktemp("user")
    for name in ("configs", "tools", "projects", "train_net.py", "demo.py"):
        (place / name).symlink_to(ROOT / name)
    for i, name in enumerate(("drawn", "cells", "bccd")):
        write_shapes(str(place / name), 6, 3, size=(48, 64), seed=i)
        images = place / name / "images"
        images.mkdir()
        for split in ("train", "val"):
            text = (place / name / f"{split}.json").read_text()
            (place / name / f"{split}.json").write_text(re.sub(r'"(\d{6}\.png)"', rf'"{split}_\1"', text))
            for image in (place / name / split).glob("*.png"):
                image.rename(images / f"{split}_{image.name}")
            (place / name / split).rmdir()
        (place / name / "shapes.json").unlink()
    for name in ("train.json", "val.json", "images"):
        (place / "drawn" / name).rename(place / name)
    for name in ("scans", "archive", "more/deep"):
        (place / name).mkdir(parents=True)
        shutil.copy(place / "images" / "val_000000.png", place / name / "a.jpg")
    (place / "images.txt").write_text("images/val_000000.png\nimages/val_000001.png\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        if importlib.util.find_spec("cv2"):
            write_video(place / "clip.mp4")
        for command in (
            "train_net.py --config-file configs/detr_r50.yaml SOLVER.EMA.ENABLED True",
            "train_net.py --config-file configs/finetune_dino_r50.yaml --data cells OUTPUT_DIR output/cells",
        ):
            run(shlex.split(command))
            shutil.copytree("output/run", "output/cells" if "cells" in command else "output/detr")
            shutil.rmtree("output/run")
        shutil.copy("output/detr/model_final.pth", "model_final.pth")
        shutil.copy("output/detr/model_final.pth", "detr-r50-e632da11.pth")
        project = "projects/deformable"
        run([f"{project}/train_net.py", "--config-file", f"{project}/configs/deformable_detr_r50.yaml"])
        shutil.copy("output/run/model_final.pth", "r50_deformable_detr-checkpoint.pth")
    return place


def write_video(path: Path) -> None:
    import cv2

    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"mp4v"), 5, (64, 48))
    for i in range(3):
        writer.write(np.full((48, 64, 3), 60 * i, np.uint8))
    writer.release()


def run_training(words: list[str]) -> None:
    args = argument_parser().parse_args(words)
    for flag in ("num_gpus", "num_machines"):
        setattr(args, flag, 1)
    args.machine_rank, args.dist_url = 0, "auto"
    own = args.config_file.startswith("output/")
    given = args.opts
    if args.data or "DATASETS.TRAIN" in given or own:
        data: list[str] = []
    else:
        data = COCO
    weights = [] if own or (args.eval_only and "MODEL.WEIGHTS" in given) else ["MODEL.WEIGHTS", ""]
    if "detr-r50-e632da11.pth" in given:
        weights = []
    cut = [] if own else [*MODEL.split(), *SIZES.split()]
    args.opts = [*given, *data, *cut, *STEPS.split(), *weights]
    train.main(args)


def run_with_options(command: Any, words: list[str]) -> None:
    """A command whose keys and values stand behind --opts."""
    names = "detr_r50" in words or "configs/" in " ".join(words)
    status = command([*words, *(["--opts", *MODEL.split(), *SIZES.split()] if names else [])])
    assert status == 0, status


def run_check(words: list[str]) -> None:
    assert data_check.command(words) in (0, 1)  # 1: there are warnings, of so small a dataset


def run_script(path: str, words: list[str]) -> None:
    """A script as it is, with its own arguments."""
    before = sys.argv
    sys.argv = [path, *words]
    try:
        runpy.run_path(path, run_name="__main__")
    except SystemExit as end:
        assert not end.code, end.code
    finally:
        sys.argv = before


def run(words: list[str]) -> None:
    """Execute a command, without the word "python"."""
    with datasets_for_now():
        program, rest = words[0], words[1:]
        if program == "-m":
            program, rest = f"-m {words[1]}", words[2:]
        if program in ("train_net.py", "projects/deformable/train_net.py"):
            if "deformable" in program:
                importlib.import_module("projects.deformable")
            run_training(rest)
        elif program == "demo.py":
            run_with_options(demo.command, rest)
        elif program == "tools/predict.py":
            run_with_options(predict.command, rest)
        elif program == "tools/export_model.py":
            run_with_options(export_model.command, rest)
        elif program == "tools/convert_checkpoint.py":
            run_with_options(convert_checkpoint.command, rest)
        elif program == "tools/check_dataset.py":
            run_check(rest)
        elif program == "-m detr_family.analysis":
            analysis.main(rest)
        elif program == "-m detr_family.model_zoo":
            assert listing.main(rest) == 0
        elif program.startswith("-m detr_family.benchmarks."):
            run_script(str(importlib.util.find_spec(words[1]).origin), rest)
        else:
            assert program.startswith("tools/"), f"nothing here runs {program}: add it, or a reason in NOT_RUN"
            run_script(program, rest)


def cut_down(command: str) -> list[str]:
    """A printed command as it is executed: files in place of names, one process, no "..."."""
    words = [word for word in shlex.split(command) if word != "..."]
    if words[0] == "torchrun":
        words = words[next(i for i, word in enumerate(words) if word.endswith(".py")) :]
    words = words[1:] if words[0] == "python" else words
    for i, word in enumerate(words):
        if word == "--num-processes":
            words[i + 1] = "1"
        if word in STAND_INS and (words[i - 1] in ("--weights", "MODEL.WEIGHTS") or word.isupper()):
            words[i] = STAND_INS[word]
    if "clip.mp4" in words and not Path("clip.mp4").is_file():
        words.remove("clip.mp4")  # OpenCV is not installed
    words = [word.replace("output/model.onnx", "output/model.ts") for word in words]
    if {"cells_for_transformers", "tools/export_model.py"} & set(words):  # transformers has no DINO; DETR is quicker
        words = [word.replace("output/cells", "output/detr") for word in words]
    for word, more in CUT_DOWN.items():
        words += more if word in words else []
    if words[0] == "demo.py" and "--confidence-threshold" not in words:
        words += ["--confidence-threshold", "0"]
    return words


@pytest.mark.slow
@pytest.mark.parametrize("command", EXECUTED, ids=[f"{i}" for i in range(len(EXECUTED))])
def test_it_does_what_it_says(command: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    words = cut_down(command)
    for made, maker in MADE_BY.items():  # each test may be the only one of its process
        if maker in command:
            shutil.rmtree(made, ignore_errors=True)
        elif made in words and not Path(made).exists():
            run(cut_down(next(c for c in EXECUTED if maker in c)))
    if "convert_checkpoint.py" in command:
        pytest.importorskip("transformers", reason="the transformers package is not installed")
    if "['wandb']" in words:
        pytest.importorskip("wandb", reason="the loggers' packages are not installed")
    if "build_timm_backbone" in words:
        pytest.importorskip("timm", reason="the timm package is not installed")
    shutil.rmtree("output/run", ignore_errors=True)
    run(words)
    assert not words[0].endswith("train_net.py") or any(Path("output/run").iterdir())
