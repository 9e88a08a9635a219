"""The operator's benchmark calls its contestants as they want to be called."""

from __future__ import annotations

import enum
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch

from detr_family.benchmarks import deformable_attention as benchmark


class Backend(enum.Enum):
    """As in deformops 3.0, whose registry refuses plain strings."""

    CUDA = "cuda"
    TRITON = "triton"


def test_variants_of_the_kernels_are_contestants_too(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[list[str]] = [[]]

    def choose(names: list[str]) -> list[str]:
        taken.append(names)
        return taken[-2]

    monkeypatch.setattr(benchmark.ops, "_choose_variants", choose)
    runs = dict.fromkeys(["grid_sample", "detr_family", "detr_family fused"], lambda: taken[-1])
    forward = benchmark.with_variants(runs, backward=False)
    assert list(forward) == [
        *("grid_sample", "detr_family", "detr_family, heads", "detr_family fused", "detr_family fused, heads")
    ]
    both = benchmark.with_variants(runs, backward=True)
    assert len(both) == 3 + 2 * 3
    assert both["detr_family fused, combine + heads"]() == ["combine", "heads"]
    assert both["detr_family, combine"]() == ["combine"] and both["detr_family"]() == []
    assert taken[-1] == []


def test_deformops_is_called_with_its_own_enum(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def msda(value, shapes, starts, locations, weights, *, backend):
        if not isinstance(backend, Backend):
            raise TypeError(f"backend must be a Backend, not {backend!r}")
        if backend is Backend.CUDA:
            raise RuntimeError("the wheel holds no CUDA library")
        calls.append((value, shapes, starts, locations, weights.dtype))
        return value

    registry = ModuleType("deformops.registry")
    registry.Backend, registry.msda = Backend, msda
    monkeypatch.setitem(sys.modules, "deformops", ModuleType("deformops"))
    monkeypatch.setitem(sys.modules, "deformops.registry", registry)
    monkeypatch.setattr(benchmark.ops, "missing_reason", lambda *_: "no device here")
    value = SimpleNamespace(is_cuda=True, device=torch.device("cuda", 0), dtype=torch.float16)
    inputs = SimpleNamespace(value=value, shapes=1, starts=2, locations=3, weights=torch.ones(2))
    found = {name: run for name, run in benchmark.contestants(inputs).items() if "deformops" in name}
    assert len(found) == 1
    for run, raw in found.values():
        assert run(inputs) is value and not raw
    assert calls == [(value, 1, 2, 3, torch.float16)]
