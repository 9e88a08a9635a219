"""Predictor, evaluation and drawings, as for every detector, for this project's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import test_evaluation
import test_predictor
from engine import test_watch
from own_data import coco_folder  # noqa: F401  (a fixture)
from test_deformable_detectors import DETECTORS, known_to_the_suite  # noqa: F401  (a fixture)
from test_predictor import image, weights  # noqa: F401  (fixtures)

pytestmark = [pytest.mark.slow, pytest.mark.parametrize("name", DETECTORS)]


def test_predicts_what_an_evaluation_does(name: str, weights: Any, image: Path) -> None:  # noqa: F811
    test_predictor.test_predicts_what_an_evaluation_does(name, weights, image)


def test_batches_of_the_predictor(name: str, weights: Any) -> None:  # noqa: F811
    test_predictor.test_batches_give_what_single_images_give(name, weights)


def test_batches_of_the_evaluation(name: str, coco_folder: Path) -> None:  # noqa: F811
    test_evaluation.test_evaluation_in_batches_of_three_equals_one_by_one_without_a_criterion(name, coco_folder)


def test_predictions_are_drawn(name: str, coco_folder: Path) -> None:  # noqa: F811
    test_watch.test_predictions_of_every_detector_are_drawn(name, coco_folder)
