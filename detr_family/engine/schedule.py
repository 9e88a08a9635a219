"""Recipes count in epochs, Detectron2 in iterations."""

from __future__ import annotations

import logging

from detectron2.config import CfgNode


def iterations_from_epochs(cfg: CfgNode, num_images: int) -> CfgNode:
    """A copy of `cfg` whose schedule is in iterations, for a training set of `num_images` images.

    An epoch has num_images // SOLVER.IMS_PER_BATCH iterations, at least 1; like the releases it drops a last
    batch that is not full. Keys in epochs that are 0 or empty leave Detectron2's keys as they are. Drops
    after the end of the training are left out.

    Raises:
        ValueError: DROP_EPOCHS without EPOCHS.
    """
    solver = cfg.SOLVER
    if solver.DROP_EPOCHS and not solver.EPOCHS:
        raise ValueError(
            f"SOLVER.DROP_EPOCHS is {solver.DROP_EPOCHS} but SOLVER.EPOCHS is 0: to count in iterations set "
            'SOLVER.DROP_EPOCHS "()" and SOLVER.STEPS'
        )
    per_epoch = max(num_images // solver.IMS_PER_BATCH, 1)
    cfg = cfg.clone()
    frozen = cfg.is_frozen()
    cfg.defrost()
    if solver.EPOCHS:
        cfg.SOLVER.MAX_ITER = solver.EPOCHS * per_epoch
        cfg.SOLVER.STEPS = tuple(e * per_epoch for e in solver.DROP_EPOCHS if e < solver.EPOCHS)
    if solver.CHECKPOINT_EPOCHS:
        cfg.SOLVER.CHECKPOINT_PERIOD = solver.CHECKPOINT_EPOCHS * per_epoch
    if cfg.TEST.EVAL_EPOCHS:
        cfg.TEST.EVAL_PERIOD = cfg.TEST.EVAL_EPOCHS * per_epoch
    if frozen:
        cfg.freeze()
    logging.getLogger(__name__).info(
        "%d training images in batches of %d: %d iterations an epoch, %d in all, learning rate drops at %s",
        num_images,
        solver.IMS_PER_BATCH,
        per_epoch,
        cfg.SOLVER.MAX_ITER,
        list(cfg.SOLVER.STEPS) or "none",
    )
    return cfg
