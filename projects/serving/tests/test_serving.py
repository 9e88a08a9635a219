"""A real server: uvicorn with two workers, gunicorn with and without preload, ten clients at once."""

from __future__ import annotations

import io
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from PIL import Image
from predicting import NAMES, config_text

from detr_family.checkpoint import DETRCheckpointer
from detr_family.inference import Predictor

pytest.importorskip("fastapi", reason="the fastapi package is not installed")

ROOT = Path(__file__).resolve().parents[3]
CLIENTS, ASKED = 10, 4  # each asks so often
SIZES = [(48, 64), (48, 64), (64, 40)]
# The module that a server is told to import: the tiny backbone has to be known.
MODULE = "import tiny\nfrom projects.serving.app import app, create_app, predictor_of_environment\n"
GUNICORN = ["-w", "2", "--preload", "-k", "uvicorn.workers.UvicornWorker"]
SERVERS = {
    "uvicorn": ["-m", "uvicorn", "served:app", "--workers", "2", "--timeout-worker-healthcheck", "120"],
    "gunicorn, preload": ["-m", "gunicorn", "served:app", *GUNICORN],
    # What docs/serving.md warns of: the model is made and run, with two threads, before the fork.
    "gunicorn, forked after a warm-up": ["-m", "gunicorn", "warmed:app", *GUNICORN],
}
WARMED = """
import numpy, torch
import served
torch.set_num_threads(2)
predictor = served.predictor_of_environment()
predictor(numpy.zeros((480, 640, 3), numpy.uint8))
app = served.create_app(lambda: predictor)
"""


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with config.yaml, model.pth and the modules to serve."""
    folder = tmp_path_factory.mktemp("served")
    DETRCheckpointer(tiny.build("DETR"), str(folder), class_names=NAMES).save("model")
    (folder / "config.yaml").write_text(config_text("DETR"))
    (folder / "served.py").write_text(MODULE)
    (folder / "warmed.py").write_text(WARMED)
    return folder


def image(number: int) -> bytes:
    height, width = SIZES[number % len(SIZES)]
    pixels = np.random.default_rng(number).integers(0, 256, (height, width, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def ask(address: str, content: bytes | None = None) -> tuple[int, Any]:
    """Status and answer."""
    try:
        with urllib.request.urlopen(urllib.request.Request(address, content), timeout=120) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


@contextmanager
def server(arguments: list[str], folder: Path, **environment: str) -> Iterator[str]:
    """Its address, once it answers."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    where = ["--bind", f"127.0.0.1:{port}", "--timeout", "600"] if "gunicorn" in arguments else ["--port", str(port)]
    paths = os.pathsep.join([str(folder), str(ROOT), str(ROOT / "tests")])
    known = {"PYTHONPATH": paths, "DETR_CONFIG": str(folder / "config.yaml"), "DETR_WEIGHTS": str(folder / "model.pth")}
    with (folder / "log.txt").open("w+") as log:
        process = subprocess.Popen(
            [sys.executable, *arguments, *where], cwd=folder, env={**os.environ, **known, **environment},
            stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
        try:
            address = f"http://127.0.0.1:{port}"
            for _ in range(600):
                assert process.poll() is None, (folder / "log.txt").read_text()
                try:
                    ask(f"{address}/health")
                    break
                except OSError:
                    time.sleep(0.5)
            yield address
        finally:
            os.killpg(process.pid, signal.SIGTERM)
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


@pytest.mark.slow
@pytest.mark.parametrize("name", SERVERS)
def test_ten_clients_get_what_the_predictor_finds(name: str, weights: Path) -> None:
    if "gunicorn" in name:
        pytest.importorskip("gunicorn", reason="the gunicorn package is not installed")
    predictor = Predictor.from_config(str(weights / "config.yaml"), str(weights / "model.pth"))
    images = [image(i) for i in range(CLIENTS * ASKED)]
    expected = predictor(images)

    def client(number: int) -> list[tuple[int, Any]]:
        mine = images[number * ASKED : (number + 1) * ASKED]
        return [ask(f"{address}/detect?threshold=0", content) for content in mine]

    with server(SERVERS[name], weights, DETR_THREADS="2") as address:
        with ThreadPoolExecutor(CLIENTS) as clients:
            answers = [answer for some in clients.map(client, range(CLIENTS)) for answer in some]
        bad = ask(f"{address}/detect", b"no image")
        healthy = ask(f"{address}/health")

    assert [status for status, _ in answers] == [200] * len(images)
    for (_, answer), instances in zip(answers, expected, strict=True):
        assert (answer["height"], answer["width"]) == instances.image_size
        scores = torch.tensor([found["score"] for found in answer["detections"]])
        boxes = torch.tensor([found["box"] for found in answer["detections"]])
        torch.testing.assert_close(scores, instances.scores, atol=1e-5, rtol=0)
        torch.testing.assert_close(boxes, instances.pred_boxes.tensor, atol=1e-2, rtol=0)
        assert [found["class"] for found in answer["detections"]] == predictor.names(instances)
    assert bad[0] == 422 and "cannot be read" in bad[1]["detail"]
    assert healthy[0] == 200 and healthy[1]["classes"] == NAMES
    log = (weights / "log.txt").read_text()
    assert ("do not survive a fork" in log) == ("warm-up" in name), log


@pytest.mark.slow
def test_what_is_too_large_is_turned_away(weights: Path) -> None:
    with server(["-m", "uvicorn", "served:app"], weights, DETR_MAX_BYTES="1000") as address:
        status, answer = ask(f"{address}/detect", bytes(2000))
    assert status == 413 and "DETR_MAX_BYTES" in answer["detail"]


def test_what_the_environment_lacks_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    from projects.serving.app import predictor_of_environment

    monkeypatch.delenv("DETR_CONFIG", raising=False)
    monkeypatch.delenv("DETR_WEIGHTS", raising=False)
    with pytest.raises(ValueError, match="DETR_CONFIG is not set"):
        predictor_of_environment()


def test_threads_of_an_exported_file_are_those_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    from projects.serving.app import predictor_of_environment

    monkeypatch.setattr(Predictor, "from_exported", lambda *args, **options: (args, options))
    monkeypatch.setenv("DETR_WEIGHTS", "model.onnx")
    monkeypatch.setenv("DETR_THREADS", "3")
    assert predictor_of_environment() == (("model.onnx",), {"batch_size": 8, "threads": 3})
