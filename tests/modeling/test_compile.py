"""torch.compile: one graph whatever the images' sizes are, and the same detections and losses."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

from detr_family.checkpoint import DETRCheckpointer
from detr_family.inference import Predictor
from detr_family.modeling.set_detector import SetDetector

Graphs = list[torch.fx.GraphModule]
Backend = Callable[[torch.fx.GraphModule, Sequence[Any]], Callable[..., Any]]


def counting(graphs: Graphs) -> Backend:
    """A backend that runs a graph as it is, and keeps it."""

    def backend(graph: torch.fx.GraphModule, _: Sequence[Any]) -> Callable[..., Any]:
        graphs.append(graph)
        return graph.forward

    return backend


def images(*sizes: tuple[int, int]) -> list[dict[str, Any]]:
    return [{"image": tiny.image(h, w, 0, seed=i)["image"]} for i, (h, w) in enumerate(sizes)]


# No level of DINO's has a single row of tokens: torch.compile takes a size of 1 for a case of its own.
BATCHES = [[(96, 112)], [(80, 128)], [(112, 96)], [(96, 96), (80, 112)], [(80, 96), (96, 80), (80, 80)]]


SLOW_BUT_DETR = [x if x == "DETR" else pytest.param(x, marks=pytest.mark.slow) for x in tiny.DETECTORS]


def check_one_graph(name: str, compile: Callable[[SetDetector, Backend], Callable[..., Any]]) -> None:
    torch._dynamo.reset()
    model, graphs = tiny.build(name).eval(), Graphs()
    compiled = compile(tiny.build(name).eval(), counting(graphs))
    counts = []
    with torch.no_grad():
        for sizes in BATCHES:
            for a, b in zip(model(images(*sizes)), compiled(images(*sizes)), strict=True):
                expected, found = a["instances"], b["instances"]
                torch.testing.assert_close(found.scores, expected.scores)
                torch.testing.assert_close(found.pred_boxes.tensor, expected.pred_boxes.tensor, rtol=1e-4, atol=1e-3)
            counts.append(len(graphs))
    # One image alone, several with padding, for some detectors another number of images; the sizes add none.
    assert counts[:3] == [1, 1, 1] and counts[-1] <= 3


@pytest.mark.parametrize("name", SLOW_BUT_DETR)
def test_one_graph_for_all_sizes(name: str) -> None:
    def compile(model: SetDetector, backend: Backend) -> Callable[..., Any]:
        compiled: Any = torch.compile(model, fullgraph=True, dynamic=True, backend=backend)
        return compiled

    check_one_graph(name, compile)


@pytest.mark.slow
def test_one_graph_of_a_detector_that_compiles_itself() -> None:
    def compile(model: SetDetector, backend: Backend) -> Callable[..., Any]:
        model.compile(backend=backend)
        return model

    check_one_graph("DINO", compile)


@pytest.mark.slow
@pytest.mark.parametrize("name", tiny.DETECTORS)
def test_training_is_compiled_up_to_the_matcher(name: str) -> None:
    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    model, graphs = tiny.quiet(name).train(), Graphs()
    compiled: Any = torch.compile(model, dynamic=True, backend=counting(graphs))
    counts = []
    for i, (height, width) in enumerate([(64, 96), (80, 96), (96, 64), (112, 80), (96, 128)]):
        batch = [tiny.image(height, width, 3, seed=i), tiny.image(height - 16, width + 16, 2 + i, seed=9)]
        expected, found = model(batch), compiled(batch)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
        counts.append(len(graphs))
    assert sum(counters["graph_break"].values()) <= 1  # the noise of denoising
    assert sum("mm" in str(n.target) or "linear" in str(n.target) for n in graphs[-1].graph.nodes) > 10
    # DINO is compiled once more, for a second size, and then no more
    assert counts[0] == 1 and counts[-1] <= (2 if name == "DINO" else 1)
    sum(found.values()).backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_a_predictor_compiles_on_request(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options: list[dict[str, Any]] = []
    monkeypatch.setattr(torch, "compile", lambda function, **keys: options.append(keys) or function)
    array = tiny.image(50, 60, 0, seed=4)["image"].permute(1, 2, 0).numpy()
    size = {"min_size": 64, "max_size": 100}
    expected = Predictor(tiny.build("DETR"), **size)(array)
    assert not options
    found = Predictor(tiny.build("DETR"), **size, compile=True)(array)
    assert options == [{"fullgraph": True, "dynamic": True}]
    assert torch.equal(expected.scores, found.scores)
    cfg = tiny.cfg_of("DETR")
    DETRCheckpointer(tiny.build("DETR"), str(tmp_path)).save("weights")
    predictor = Predictor.from_config(cfg, tmp_path / "weights.pth", compile=True)
    assert len(options) == 2 and "detect" in vars(predictor.model)
    with pytest.raises(ValueError, match="ask for one of them"):
        Predictor.from_config(cfg, tmp_path / "weights.pth", optimize="bfloat16", compile=True)
