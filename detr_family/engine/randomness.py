"""Random numbers that depend on where in the training they are drawn, and on nothing else.

Every part of a step and every image's augmentation starts its generators from the run's seed and its own place
in the training. So a resumed run draws what an uninterrupted one would have drawn, whatever came between (evaluation,
hooks), whatever the number of data workers and however far they had read ahead; and nothing but the seed and
the position needs to be stored.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from detectron2.utils import comm

# What random numbers are for: the same place may need different ones.
IMAGE, STEP, ORDER = 0, 1, 2


def run_seed(seed: int) -> int:
    """The seed of a run: the given one, or where it is negative one drawn anew, the same in all processes."""
    return seed if seed >= 0 else int(comm.all_gather(random.SystemRandom().randrange(2**31))[0])


def seed_all(*key: int) -> None:
    """Start the generators of Python, NumPy and torch, those of CUDA devices included, from a key.

    Args:
        key: whole numbers from 0: the run's seed, what for, and the place.
    """
    state = _words(*key)
    torch.manual_seed(state[2] << 32 | state[3])
    random.seed(state[0])
    np.random.seed(state[1])


@contextmanager
def seeded(*key: int) -> Iterator[None]:
    """As `seed_all`, for the block only and on the CPU only; afterwards the generators are where they were."""
    before = random.getstate(), np.random.get_state(), torch.get_rng_state()
    state = _words(*key)
    random.seed(state[0])
    np.random.seed(state[1])
    torch.default_generator.manual_seed(state[2] << 32 | state[3])
    try:
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])
        torch.set_rng_state(before[2])


def _words(*key: int) -> list[int]:
    return [int(x) for x in np.random.SeedSequence(key).generate_state(4)]
