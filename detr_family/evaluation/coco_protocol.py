"""COCO's evaluation protocol by the fastest implementation that is installed; their figures are the same.

pycocotools is the protocol's own. Detectron2 brings a compiled form where it was built with its extension; the package
faster-coco-eval (the extra of that name) is another, with files for all systems.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from detectron2.evaluation import coco_evaluation
from pycocotools.cocoeval import COCOeval

OFFICIAL = "pycocotools"
NAMES = ("faster-coco-eval", "detectron2", OFFICIAL)
Implementation = Callable[..., Any]


def implementations() -> dict[str, Implementation]:
    """Those that are installed by their names, the fastest first; each takes ground truth, results and "bbox"."""
    found: dict[str, Implementation] = {}
    try:
        from faster_coco_eval import COCOeval_faster
    except ImportError:
        pass
    else:
        found["faster-coco-eval"] = partial(COCOeval_faster, print_function=print)
    if coco_evaluation.COCOeval_opt is not COCOeval:
        found["detectron2"] = coco_evaluation.COCOeval_opt
    return {**found, OFFICIAL: COCOeval}


def find_implementation(name: str = "") -> tuple[str, Implementation]:
    """The one of a name, TEST.COCO_EVALUATION, else the fastest.

    Raises:
        ValueError: the name is unknown, or of one that is not installed.
    """
    known = implementations()
    if not name:
        return next(iter(known.items()))
    if name not in NAMES:
        raise ValueError(f"TEST.COCO_EVALUATION is {name!r}; it may be {', '.join(NAMES)}, or empty for the fastest")
    if name not in known:
        remedy = "pip install 'detr_family[fast-eval]'" if name == NAMES[0] else "build Detectron2's extension"
        raise ValueError(f"TEST.COCO_EVALUATION is {name!r}, which is not installed: {remedy}, or leave it empty")
    return name, known[name]


@contextmanager
def used_by_detectron2(implementation: Implementation) -> Iterator[None]:
    """Detectron2's evaluator takes its fast implementation from its module; it has no argument for another."""
    own = coco_evaluation.COCOeval_opt
    coco_evaluation.COCOeval_opt = implementation
    try:
        yield
    finally:
        coco_evaluation.COCOeval_opt = own
