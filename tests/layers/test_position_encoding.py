"""Spatial encodings."""

import math

import pytest
import torch

from detr_family.layers.position_encoding import LearnedPositionEncoding, SinePositionEncoding


def test_sine_values() -> None:
    encoding = SinePositionEncoding(8, temperature_x=20.0, temperature_y=10000.0)
    mask = torch.zeros(1, 3, 5, dtype=torch.bool)
    value = encoding(mask)
    assert value.shape == (1, 3, 5, 8)
    y, x = 2 / 3 * 2 * math.pi, 4 / 5 * 2 * math.pi  # row 1 and column 3, counted from 1
    expected = []
    for position, temperature in ((y, 10000.0), (x, 20.0)):
        for power in (0, 0.5):
            expected += [math.sin(position / temperature**power), math.cos(position / temperature**power)]
    torch.testing.assert_close(value[0, 1, 3], torch.tensor(expected), atol=1e-5, rtol=1e-5)


def test_sine_may_count_from_the_middle_of_pixels() -> None:
    """Deformable DETR's: position (i - 0.5) / n in place of i / n."""
    mask = torch.zeros(1, 1, 4, dtype=torch.bool)
    value = SinePositionEncoding(4, temperature_x=20.0, temperature_y=20.0, offset=-0.5)(mask)
    torch.testing.assert_close(value[0, 0, :, 2], (2 * math.pi * torch.tensor([0.5, 1.5, 2.5, 3.5]) / 4).sin())


def test_sine_does_not_depend_on_padding() -> None:
    encoding = SinePositionEncoding(8, temperature_x=10000.0, temperature_y=10000.0)
    mask = torch.ones(1, 6, 7, dtype=torch.bool)
    mask[:, :3, :5] = False
    alone = encoding(torch.zeros(1, 3, 5, dtype=torch.bool))
    torch.testing.assert_close(encoding(mask)[:, :3, :5], alone)
    assert torch.isfinite(encoding(mask)).all()


def test_sine_needs_a_multiple_of_four() -> None:
    with pytest.raises(ValueError, match="multiples of 4"):
        SinePositionEncoding(6, temperature_x=1.0, temperature_y=1.0)


def test_learned_is_a_sum_of_columns_and_rows() -> None:
    encoding = LearnedPositionEncoding(6, size=9)
    value = encoding(torch.zeros(2, 3, 5, dtype=torch.bool))
    assert value.shape == (2, 3, 5, 6)
    torch.testing.assert_close(value[1, 2, 4, :3], encoding.col_embed.weight[4])
    torch.testing.assert_close(value[1, 2, 4, 3:], encoding.row_embed.weight[2])


def test_learned_names_the_setting_when_a_image_is_too_large() -> None:
    with pytest.raises(ValueError, match="LEARNED_SIZE"):
        LearnedPositionEncoding(6, size=4)(torch.zeros(1, 3, 5, dtype=torch.bool))
