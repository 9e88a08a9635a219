"""What a detector is given that it cannot take: one clear line, in training and in evaluation."""

from __future__ import annotations

from typing import Any

import pytest
import tiny
import torch
from detectron2.structures import Boxes, Instances

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
    ],
)
def test_no_ground_truth(instances: Any, message: str) -> None:
    model = tiny.build("DETR")
    inputs = [{"image": IMAGE, "instances": truth(gt_boxes=Boxes(BOXES), gt_classes=CLASSES)}]
    inputs += [{"image": IMAGE, "instances": instances, "file_name": "a.png"}]
    with pytest.raises(ValueError, match=rf"^a\.png .*{message}"):
        model.train()(inputs)
    assert len(model.eval()(inputs)) == 2, "predictions need none"
