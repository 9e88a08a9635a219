"""On a GPU: every detector takes a step there, and waits for the device once, for the matching."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import tiny
import torch

from detr_family.modeling.denoising import denoising_groups
from detr_family.modeling.structures import Targets

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


def syncs(call: Callable[[], None]) -> int:
    """How often `call` makes the host wait for the device."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            call()
        return sum("synchronizing" in str(w.message) for w in caught)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("name", tiny.DETECTORS)
def test_a_step_equals_that_on_the_cpu(name: str) -> None:
    inputs = tiny.batch()
    expected = tiny.quiet(name).train()(inputs)
    model = tiny.quiet(name).cuda().train()
    losses = model(inputs)
    for key, value in expected.items():
        assert losses[key].item() == pytest.approx(value.item(), rel=1e-3, abs=1e-4), key
    sum(losses.values()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("name", tiny.DETECTORS)
def test_a_step_waits_for_the_device_once(name: str) -> None:
    """The matcher's costs are the only copy to the host; targets come from there."""
    model = tiny.build(name).cuda().train()
    inputs = tiny.batch()

    def step() -> None:
        sum(model(inputs).values()).backward()

    step()
    assert syncs(step) <= 1 + (name == "DINO")  # DINO's encoder proposals are matched apart


@pytest.mark.parametrize("most", [1000, 20])
def test_making_denoising_groups_waits_for_nothing(most: int) -> None:
    truth = [x["instances"] for x in tiny.batch((3, 40, 0, 2))]
    targets = Targets.from_instances(truth, torch.device("cuda"))

    def make() -> None:
        denoising_groups(
            targets,
            num_classes=3,
            num_queries=7,
            num_groups=5,
            max_queries=most,
            label_noise=0.2,
            box_noise=0.4,
            eps=1e-3,
        )

    make()
    assert syncs(make) == 0
