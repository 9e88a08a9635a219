"""Epochs become iterations."""

import pytest
from detectron2.config import CfgNode

from detr_family.engine.schedule import iterations_from_epochs


def test_the_papers_recipe_on_coco(cfg: CfgNode) -> None:
    cfg.merge_from_list(["SOLVER.IMS_PER_BATCH", 64, "SOLVER.EPOCHS", 500, "SOLVER.DROP_EPOCHS", (400,)])
    cfg.merge_from_list(["SOLVER.CHECKPOINT_EPOCHS", 10, "TEST.EVAL_EPOCHS", 5])
    cfg.freeze()
    result = iterations_from_epochs(cfg, 118287)
    assert result.SOLVER.MAX_ITER == 500 * 1848 and result.SOLVER.STEPS == (400 * 1848,)
    assert result.SOLVER.CHECKPOINT_PERIOD == 18480 and result.TEST.EVAL_PERIOD == 9240
    assert result.is_frozen() and cfg.SOLVER.MAX_ITER == 40000  # a copy


def test_iterations_are_left_alone_without_epochs(cfg: CfgNode) -> None:
    cfg.merge_from_list(["SOLVER.MAX_ITER", 70, "SOLVER.STEPS", (50, 60), "TEST.EVAL_PERIOD", 7])
    result = iterations_from_epochs(cfg, 10)
    assert (result.SOLVER.MAX_ITER, result.SOLVER.STEPS, result.TEST.EVAL_PERIOD) == (70, (50, 60), 7)


def test_fewer_images_than_a_batch_make_one_iteration(cfg: CfgNode) -> None:
    cfg.merge_from_list(["SOLVER.IMS_PER_BATCH", 16, "SOLVER.EPOCHS", 3, "SOLVER.DROP_EPOCHS", (2, 5)])
    result = iterations_from_epochs(cfg, 5)
    assert result.SOLVER.MAX_ITER == 3 and result.SOLVER.STEPS == (2,)  # the drop after the end is left out


def test_drops_without_a_length_are_refused(cfg: CfgNode) -> None:
    cfg.SOLVER.DROP_EPOCHS = (3,)
    with pytest.raises(ValueError, match=r"SOLVER\.DROP_EPOCHS.*SOLVER\.EPOCHS"):
        iterations_from_epochs(cfg, 100)
