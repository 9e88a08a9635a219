"""How the batch of one step is divided: over processes, and on each over parts computed one after the other."""

from __future__ import annotations

from detectron2.config import CfgNode


def parts_of_step(cfg: CfgNode, processes: int) -> int:
    """In how many parts each process computes its share of SOLVER.IMS_PER_BATCH.

    The fewest, but at least SOLVER.ACCUMULATION_STEPS, that are of one size and of no more than
    SOLVER.IMAGES_PER_FORWARD images.

    Args:
        cfg: reads SOLVER.
        processes: of the whole run.

    Raises:
        ValueError: the batch cannot be divided so, or a key is out of its range.
    """
    total, steps, most = cfg.SOLVER.IMS_PER_BATCH, cfg.SOLVER.ACCUMULATION_STEPS, cfg.SOLVER.IMAGES_PER_FORWARD
    if steps < 1:
        raise ValueError(f"SOLVER.ACCUMULATION_STEPS is {steps}; it must be at least 1")
    if most < 0:
        raise ValueError(f"SOLVER.IMAGES_PER_FORWARD is {most}; it must be positive, or 0 for no limit")
    if total < 1 or total % (processes * steps):
        times = f", SOLVER.ACCUMULATION_STEPS {steps} times" if steps > 1 else ""
        raise ValueError(f"SOLVER.IMS_PER_BATCH {total} cannot be split over {processes} processes{times}")
    share = total // processes
    return next(n for n in range(steps, share + 1) if share % n == 0 and share // n <= (most or share))


def images_per_forward(cfg: CfgNode, processes: int) -> int:
    """The images that a process sees in one forward of a training step.

    Raises:
        ValueError: see `parts_of_step`.
    """
    return int(cfg.SOLVER.IMS_PER_BATCH // (processes * parts_of_step(cfg, processes)))
