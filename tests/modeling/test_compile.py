"""torch.compile of the evaluation: one graph, whatever the images' sizes are, and the same detections."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import tiny
import torch

from detr_family.inference import Predictor

Graphs = list[torch.fx.GraphModule]


def counting(graphs: Graphs) -> Callable[[torch.fx.GraphModule, Sequence[Any]], Callable[..., Any]]:
    """A backend that runs a graph as it is, and keeps it."""

    def backend(graph: torch.fx.GraphModule, _: Sequence[Any]) -> Callable[..., Any]:
        graphs.append(graph)
        return graph.forward

    return backend


def images(*sizes: tuple[int, int]) -> list[dict[str, Any]]:
    return [{"image": tiny.image(h, w, 0, seed=i)["image"]} for i, (h, w) in enumerate(sizes)]


# No level of DINO's has a single row of tokens: torch.compile takes a size of 1 for a case of its own.
BATCHES = [[(96, 112)], [(80, 128)], [(112, 96)], [(96, 96), (80, 112)], [(80, 96), (96, 80), (80, 80)]]


@pytest.mark.parametrize(
    "name", [x if x == "DETR" else pytest.param(x, marks=pytest.mark.slow) for x in tiny.DETECTORS]
)
def test_one_graph_for_all_sizes(name: str) -> None:
    torch._dynamo.reset()
    model, compiled = tiny.build(name).eval(), tiny.build(name).eval()
    graphs: Graphs = []
    compiled.compile(backend=counting(graphs))
    counts = []
    with torch.no_grad():
        for sizes in BATCHES:
            for a, b in zip(model(images(*sizes)), compiled(images(*sizes)), strict=True):
                expected, found = a["instances"], b["instances"]
                torch.testing.assert_close(found.scores, expected.scores)
                torch.testing.assert_close(found.pred_boxes.tensor, expected.pred_boxes.tensor, rtol=1e-4, atol=1e-3)
            counts.append(len(graphs))
    assert counts[:3] == [1, 1, 1] and counts[-1] <= 3  # one image alone, several with padding; the sizes add none


def test_a_predictor_compiles_on_request(monkeypatch: pytest.MonkeyPatch) -> None:
    options: list[dict[str, Any]] = []
    monkeypatch.setattr(torch, "compile", lambda function, **keys: options.append(keys) or function)
    array = tiny.image(50, 60, 0, seed=4)["image"].permute(1, 2, 0).numpy()
    size = {"min_size": 64, "max_size": 100}
    expected = Predictor(tiny.build("DETR"), **size)(array)
    assert not options
    found = Predictor(tiny.build("DETR"), **size, compile=True)(array)
    assert options == [{"fullgraph": True, "dynamic": True}]
    assert torch.equal(expected.scores, found.scores)
