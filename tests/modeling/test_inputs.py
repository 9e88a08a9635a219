"""What a detector is given that it cannot take: one clear line, in training and in evaluation."""

from __future__ import annotations

import logging
import re
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from detectron2.structures import Boxes, Instances, RotatedBoxes

IMAGE = torch.zeros(3, 32, 48)


def truth(**fields: Any) -> Instances:
    instances = Instances((32, 48))
    for name, value in fields.items():
        instances.set(name, value)
    return instances


BOXES = torch.tensor([[1.0, 1, 9, 9]])
CLASSES = torch.tensor([0])


@pytest.mark.parametrize(
    "inputs, message",
    [
        ([], "a list of Detectron2's dicts, not an empty list"),
        ({"image": IMAGE}, "a list of Detectron2's dicts, not a dict"),
        (IMAGE[None], "a list of Detectron2's dicts, not a Tensor"),
        ((x for x in [{"image": IMAGE}]), "a list of Detectron2's dicts, not a generator"),
        ([IMAGE], "dicts with an 'image', a tensor, not a Tensor"),
        ([{"image": IMAGE.numpy()}], "dicts with an 'image', a tensor, not a ndarray"),
        ([{"file_name": "a.png"}], "dicts with an 'image', a tensor, not none, with the keys 'file_name'"),
        ([{"image": IMAGE.permute(1, 2, 0), "file_name": "a.png"}], r"a\.png has shape \(32, 48, 3\); \(3, height"),
    ],
)
def test_no_images(inputs: Any, message: str) -> None:
    model = tiny.build("DETR")
    for training in (False, True):
        with pytest.raises(ValueError, match=message) as told:
            model.train(training)(inputs)
        assert "\n" not in str(told.value)


@pytest.mark.parametrize(
    "instances, message",
    [
        (None, r"comes without ground truth.*is_train=True.*model\.eval\(\)"),
        (truth(pred_boxes=Boxes(BOXES)), '"instances" without gt_boxes and gt_classes: a mapper for training'),
        (truth(gt_boxes=Boxes(BOXES)), '"instances" without gt_classes'),
        (truth(gt_boxes=BOXES, gt_classes=CLASSES), r"gt_boxes of type Tensor: detectron2\.structures\.Boxes is"),
        (truth(gt_boxes=Boxes(BOXES), gt_classes=CLASSES + 3), "a box of class 3, but the detector has classes 0 to 2"),
        (truth(gt_boxes=Boxes(BOXES * torch.nan), gt_classes=CLASSES), "coordinates are not finite"),
        (truth(gt_boxes=RotatedBoxes(torch.ones(1, 5)), gt_classes=CLASSES), "gt_boxes of type RotatedBoxes"),
        (truth(gt_boxes=Boxes(BOXES), gt_classes=[0]), r"gt_classes in a list: a torch\.Tensor of shape \(n,\)"),
        (truth(gt_boxes=Boxes(BOXES), gt_classes=CLASSES[None]), r"gt_classes in a Tensor of shape \(1, 1\)"),
        (truth(gt_boxes=Boxes(BOXES), gt_classes=CLASSES + 0.5), r"gt_classes \[0\.5\]: whole numbers"),
        (truth(gt_boxes=Boxes(BOXES.flip(1)), gt_classes=CLASSES), r"edge lies before.*corners \(x0, y0, x1, y1\)"),
    ],
)
def test_no_ground_truth(instances: Any, message: str) -> None:
    model = tiny.build("DETR")
    inputs = [{"image": IMAGE, "instances": truth(gt_boxes=Boxes(BOXES), gt_classes=CLASSES)}]
    inputs += [{"image": IMAGE, "instances": instances, "file_name": "a.png"}]
    with pytest.raises(ValueError, match=rf"^a\.png .*{message}"):
        model.train()(inputs)
    assert len(model.eval()(inputs)) == 2, "predictions need none"


@pytest.mark.parametrize("size", [(0, 48), (-3, 48), ("32", 48), (32.5, 48), (float("nan"), 48)], ids=str)
def test_sizes_of_results_that_cannot_be(size: tuple[Any, Any]) -> None:
    with pytest.raises(ValueError, match=rf"an image asks for a result of height {re.escape(repr(size[0]))}: a whole"):
        tiny.build("DETR").eval()([{"image": IMAGE, "height": size[0], "width": size[1]}])


@pytest.mark.parametrize("size", [(None, 60), (torch.tensor(32), 60.0), (np.int64(32), np.int32(60))], ids=str)
def test_sizes_of_results_that_can_be(size: tuple[Any, Any]) -> None:
    (result,) = tiny.build("DETR").eval()([{"image": IMAGE, "height": size[0], "width": size[1]}])
    assert result["instances"].image_size == (32, 60)
    assert all(type(x) is int for x in result["instances"].image_size)


def test_boxes_that_are_not_finite_are_told_by_their_cause() -> None:
    model = tiny.build("DETR").eval()
    with pytest.raises(ValueError, match=r"boxes are not finite: a\.png has values that are not finite"):
        model([{"image": IMAGE * torch.nan, "file_name": "a.png"}])
    with torch.no_grad():
        next(model.transformer.decoder.parameters()).fill_(torch.nan)
    with pytest.raises(
        ValueError, match=r"boxes are not finite: the detector's weights are not finite \(transformer\."
    ):
        model([{"image": IMAGE}])


def test_values_from_0_to_1_are_told_of(caplog: pytest.LogCaptureFixture) -> None:
    model = tiny.build("DETR").eval()
    with caplog.at_level(logging.WARNING):
        model([{"image": torch.full((3, 32, 48), 200.0)}, {"image": IMAGE}])
        assert not caplog.messages
        model([{"image": torch.full((3, 32, 48), 0.75)}])
    assert "values of at most 0.75, and detectors take 0 to 255" in caplog.text
