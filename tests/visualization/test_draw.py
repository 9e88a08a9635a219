"""Images of predictions, and what a run has recorded: what is in them, not how they look."""

import json

import numpy as np
import pytest
import torch
from detectron2.structures import Boxes, Instances
from PIL import Image

from detr_family.visualization import draw as visualize
from detr_family.visualization.draw import COLOURS, draw_comparison, read_metrics

NAMES = ["circle", "square", "triangle"]


def instances(boxes, classes, scores=None):
    result = Instances((60, 100))
    tensor = torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)
    if scores is None:
        result.gt_boxes, result.gt_classes = Boxes(tensor), torch.tensor(classes, dtype=torch.int64)
    else:
        result.pred_boxes, result.pred_classes = Boxes(tensor), torch.tensor(classes, dtype=torch.int64)
        result.scores = torch.tensor(scores)
    return result


def rgb(colour):
    return tuple(int(colour[i : i + 2], 16) for i in (1, 3, 5))


def count(image, colour):
    return int((np.asarray(image) == rgb(colour)).all(axis=-1).sum())


def halves(image):
    return image.crop((0, 0, image.width // 2, image.height)), image.crop(
        (image.width // 2, 0, image.width, image.height)
    )


def test_predictions_left_truth_right_each_class_its_colour():
    predictions = instances([[10, 10, 30, 30], [50, 20, 80, 50]], [0, 2], [0.9, 0.2])
    truth = instances([[12, 10, 30, 30]], [1])
    image = draw_comparison(np.zeros((60, 100, 3), np.uint8), predictions, truth, NAMES, 0.5)
    left, right = halves(image)
    assert count(left, COLOURS[0]) > 200 and count(left, COLOURS[2]) == 0  # 0.2 is below the threshold
    assert count(right, COLOURS[1]) > 200 and count(left, COLOURS[1]) == 0


def test_small_images_are_enlarged_and_large_ones_left():
    nothing, truth = instances([], [], []), instances([], [])
    small = draw_comparison(Image.new("RGB", (100, 60)), nothing, truth, NAMES)
    large = draw_comparison(Image.new("L", (900, 700)), nothing, truth, NAMES)
    assert small.height > 400 and small.width > 2 * 600
    assert 700 < large.height < 760 and 1800 < large.width < 1840


def test_box_is_drawn_where_it_is():
    truth = instances([[20, 15, 60, 45]], [1])
    image = draw_comparison(np.zeros((60, 100, 3), np.uint8), instances([], [], []), truth, NAMES)
    factor = round(visualize._SHORTER_SIDE / 60)
    panel = image.crop((image.width - 100 * factor, image.height - 60 * factor, image.width, image.height))
    middle = np.asarray(panel)[30 * factor]
    columns = np.where((middle == rgb(COLOURS[1])).all(axis=-1))[0]
    assert abs(columns.min() - 20 * factor) <= 3 and abs(columns.max() - 60 * factor) <= 3


@pytest.mark.parametrize("box", [[-20, -20, 130, 90], [30, 30, 20, 20], [50, 50, 50, 50], [98, 0, 100, 3]])
def test_odd_boxes_can_be_drawn(box):
    draw_comparison(Image.new("RGB", (100, 60)), instances([box], [0], [0.9]), instances([box], [0]), NAMES)


def test_class_without_a_name():
    with pytest.raises(ValueError, match=r"Class 3 has no name.*3 classes \(circle, square, triangle\)"):
        draw_comparison(Image.new("RGB", (9, 9)), instances([[1, 1, 5, 5]], [3], [0.9]), instances([], []), NAMES)


def write(path, entries):
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    return str(path)


RUN = [
    {"iteration": 19, "total_loss": 9.0},
    {"iteration": 39, "total_loss": float("nan")},
    {"iteration": 39, "bbox/AP": 10.0, "bbox/AP50": 20.0, "bbox/APs": float("nan")},
    {"iteration": 59, "total_loss": 5.0},
    {"iteration": 39, "total_loss": 6.0},
    {"iteration": 79, "total_loss": 4.0, "bbox/AP": 30.0, "bbox/AP50": 50.0},
]


def test_metrics_of_a_resumed_run(tmp_path):
    path = write(tmp_path / "metrics.json", RUN)
    with open(path, "a", encoding="utf-8") as file:
        file.write('{"iteration": 99, "total_')
    metrics = read_metrics(path)
    assert [entry["iteration"] for entry in metrics] == [19, 39, 59, 79]
    assert metrics[1]["total_loss"] == 6.0 and metrics[1]["bbox/AP"] == 10.0


def test_metrics_file_missing_or_empty(tmp_path):
    with pytest.raises(ValueError, match=r"no metrics file .*metrics.json"):
        read_metrics(str(tmp_path / "metrics.json"))
    with pytest.raises(ValueError, match="no line with an iteration"):
        read_metrics(write(tmp_path / "metrics.json", [{}]))
