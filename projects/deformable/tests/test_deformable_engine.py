"""What the training engine promises for every detector, for this project's."""

from __future__ import annotations

from pathlib import Path

import pytest
import test_class_rows
import test_freezing
from engine import test_accumulation, test_precision, test_resume
from layers import test_checkpointing
from test_deformable_detectors import DETECTORS, known_to_the_suite  # noqa: F401  (a fixture)

pytestmark = [pytest.mark.slow, pytest.mark.parametrize("name", DETECTORS)]


def test_a_stopped_and_resumed_run_is_bit_equal(name: str, tmp_path: Path) -> None:
    test_resume.test_a_stopped_and_resumed_run_is_bit_equal(name, tmp_path)


def test_parts_are_the_whole(name: str) -> None:
    test_accumulation.test_parts_are_the_whole(name)


def test_what_is_frozen_stays(name: str) -> None:
    test_freezing.test_what_is_frozen_by_name_stays_bit_equal_and_is_not_in_the_optimizer(name)


def test_rows_of_classes_go_by_name(name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    test_class_rows.test_rows_of_the_same_names_are_kept_and_others_start_anew(name, tmp_path, caplog)


@pytest.mark.parametrize("part", test_checkpointing.PARTS)
def test_checkpointed_gradients_are_the_same(name: str, part: str) -> None:
    test_checkpointing.test_gradients_are_the_same_with_dropout_and_less_is_kept(name, part)


@pytest.mark.parametrize("precision", ["float16", "bfloat16"])
def test_mixed_precision(name: str, precision: str) -> None:
    test_precision.test_layers_compute_in_it_and_boxes_and_losses_in_float32(name, precision)
