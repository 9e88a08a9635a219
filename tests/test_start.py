"""What starting a command loads, and what it sets before torch is loaded."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from detr_family.threads import SPINS, sleep_while_waiting

ROOT = Path(__file__).resolve().parents[1]

_HEAVY = ("matplotlib", "tensorboard", "tensorflow", "pandas", "transformers", "timm", "onnxruntime", "openvino")
_LOADED = f"""
import json, os, sys
import {{module}}
heavy = [name for name in {(*_HEAVY, "jinja2", "scipy.optimize", "torch.utils.tensorboard")!r} if name in sys.modules]
print(json.dumps([heavy, os.environ.get("GOMP_SPINCOUNT"), "torch" in sys.modules]))
"""


def start(module: str, **environment: str) -> tuple[list[str], str | None, bool]:
    """What is loaded after an import in a fresh process, GOMP_SPINCOUNT there, and whether torch is loaded."""
    clean = {k: v for k, v in os.environ.items() if k not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    run = subprocess.run(
        [sys.executable, "-c", _LOADED.format(module=module)],
        env={**clean, "PYTHONPATH": str(ROOT), **environment},
        capture_output=True,
        text=True,
    )
    assert not run.returncode, run.stderr[-2000:]
    heavy, spins, torch_is_loaded = json.loads(run.stdout.splitlines()[-1])
    return heavy, spins, torch_is_loaded


def test_training_loads_nothing_that_it_does_not_need_and_lets_threads_sleep() -> None:
    assert start("detr_family.commands.train") == ([], SPINS, True)


def test_the_console_command_lets_threads_sleep_before_torch_is_loaded() -> None:
    # libgomp reads the variable as it is loaded: "import torch" first is too late.
    assert start("torch, detr_family.threads; detr_family.threads.sleep_while_waiting()")[1] is None


@pytest.mark.parametrize("said", [{"GOMP_SPINCOUNT": "7"}, {"OMP_WAIT_POLICY": "ACTIVE"}])
def test_what_the_user_said_stays(said: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "torch")
    for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY"):
        monkeypatch.delenv(name, raising=False)
    for name, value in said.items():
        monkeypatch.setenv(name, value)
    assert not sleep_while_waiting()
    assert os.environ.get("GOMP_SPINCOUNT") == said.get("GOMP_SPINCOUNT")


def test_it_is_set_only_before_torch_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY"):
        monkeypatch.delenv(name, raising=False)
    assert "torch" in sys.modules and not sleep_while_waiting()  # libgomp has read it already
    monkeypatch.delitem(sys.modules, "torch")
    monkeypatch.setattr(os, "environ", dict(os.environ))
    assert sleep_while_waiting()
    assert os.environ["GOMP_SPINCOUNT"] == SPINS
