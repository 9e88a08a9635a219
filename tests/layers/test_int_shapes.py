"""Sizes as tensors, and masks at the sizes of feature maps."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from detr_family.layers.shapes import nearest


@pytest.mark.parametrize("stride", [4, 8, 16, 32, 64])
def test_masks_are_those_of_the_releases(stride: int) -> None:
    generator = torch.Generator().manual_seed(stride)
    for height in [*range(1, 200), 438, 600, 800, 1199, 1333]:
        mask = torch.rand(2, height, 21, generator=generator) < 0.5
        size = (-(-height // stride), 4)
        assert torch.equal(nearest(mask, size), F.interpolate(mask[None].float(), size=size)[0].bool()), height


def test_a_pixel_is_the_one_that_whole_numbers_say() -> None:
    rows = torch.arange(150).reshape(1, 150, 1)
    assert nearest(rows, (18, 1)).flatten().tolist() == [i * 150 // 18 for i in range(18)]
