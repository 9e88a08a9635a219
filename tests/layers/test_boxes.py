"""GIoU against torchvision's, and where torchvision's is NaN."""

import torch
from torchvision.ops import generalized_box_iou

from detr_family.layers.boxes import generalized_iou


def boxes(n: int, seed: int) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    start = torch.rand(n, 2, generator=g)
    return torch.cat([start, start + 0.01 + torch.rand(n, 2, generator=g)], 1)


def test_equals_torchvision() -> None:
    a, b = boxes(5, 0), boxes(7, 1)
    expected = generalized_box_iou(a, b)
    torch.testing.assert_close(generalized_iou(a[:, None], b), expected)
    torch.testing.assert_close(generalized_iou(a, b[:5]), expected[:, :5].diagonal())
    assert (expected < 0).any() and (expected > 0).any()


def test_known_values() -> None:
    a = torch.tensor([0.0, 0.0, 2.0, 2.0])
    assert generalized_iou(a, a) == 1
    assert generalized_iou(a, torch.tensor([2.0, 0.0, 4.0, 2.0])) == 0  # side by side: the hull has no waste
    assert generalized_iou(a, torch.tensor([6.0, 0.0, 8.0, 2.0])) == -0.5  # half of the hull is waste


def test_points_are_finite() -> None:
    a = torch.tensor([[0.5, 0.5, 0.5, 0.5]], requires_grad=True)
    value = generalized_iou(a, a.detach())
    value.sum().backward()
    assert torch.isfinite(value).all() and torch.isfinite(a.grad).all()
