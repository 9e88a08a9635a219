"""The GPU script's own code, without a GPU: its steps as small commands, and a torch.cuda that only pretends."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
import warnings
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from detr_family.benchmarks import deformable_attention, gpu, gpu_check
from detr_family.benchmarks.gpu_check import Checker, Step
from detr_family.layers import deformable_attention_ops as ops

ROOT = Path(__file__).resolve().parents[2]
CUDA: Any = SimpleNamespace(type="cuda", index=0)


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def summary(folder: Path) -> dict[str, str]:
    lines = (folder / "summary.txt").read_text().splitlines()
    return {line[:28].strip(): line[29:] for line in lines}


# ------------------------------------------------------------------------------------------------ the steps' frame
def test_steps_are_reported_as_they_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checker = Checker(tmp_path, minutes=1)
    assert checker.run(Step("good one", python("print('a table')"), 30))
    assert not checker.failed
    assert "a table" in capsys.readouterr().out
    assert (tmp_path / "good_one.txt").read_text() == "a table\n"
    assert summary(tmp_path)["good one"].startswith("ok")
    assert not checker.run(Step("bad", python("print('half', flush=True); raise SystemExit(3)"), 30))
    assert checker.failed and summary(tmp_path)["bad"].startswith("FAILED (3)")
    assert (tmp_path / "bad.txt").read_text() == "half\n"


def test_a_step_that_hangs_ends_with_all_that_it_started(tmp_path: Path) -> None:
    child = "import subprocess, sys; p = subprocess.Popen(['sleep', '60']); print(p.pid, flush=True); p.wait()"
    checker = Checker(tmp_path, minutes=1)
    begin = time.monotonic()
    assert not checker.run(Step("hangs", python(child), 3))
    assert time.monotonic() - begin < 20
    assert summary(tmp_path)["hangs"].startswith("TIMED OUT after 3 s")
    pid = int((tmp_path / "hangs.txt").read_text())
    time.sleep(0.3)
    stat = Path(f"/proc/{pid}/stat")
    assert not stat.exists() or stat.read_text().split()[2] == "Z"


def test_what_no_longer_fits_is_left_out(tmp_path: Path) -> None:
    checker = Checker(tmp_path, minutes=0.05)
    assert not checker.run(Step("long", python("print(1)"), 100))
    assert summary(tmp_path)["long"] == "left out: no time"
    assert not checker.failed and not (tmp_path / "long.txt").exists()


@pytest.mark.parametrize("carried", [False, True])
@pytest.mark.parametrize("serves", [False, True])
def test_a_library_is_taken_before_one_is_built(
    carried: bool, serves: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    layers, pack = tmp_path / "layers", tmp_path / "pack"
    layers.mkdir()
    pack.mkdir()
    if carried:
        (pack / "_ms_deform_attn_cuda.abi3.so").write_text("code")
    monkeypatch.setattr(gpu_check, "LAYERS", layers)
    monkeypatch.setattr(gpu_check, "CARRIED", pack)
    built: list[Any] = []

    def probe(device: str) -> dict[str, str]:
        there = bool(built) or (serves and any(layers.iterdir()))
        return {"device": "X", "capability": "9.0", "missing": "" if there else "was not built", "library": ""}

    def run(self: Checker, step: Step, environment: dict[str, str] | None = None) -> bool:
        built.append(environment)
        return True

    monkeypatch.setattr(gpu_check, "probe", probe)
    monkeypatch.setattr(Checker, "run", run)
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
    assert gpu_check.find_library(Checker(tmp_path / "out", 1), "cuda")["missing"] == ""
    assert built == ([] if carried and serves else [{"FORCE_CUDA": "1", "TORCH_CUDA_ARCH_LIST": "9.0"}])


@pytest.mark.slow
def test_without_a_device_one_line_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a device")
    with pytest.raises(SystemExit, match="gpu_check: gpu: torch sees no CUDA device"):
        gpu_check.probe("cuda")


def test_nothing_long_begins_after_a_failed_smoke_test(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[str] = []

    def run(self: Checker, step: Step, environment: dict[str, str] | None = None) -> bool:
        ran.append(step.name)
        return step.name != "smoke"

    monkeypatch.setattr(gpu_check, "probe", lambda device: {"missing": "", "device": "X"})
    monkeypatch.setattr(Checker, "run", run)
    monkeypatch.setattr("sys.argv", ["gpu_check", "--output", str(tmp_path)])
    with pytest.raises(SystemExit, match="1"):
        gpu_check.main()
    assert ran == ["smoke"] and summary(tmp_path)["given up"] == "the smoke test failed"


def test_the_usual_steps_fit_and_the_others_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_check, "find_tool", lambda name: f"/cuda/{name}")
    args = argparse.Namespace(
        device="cuda", rounds=3, size=[800, 1333], repeats=7, iterations=300, output="out", opts=["A", "B"]
    )
    usual = [step.name for step in gpu_check.steps(gpu_check.DEFAULT, args)]
    assert usual[:4] == ["tests operator", "tests detectors", "check", "check variants"]
    assert usual[4].startswith("speed")
    assert sorted(gpu_check.VARIANTS) == sorted(ops.VARIANTS)
    assert sum(name.startswith("model ") for name in usual) == 5
    more = {step.name: step.command for step in gpu_check.steps(gpu_check.EXTRA, args)}
    assert {"sanitizer memcheck", "sanitizer racecheck", "profile", "train"} <= set(more)
    assert more["profile"][0] == "/cuda/ncu" and more["profile"][-3:] == ["kernels", "--device", "cuda"]
    assert more["sanitizer racecheck"][:3] == ["/cuda/compute-sanitizer", "--tool", "racecheck"]
    assert more["train"][more["train"].index("SOLVER.MAX_ITER") + 1] == "300"
    for step in gpu_check.steps(["models", "compiled"], args):  # as the other program reads them
        assert step.command[-3:] == ["--opts", "A", "B"]
        monkeypatch.setattr("sys.argv", step.command[2:])
        seen: list[Any] = []
        monkeypatch.setattr(gpu, "model", lambda *values, seen=seen: seen.extend(values))
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        with pytest.raises(SystemExit, match="0"):
            gpu.main()
        assert seen[0] == step.name.split()[1] and seen[2].compiled == step.name.startswith("compiled")
        assert seen[2].opts == ["A", "B"] and tuple(seen[2].size) == (800, 1333)


def test_the_last_ap_of_a_training(tmp_path: Path) -> None:
    assert gpu_check.last_ap(tmp_path) == "no AP"
    records = [{"total_loss": 3.0}, {"bbox/AP": 1.0, "bbox/AP50": 2.0}, {"bbox/AP": 31.26, "bbox/AP50": 60.0}]
    (tmp_path / "metrics.json").write_text("\n".join(map(json.dumps, records)))
    assert gpu_check.last_ap(tmp_path) == "AP 31.3, AP50 60.0"


# ------------------------------------------------------------------------------------------- a torch.cuda that pretends
class Pretence:
    """Counts calls; what it gives is what a device would."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: list[str] = []
        self.mode = "default"
        for name, result in (
            ("synchronize", None),
            ("reset_peak_memory_stats", None),
            ("max_memory_allocated", 3 << 29),
            ("get_device_name", "a card"),
            ("get_device_capability", (9, 0)),
        ):
            monkeypatch.setattr(torch.cuda, name, self.noted(name, result))
        monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", self.set_mode)

    def noted(self, name: str, result: Any) -> Any:
        def call(*args: Any) -> Any:
            self.calls.append(name)
            return result

        return call

    def set_mode(self, mode: str) -> None:
        self.mode = mode

    def wait(self) -> None:
        if self.mode == "warn":
            warnings.warn("called a synchronizing CUDA operation", UserWarning, stacklevel=2)


def test_measures_of_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    pretence = Pretence(monkeypatch)
    ran: list[int] = []

    def run() -> None:
        ran.append(1)
        pretence.wait()
        pretence.wait()

    assert gpu.seconds_of(run, CUDA, repeats=3) < 1
    assert len(ran) == 5 and pretence.calls == ["synchronize"] * 10
    assert gpu.waits_of(run, CUDA) == 2 and pretence.mode == "default"
    assert gpu.peak_memory(run, CUDA) == 1.5
    assert pretence.calls[-3:] == ["reset_peak_memory_stats", "synchronize", "max_memory_allocated"]
    monkeypatch.setattr(gpu.ops, "missing_reason", lambda *args: "was not built")
    found = gpu.probe(CUDA)
    assert found["device"] == "a card" and found["capability"] == "9.0" and found["missing"] == "was not built"


@pytest.mark.parametrize("graphs", [False, True])
def test_times_on_a_device(graphs: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    pretence = Pretence(monkeypatch)
    ran = dict.fromkeys(("one", "other", "broken"), 0)

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            pretence.calls.append("record")

        def elapsed_time(self, end: Event) -> float:
            return 40.0

    class Graph:
        def replay(self) -> None:
            pretence.calls.append("replay")

    def capture(graph: Graph) -> Any:
        if not graphs:
            raise RuntimeError("operation not permitted when stream is capturing")
        return nullcontext()

    def counted(name: str) -> Any:
        def run() -> None:
            if name == "broken":
                raise RuntimeError("CUDA error: out of memory\nmore")
            ran[name] += 1

        return run

    stream = SimpleNamespace(wait_stream=lambda other: None)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", capture)
    monkeypatch.setattr(torch.cuda, "Stream", lambda: stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda s: nullcontext())
    times = deformable_attention.time_on_cuda({name: counted(name) for name in ran}, repeats=2, calls=5)
    assert times == {"one": 40 / 1000 / 5, "other": 40 / 1000 / 5}
    printed = capsys.readouterr().out
    assert "broken: does not run (RuntimeError: CUDA error: out of memory)" in printed
    assert ("no graph" in printed) != graphs
    assert ran["one"] == (3 + 1 if graphs else 3 + 3 * 5)


# ------------------------------------------------------------------------------------------------ a rehearsal
def test_a_call_that_fails_is_a_line_of_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    args = argparse.Namespace(device="cpu", repeats=1, failed=False)

    def run() -> None:
        raise RuntimeError("CUDA out of memory\nTried to ...")

    gpu.report("training step of 2, float32", run, 2, args)
    assert args.failed and "FAILED: CUDA out of memory" in capsys.readouterr().out


def test_a_detector_compiles_what_it_knows_to_be_whole() -> None:
    calls: list[str] = []
    gpu.compile_inference(SimpleNamespace(eval=lambda: calls.append("eval"), compile=lambda: calls.append("compile")))
    assert calls == ["eval", "compile"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["dino_r50_4scale", "detr_r50"])
def test_a_detector_s_table(name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    small = ["MODEL.DETR.HIDDEN_DIM", "32", "MODEL.DETR.NUM_HEADS", "4", "MODEL.DETR.ENC_LAYERS", "1"]
    options = ["--device", "cpu", "--size", "64", "96", "--repeats", "1", "--detector", name]
    monkeypatch.setattr("sys.argv", ["gpu", "model", *options, "--opts", *small, "MODEL.DETR.DEC_LAYERS", "2"])
    with pytest.raises(SystemExit, match="0"):
        gpu.main()
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f"{name}, 64x96") and len(lines) == 6
    for line in lines[2:]:
        rate, milliseconds = (float(number) for number in line[40:].split()[:2])
        assert rate > 0 and milliseconds > 0


@pytest.mark.slow
def test_the_script_itself(tmp_path: Path) -> None:
    options = ["--device", "cpu", "--patience", "10", "--minutes", "10", "--only", "check", "--rounds", "1"]
    result = subprocess.run(
        ["bash", "tools/gpu_check.sh", *options, "--output", str(tmp_path)],
        cwd=ROOT,
        env={**os.environ, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert "all within tolerance on cpu, seed 1" in (tmp_path / "check.txt").read_text()
    assert summary(tmp_path)["smoke"].startswith("ok") and summary(tmp_path)["check"].startswith("ok")
    assert result.stdout.endswith((tmp_path / "summary.txt").read_text())
