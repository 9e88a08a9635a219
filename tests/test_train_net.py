"""train_net.py as a user runs it: train, evaluate, resume, several processes, mistakes."""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from detr_family.data.datasets.shapes import write_shapes

ROOT = Path(__file__).resolve().parents[1]

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Command-line options that name a small dataset and a tiny detector."""
    # Of one size: what a convolution sees of the padding depends on what an image is batched with.
    entries = write_shapes(str(tmp_path_factory.mktemp("shapes")), 24, 8, size=(96, 96))
    return [
        *("DATASETS.COCO_FORMAT", repr([list(entry) for entry in entries])),
        *("DATASETS.TRAIN", repr((entries[0][0],))),
        *("DATASETS.TEST", repr((entries[1][0],))),
        *("MODEL.DETR.HIDDEN_DIM", "16", "MODEL.DETR.NUM_HEADS", "2", "MODEL.DETR.FEEDFORWARD_DIM", "24"),
        *("MODEL.DEVICE", "cpu", "SOLVER.IMS_PER_BATCH", "4", "SEED", "7", "DATALOADER.NUM_WORKERS", "0"),
        *("SOLVER.CHECKPOINT_PERIOD", "3", "TEST.EVAL_PERIOD", "3", "SOLVER.STEPS", "()"),
    ]


def train_net(*arguments: str, before: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    script = [str(ROOT / "train_net.py"), "--config-file", str(ROOT / "configs/detr_quickstart.yaml")]
    command = [sys.executable, *before, *script]
    return subprocess.run(
        [*command, *arguments],
        capture_output=True,
        text=True,
        timeout=500,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
    )


def metrics(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.json").read_text().splitlines()]


def test_train_then_evaluate_then_resume(data: list[str], tmp_path: Path) -> None:
    options = [*data, "OUTPUT_DIR", str(tmp_path)]
    run = train_net(*options, "SOLVER.MAX_ITER", "3")
    assert run.returncode == 0, run.stderr[-2000:]
    last = {k: v for line in metrics(tmp_path) for k, v in line.items()}
    assert {"bbox/AP", "bbox/AP50", "total_loss", "loss_ce", "loss_giou_0", "lr", "grad_norm"} <= last.keys()

    run = train_net(*options, "MODEL.WEIGHTS", str(tmp_path / "model_final.pth"), "--eval-only")
    assert run.returncode == 0, run.stderr[-2000:]
    line = [x for x in (run.stdout + run.stderr).splitlines() if "copypaste" in x][-1]
    assert float(line.rsplit(" ", 1)[-1].split(",")[0]) == pytest.approx(last["bbox/AP"], abs=1e-3)
    assert (tmp_path / "inference" / "coco_instances_results.json").is_file()

    run = train_net(*options, "SOLVER.MAX_ITER", "6", "--resume")
    assert run.returncode == 0, run.stderr[-2000:]
    assert "Starting training from iteration 3" in run.stdout + run.stderr
    assert max(line["iteration"] for line in metrics(tmp_path) if "total_loss" in line) == 5
    assert (tmp_path / "model_0000005.pth").is_file()


def test_two_processes_start_with_the_loss_of_one(data: list[str], tmp_path: Path) -> None:
    # Batch normalisation would look at each process's part of the batch alone.
    options = [*data, "SOLVER.MAX_ITER", "1", "INPUT.RANDOM_FLIP", "none", "DATASETS.TEST", "()"]
    options += ["MODEL.RESNETS.NORM", "GN"]
    totals = []
    for count in (1, 2):
        folder = tmp_path / str(count)
        run = train_net("--num-gpus", str(count), *options, "OUTPUT_DIR", str(folder))
        assert run.returncode == 0, run.stderr[-2000:]
        totals += [line["total_loss"] for line in metrics(folder) if "total_loss" in line]
    assert len(totals) == 2 and totals[1] == pytest.approx(totals[0], rel=1e-5)


def test_every_way_to_start_two_processes_trains_the_same(data: list[str], tmp_path: Path) -> None:
    """Detectron2's launcher, torchrun, and Detectron2's flags for two machines, here of one process each."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    machines = ["--num-machines", "2", "--dist-url", f"tcp://127.0.0.1:{port}"]
    ways: dict[str, list[tuple[list[str], list[str]]]] = {
        "launcher": [([], ["--num-gpus", "2"])],
        "torchrun": [(torchrun, [])],
        "machines": [([], [*machines, "--machine-rank", str(rank)]) for rank in (0, 1)],
    }
    weights = {}
    for way, commands in ways.items():
        options = [*data, "SOLVER.MAX_ITER", "2", "DATASETS.TEST", "()", "OUTPUT_DIR", str(tmp_path / way)]
        script = [str(ROOT / "train_net.py"), "--config-file", str(ROOT / "configs/detr_quickstart.yaml")]
        running = []
        for i, (before, after) in enumerate(commands):
            log = tmp_path / f"{way}{i}.log"
            with log.open("w") as file:  # a pipe that nobody empties would stop its process
                process = subprocess.Popen(
                    [sys.executable, *before, *script, *after, *options],
                    env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
                    stdout=file,
                    stderr=subprocess.STDOUT,
                )
            running.append((process, log))
        for process, log in running:
            assert process.wait(timeout=500) == 0, log.read_text()[-2000:]
        assert "World size: 2" in running[0][1].read_text()
        weights[way] = torch.load(tmp_path / way / "model_final.pth", weights_only=True)["model"]
    for way in ("torchrun", "machines"):
        assert all(torch.equal(value, weights[way][key]) for key, value in weights["launcher"].items()), way


def test_the_averaged_weights_are_evaluated_and_the_recipe_departed_from_is_told(
    data: list[str], tmp_path: Path
) -> None:
    options = [*data, "OUTPUT_DIR", str(tmp_path), "SOLVER.MAX_ITER", "3", "SOLVER.EMA.ENABLED", "True"]
    run = train_net(*options, "SOLVER.EMA.DECAY", "0.5")
    assert run.returncode == 0, run.stderr[-2000:]
    departures = [x for x in (run.stdout + run.stderr).splitlines() if "Not the recipe of" in x]
    assert len(departures) == 1 and "SOLVER.IMS_PER_BATCH is 4 (recipe: 16)" in departures[0]
    assert "EMA" not in departures[0]
    last = {k: v for line in metrics(tmp_path) for k, v in line.items()}
    run = train_net("--eval-only", *options, "MODEL.WEIGHTS", str(tmp_path / "model_final.pth"), "TEST.EMA", "True")
    assert run.returncode == 0, run.stderr[-2000:]
    line = [x for x in (run.stdout + run.stderr).splitlines() if "copypaste" in x][-1]
    assert float(line.rsplit(" ", 1)[-1].split(",")[0]) == pytest.approx(last["ema/bbox/AP"], abs=1e-3)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_image_that_becomes_unreadable_stops_the_run_which_can_be_resumed(
    data: list[str], tmp_path: Path, workers: int
) -> None:
    entries = [
        [name, file, str(shutil.copytree(folder, tmp_path / name))] for name, file, folder in ast.literal_eval(data[1])
    ]
    options = [*data, "OUTPUT_DIR", str(tmp_path / "run"), "DATASETS.TEST", "()"]
    options += ["DATASETS.COCO_FORMAT", repr(entries), "DATALOADER.NUM_WORKERS", str(workers)]
    assert train_net(*options, "SOLVER.MAX_ITER", "3").returncode == 0
    image = sorted(Path(entries[0][2]).glob("*.png"))[5]
    whole = image.read_bytes()
    image.write_bytes(whole[:-100])
    run = train_net("--resume", *options, "SOLVER.MAX_ITER", "9")
    assert run.returncode == 2 and "Traceback" not in run.stdout + run.stderr, run.stderr[-2000:]
    last = run.stderr.splitlines()[-1]
    assert last.startswith(f"train_net: The image {image} cannot be read") and "Restore the file" in last
    assert str(image) in (tmp_path / "run" / "log.txt").read_text()
    image.write_bytes(whole)
    run = train_net("--resume", *options, "SOLVER.MAX_ITER", "9")
    started = re.search(r"Starting training from iteration (\d+)", run.stdout)
    assert run.returncode == 0 and started and int(started[1]) in (3, 6), run.stderr[-2000:]  # the last checkpoint


def test_an_error_in_the_model_keeps_its_traceback(data: list[str], tmp_path: Path) -> None:
    script = (
        "import runpy, sys\n"
        "from detr_family.modeling.detr import DETR\n"
        "def predict(self, images, targets=None):\n"
        "    raise ValueError('channels differ')\n"
        "DETR.predict = predict\n"
        "sys.argv = sys.argv[1:]\n"
        "runpy.run_path(sys.argv[0], run_name='__main__')\n"
    )
    run = train_net(*data, "OUTPUT_DIR", str(tmp_path), before=("-c", script))
    assert run.returncode == 1 and "in predict" in run.stderr
    assert run.stderr.splitlines()[-1] == "ValueError: channels differ"


@pytest.mark.parametrize("way", ["launcher", "torchrun"])
def test_a_mistake_in_two_processes_is_one_line(data: list[str], tmp_path: Path, way: str) -> None:
    options = [*data, "OUTPUT_DIR", str(tmp_path), "MODEL.WEIGHTS", "nowhere.pth"]
    if way == "launcher":
        run = train_net("--num-gpus", "2", *options)
        assert run.stderr.splitlines()[-1].startswith("train_net: there is no checkpoint 'nowhere.pth'")
        assert run.returncode == 2 and "Traceback" not in run.stderr
    else:  # which has a traceback of its own, and the status 1
        run = train_net(*options, before=("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"))
        assert "train_net, process 0: there is no checkpoint 'nowhere.pth'" in run.stderr
        assert run.returncode != 0 and "load_checkpoint" not in run.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config-file", "nowhere.yaml"], "there is no config file 'nowhere.yaml'"),
        (["DATASETS.COCO_FORMAT", "[['a', 'nowhere.json', '.']]", "DATASETS.TRAIN", "('a',)"], "nowhere.json"),
        (["MODEL.META_ARCHITECTURE", "DETRR"], "MODEL.META_ARCHITECTURE is 'DETRR'"),
        (["MODEL.DETR.NUM_QUERYS", "9"], "similar: MODEL.DETR.NUM_QUERIES"),
        (["MODEL.DETR.NUM_CLASSES", "5"], "MODEL.DETR.NUM_CLASSES is 5"),
        (["MODEL.WEIGHTS", "nowhere.pth"], "there is no checkpoint 'nowhere.pth': correct MODEL.WEIGHTS"),
        (["DATASETS.TRAIN", "('unheard_of',)"], "unheard_of"),
        (["SOLVER.IMS_PER_BATCH", "0"], "SOLVER.IMS_PER_BATCH is 0; it must be at least 1"),
        (["SOLVER.ACCUMULATION_STEPS", "3"], "SOLVER.IMS_PER_BATCH 4 cannot be split over 1 processes"),
        (["MODEL.DETR.FREEZE", "['encodr']"], "similar: "),
        (["DATASETS.COCO_FORMAT", "[['a', 'b']]"], "DATASETS.COCO_FORMAT"),
        (["DATASETS.TEST", "('cells_val')"], "DATASETS.TEST is 'cells_val', one text"),
        (["DATASETS.TEST", "('unheard_of',)"], "DATASETS.TEST names 'unheard_of'"),
        (["DATASETS.TEST", "('coco_2017_val',)", "--eval-only"], "'coco_2017_val' in DATASETS.TEST cannot"),
        (["DATASETS.TEST", "('unheard_of',)", "--eval-only"], "DATASETS.TEST names 'unheard_of'"),
        (["DATASETS.TEST", "()", "--eval-only"], "DATASETS.TEST is empty"),
        (["SEED", "1", "--resme"], "unrecognized arguments: --resme"),
    ],
    ids=lambda x: x if isinstance(x, str) else " ".join(x[:3]),
)
def test_mistakes_end_with_one_clear_line(data: list[str], tmp_path: Path, arguments: list[str], message: str) -> None:
    flags, opts = (arguments, []) if arguments[0].startswith("--") else ([], arguments)
    run = train_net(*flags, *data, "OUTPUT_DIR", str(tmp_path), *opts)
    assert run.returncode == 2 and "Traceback" not in run.stdout + run.stderr, run.stderr[-2000:]
    last = run.stderr.splitlines()[-1]
    assert last.startswith(("train_net: ", "train_net.py: error: ")) and message in last
