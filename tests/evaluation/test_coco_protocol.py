"""Faster implementations of COCO's protocol give the protocol's figures."""

from __future__ import annotations

import builtins
from typing import Any

import numpy as np
import pytest
from detectron2.evaluation import coco_evaluation
from pycocotools.cocoeval import COCOeval

from detr_family.benchmarks.evaluation import command, made_up
from detr_family.evaluation import coco_protocol


def evaluated(implementation: Any, truth: Any, found: Any, limit: int) -> Any:
    evaluation = implementation(truth, found, "bbox")
    evaluation.params.maxDets = [1, 10, limit]
    evaluation.evaluate()
    evaluation.accumulate()
    if limit == 100:
        evaluation.summarize()
    return evaluation


@pytest.mark.parametrize("limit", [100, 130])
def test_all_figures_are_the_same(limit: int) -> None:
    """With crowd regions, equal scores, images without objects, classes without one, more detections than count."""
    if len(coco_protocol.implementations()) == 1:
        pytest.skip("needs faster-coco-eval or Detectron2's compiled evaluation (make setup EXTRAS=loggers)")
    truth, found = made_up(12, 150)
    for number, annotation in enumerate(truth.dataset["annotations"]):
        annotation["iscrowd"] = int(number % 5 == 0)
        annotation["category_id"] = 1 + annotation["category_id"] % 6
    for entry in found.dataset["annotations"]:
        entry["score"] = round(entry["score"], 1)
        entry["category_id"] = 1 + entry["category_id"] % 7
    truth.createIndex()
    found.createIndex()
    assert len({a["image_id"] for a in truth.dataset["annotations"]}) > 5
    (official,) = (evaluated(x, truth, found, limit) for x in [coco_protocol.implementations()["pycocotools"]])
    assert (official.eval["precision"] > 0).any() and (official.eval["recall"] > 0).any()
    for name, implementation in coco_protocol.implementations().items():
        other = evaluated(implementation, truth, found, limit)
        for key in ("precision", "recall"):
            np.testing.assert_allclose(other.eval[key], official.eval[key], rtol=0, atol=1e-12, err_msg=name)
        if limit == 100:
            np.testing.assert_allclose(other.stats[:12], official.stats, rtol=0, atol=1e-12, err_msg=name)


def test_the_fastest_that_is_there_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    known = coco_protocol.implementations()
    assert coco_protocol.find_implementation()[0] == next(iter(known))
    assert coco_protocol.find_implementation("pycocotools") == ("pycocotools", COCOeval)
    with pytest.raises(ValueError, match=r"TEST.COCO_EVALUATION is 'fast'; it may be faster-coco-eval, detectron2"):
        coco_protocol.find_implementation("fast")
    imported = builtins.__import__

    def without(name: str, *args: Any) -> Any:
        if name == "faster_coco_eval":
            raise ImportError(name)
        return imported(name, *args)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ValueError, match=r"not installed: pip install 'detr_family\[fast-eval\]', or leave it empty"):
        coco_protocol.find_implementation("faster-coco-eval")
    monkeypatch.setattr(coco_evaluation, "COCOeval_opt", COCOeval)
    assert coco_protocol.find_implementation()[0] == "pycocotools"
    monkeypatch.setattr(coco_evaluation, "COCOeval_opt", type("Compiled", (COCOeval,), {}))
    assert coco_protocol.find_implementation()[0] == "detectron2"


def test_the_benchmark_prints_each(capsys: pytest.CaptureFixture[str]) -> None:
    command(["--images", "3", "--detections", "5"])
    said = capsys.readouterr().out
    assert all(said.count(name) == 2 for name in coco_protocol.implementations()) and "AR100" in said
