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


_REGISTERED = """
import sys
{first}
from detectron2.modeling import BACKBONE_REGISTRY, META_ARCH_REGISTRY
assert all(name in META_ARCH_REGISTRY for name in ("DETR", "ConditionalDETR", "DABDETR", "DNDETR", "DINO"))
assert "build_swin_backbone" in BACKBONE_REGISTRY
import detr_family
assert detr_family.modeling.DINO is META_ARCH_REGISTRY.get("DINO") and detr_family.layers and detr_family.model_zoo
assert detr_family.add_detr_family_config is detr_family.config.add_detr_family_config
assert not hasattr(detr_family, "nothing") and not hasattr(detr_family, "layers.fused")
assert "modeling" in dir(detr_family)
"""
_WAITS = 'import detr_family; assert not {"torch", "detectron2"} & set(sys.modules)'
_THREADS = """
import detr_family, importlib, torchvision
from concurrent.futures import ThreadPoolExecutor
with ThreadPoolExecutor() as pool:
    list(pool.map(importlib.import_module, ["detectron2.modeling", "detr_family.modeling"]))
"""


@pytest.mark.parametrize(
    "first",
    [
        _WAITS,
        _WAITS + "; from detectron2.modeling.backbone import build_backbone",
        "import detectron2.modeling, detr_family",
        "import detr_family.modeling",
        _THREADS,
    ],
)
def test_importing_the_package_registers_its_detectors(first: str) -> None:
    run = subprocess.run(
        [sys.executable, "-c", _REGISTERED.format(first=first)], cwd=ROOT, capture_output=True, text=True
    )
    assert not run.returncode, run.stderr[-2000:]


def test_they_are_registered_at_a_later_try_where_detectron2_could_not_be_loaded() -> None:
    code = """
import sys, detr_family
for name in ("detectron2.modeling.meta_arch", "detr_family.modeling.dino"):
    sys.modules[name] = None
    try:
        import detectron2.modeling
        raise AssertionError("it was loaded")
    except ImportError:
        del sys.modules[name]
from detectron2.modeling import META_ARCH_REGISTRY
assert "DINO" in META_ARCH_REGISTRY
"""
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert not run.returncode, run.stderr[-2000:]
