"""The instability of matching is the paper's number: how many queries changed their box since the last epoch."""

from __future__ import annotations

from typing import Any

import pytest
import tiny
import torch
from detectron2.config import CfgNode
from detectron2.utils.events import EventStorage
from torch import Tensor

from detr_family.data.datasets.coco import register_datasets, training_dicts
from detr_family.data.datasets.shapes import write_shapes
from detr_family.engine.instability import MatchingInstability, build_instability_hook, matchings
from detr_family.modeling.set_detector import SetDetector
from detr_family.modeling.structures import Assignment


def images() -> list[dict[str, Any]]:
    return [tiny.image(64, 96, 3, seed=0), tiny.image(80, 48, 0, seed=1), tiny.image(64, 64, 2, seed=2)]


def same(x: dict[str, Any]) -> dict[str, Any]:
    return x


class Fixed:
    """A matcher that gives the boxes of a batch to the queries it is told, one after another."""

    def __init__(self, queries: list[int]) -> None:
        self.queries = queries

    def __call__(self, prediction: Any, targets: Any) -> Assignment:
        count = len(targets)
        taken, self.queries = self.queries[:count], self.queries[count:]
        return Assignment(torch.tensor([taken], dtype=torch.long), torch.arange(count)[None])


def told(*queries: int) -> SetDetector:
    model = tiny.build("DABDETR").train()
    model.matcher = Fixed(list(queries))  # type: ignore[assignment]
    return model


@pytest.mark.parametrize("batch_size", [1, 2, 3])
def test_every_query_has_the_box_it_is_matched_to(batch_size: int) -> None:
    v = matchings(told(4, 0, 6, 3, 1), images(), same, batch_size)
    assert [x.tolist() for x in v] == [[1, -1, -1, -1, 0, -1, 2], [-1] * 7, [-1, 1, -1, 0, -1, -1, -1]]


def test_is_counts_the_queries_that_changed() -> None:
    hook = MatchingInstability(images(), same, period=5, batch_size=3)
    assert hook.measure(told(4, 0, 6, 3, 1)) is None
    assert hook.measure(told(4, 0, 6, 3, 1)) == 0
    # Boxes 0 and 1 of the first image change places (two queries), box 0 of the last goes to a free one (two).
    assert hook.measure(told(0, 4, 6, 5, 1)) == pytest.approx(4 / 3)


def test_it_is_recorded_at_the_end_of_epochs_and_goes_on_after_a_resume() -> None:
    class Run:
        iter = 0
        model: SetDetector
        storage: EventStorage

    def epochs(hook: MatchingInstability, queries: list[tuple[int, ...]], start: int) -> dict[int, float]:
        recorded = {}
        with EventStorage(start) as storage:
            run = Run()
            run.storage, hook.trainer = storage, run
            for i in range(len(queries) * 2):
                run.iter = storage.iter = start + i
                run.model = told(*queries[i // 2])
                hook.after_step()
            for value, step in storage.history("matching_instability").values():
                recorded[int(step)] = value
        return recorded

    a, b, c = (4, 0, 6, 3, 1), (0, 4, 6, 3, 1), (0, 4, 6, 3, 2)
    hook = MatchingInstability(images(), same, period=2, batch_size=3)
    assert epochs(hook, [a, b], 0) == {3: pytest.approx(2 / 3)}
    other = MatchingInstability(images(), same, period=2, batch_size=3)
    other.load_state_dict(hook.state_dict())
    assert epochs(other, [c], 4) == {5: pytest.approx(2 / 3)}
    stranger = MatchingInstability(images()[:1], same, period=2, batch_size=3)
    stranger.load_state_dict(hook.state_dict())
    assert stranger.previous is None


@pytest.mark.parametrize("name", tiny.DETECTORS)
def test_it_leaves_every_detector_as_it_was(name: str) -> None:
    model = tiny.build(name).train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    state = torch.get_rng_state()
    v = matchings(model, images(), same, 2)
    assert model.training and torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(x, before[k]) for k, x in model.state_dict().items())
    assert [sorted(x[x >= 0].tolist()) for x in v] == [[0, 1, 2], [], [0, 1]]


def test_images_are_shown_without_augmentation(cfg: CfgNode, tmp_path: Any) -> None:
    entries = write_shapes(str(tmp_path), 7, 2, seed=3)
    cfg.DATASETS.COCO_FORMAT = [list(x) for x in entries]
    cfg.DATASETS.TRAIN = (entries[0][0],)
    cfg.INPUT.MIN_SIZE_TRAIN, cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST = (40, 50, 60), 70, 90
    cfg.SOLVER.IMS_PER_BATCH = 2
    register_datasets(cfg)
    dataset = training_dicts(cfg)
    assert build_instability_hook(cfg, dataset, 2) is None
    cfg.TEST.INSTABILITY_IMAGES = 3
    hook = build_instability_hook(cfg, dataset, 2)
    assert hook is not None and hook.period == 3 and len(hook.dicts) == 3
    first: list[Tensor] = [hook.mapper(x)["image"] for x in hook.dicts]
    again: list[Tensor] = [hook.mapper(x)["image"] for x in hook.dicts]
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert all(min(x.shape[1:]) == 70 or max(x.shape[1:]) == 90 for x in first)
