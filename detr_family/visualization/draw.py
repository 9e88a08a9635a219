"""Images of predictions beside ground truth, and what a run has recorded.

Drawn with PIL: Detectron2's Visualizer needs OpenCV, which a Detectron2 installation may lack; and the labels of
torchvision's draw_bounding_boxes lie on the objects, are cut off at the rim and crossed by lines on crowded images.
"""

import functools
import json
import math
import os
from collections.abc import Sequence
from typing import Any

import matplotlib
import numpy as np
from detectron2.structures import Instances
from PIL import Image, ImageDraw, ImageFont

# Okabe and Ito's colours, which colour-blind readers can tell apart (black left out: it is the lines' rim).
COLOURS = ("#E69F00", "#56B4E9", "#009E73", "#F0E442", "#D55E00", "#CC79A7", "#0072B2")
_SHORTER_SIDE = 448  # smaller images are enlarged by a whole factor until about here
_GAP, _TITLE_HEIGHT = 12, 30
_FONT_SIZE = 15

_Rectangle = tuple[float, float, float, float]


def draw_comparison(
    image: Image.Image | np.ndarray,
    predictions: Instances,
    truth: Instances,
    class_names: Sequence[str],
    score_threshold: float = 0.5,
) -> Image.Image:
    """Predictions on the left, ground truth on the right, in one colour for each class.

    Args:
        image: RGB, as a PIL image or a uint8 array (H, W, 3).
        predictions: with pred_boxes (x1, y1, x2, y2 in pixels of the image), scores and pred_classes.
        truth: with gt_boxes (likewise) and gt_classes.
        class_names: name of each class number.
        score_threshold: predictions below this score are not drawn.

    Returns:
        An RGB image of both panels; small images are enlarged so that labels can be read.

    Raises:
        ValueError: a class number has no name.
    """
    panel = image if isinstance(image, Image.Image) else Image.fromarray(np.ascontiguousarray(image))
    panel = panel.convert("RGB")
    factor = max(1, round(_SHORTER_SIDE / min(panel.size)))
    panel = panel.resize((panel.width * factor, panel.height * factor), Image.Resampling.BICUBIC)

    left, drawn = _detections(panel, predictions, class_names, score_threshold, factor)
    true_classes = truth.gt_classes.tolist()
    right = draw_boxes(
        panel,
        [[factor * edge for edge in box] for box in truth.gt_boxes.tensor.tolist()],
        true_classes,
        [_name(class_names, number) for number in true_classes],
    )
    canvas = Image.new("RGB", (2 * panel.width + _GAP, panel.height + _TITLE_HEIGHT), "white")
    draw = ImageDraw.Draw(canvas)
    hidden = len(predictions) - drawn
    below = f" ({hidden} below {score_threshold:.2g} not shown)" if hidden else ""
    titles = (f"predictions: {drawn}{below}", f"ground truth: {len(truth)}")
    for half, title, x in zip((left, right), titles, (0, panel.width + _GAP), strict=True):
        canvas.paste(half, (x, _TITLE_HEIGHT))
        draw.text((x + 4, _TITLE_HEIGHT / 2), title, fill="black", font=_font(_FONT_SIZE + 1), anchor="lm")
    return canvas


def draw_detections(
    image: Image.Image | np.ndarray, predictions: Instances, class_names: Sequence[str], score_threshold: float = 0.5
) -> Image.Image:
    """An image with the predictions that score enough, at its own size.

    Args:
        image: RGB, as a PIL image or a uint8 array (H, W, 3).
        predictions: with pred_boxes (x1, y1, x2, y2 in pixels of the image), scores and pred_classes.
        class_names: name of each class number.
        score_threshold: predictions below this score are not drawn.

    Raises:
        ValueError: a class number has no name.
    """
    shown = image if isinstance(image, Image.Image) else Image.fromarray(np.ascontiguousarray(image))
    return _detections(shown.convert("RGB"), predictions, class_names, score_threshold)[0]


def _detections(
    image: Image.Image, predictions: Instances, class_names: Sequence[str], threshold: float, factor: int = 1
) -> tuple[Image.Image, int]:
    """The image with boxes that were found in it before it was enlarged by a factor, and how many are drawn."""
    scores = predictions.scores.tolist()
    boxes, classes = predictions.pred_boxes.tensor.tolist(), predictions.pred_classes.tolist()
    shown = sorted((i for i, score in enumerate(scores) if score >= threshold), key=lambda i: scores[i])
    drawn = draw_boxes(
        image,
        [[factor * edge for edge in boxes[i]] for i in shown],
        [classes[i] for i in shown],
        [f"{_name(class_names, classes[i])} {scores[i]:.2f}" for i in shown],
    )
    return drawn, len(shown)


def contact_sheet(cells: Sequence[tuple[Image.Image, str]], columns: int = 4, side: int = 360) -> Image.Image:
    """Images in rows, each shrunk to fit a square of `side` pixels, with a title below.

    Args:
        cells: image and title.
        columns: images in a row.
        side: of an image's place, pixels.
    """
    columns = max(min(columns, len(cells)), 1)
    rows = max(math.ceil(len(cells) / columns), 1)
    step_x, step_y = side + _GAP, side + _GAP + _TITLE_HEIGHT
    sheet = Image.new("RGB", (columns * step_x + _GAP, rows * step_y + _GAP), "white")
    draw, font = ImageDraw.Draw(sheet), _font(_FONT_SIZE - 2)
    for number, (image, title) in enumerate(cells):
        scale = min(side / image.width, side / image.height)
        size = max(round(image.width * scale), 1), max(round(image.height * scale), 1)
        x, y = _GAP + number % columns * step_x, _GAP + number // columns * step_y
        sheet.paste(image.convert("RGB").resize(size, Image.Resampling.BICUBIC), (x, y + side - size[1]))
        while draw.textlength(title, font=font) > side and len(title) > 4:
            title = "…" + title[2:]
        draw.text((x, y + side + _TITLE_HEIGHT / 2), title, fill="black", font=font, anchor="lm")
    return sheet


def read_metrics(path: str) -> list[dict[str, Any]]:
    """Detectron2's metrics.json: one dict for each iteration written, in ascending order.

    Where a resumed run wrote an iteration again, the later line's values count. A line cut short is skipped.

    Args:
        path: the file, one JSON object a line, each with "iteration".

    Raises:
        ValueError: the file is missing or has no such line.
    """
    merged: dict[int, dict[str, Any]] = {}
    try:
        with open(path, encoding="utf-8") as file:
            lines = file.readlines()
    except OSError as error:
        raise ValueError(f"There is no metrics file {path} ({error.strerror}): did the training start?") from error
    for line in lines:
        try:
            values = json.loads(line)
        except ValueError:
            continue
        if isinstance(values, dict) and isinstance(values.get("iteration"), int):
            merged.setdefault(values["iteration"], {}).update(values)
    if not merged:
        raise ValueError(f"{path} has no line with an iteration: it is no metrics file of Detectron2.")
    return [merged[iteration] for iteration in sorted(merged)]


def _name(class_names: Sequence[str], number: int) -> str:
    if not 0 <= number < len(class_names):
        raise ValueError(
            f"Class {number} has no name: the dataset of DATASETS.TEST has {len(class_names)} classes "
            f"({', '.join(class_names)}). Was the model trained on another dataset?"
        )
    return class_names[number]


@functools.cache
def _font(size: int) -> Any:
    """matplotlib's: there with every version of PIL, and with more letters than PIL's own."""
    return ImageFont.truetype(os.path.join(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf"), size)


def draw_boxes(
    image: Image.Image, boxes: Sequence[Sequence[float]], classes: Sequence[int], labels: Sequence[str]
) -> Image.Image:
    """A copy of the image with boxes in one colour for each class; labels above all lines.

    Args:
        image: RGB. In large images lines and letters are larger.
        boxes: x1, y1, x2, y2 in its pixels; later ones are drawn over earlier ones.
        classes: class number of each box.
        labels: text of each box.
    """
    panel = image.copy()
    draw = ImageDraw.Draw(panel)
    scale = max(1, round(min(image.size) / 600))
    colours = [COLOURS[number % len(COLOURS)] for number in classes]
    for (x1, y1, x2, y2), colour in zip(boxes, colours, strict=True):
        x1, x2 = sorted(min(max(x, 0.0), panel.width - 1.0) for x in (x1, x2))
        y1, y2 = sorted(min(max(y, 0.0), panel.height - 1.0) for y in (y1, y2))
        rim = (x1 - scale, y1 - scale, x2 + scale, y2 + scale)
        draw.rectangle(rim, outline="black", width=5 * scale)  # stands out on any ground
        draw.rectangle((x1, y1, x2, y2), outline=colour, width=3 * scale)
    letters = _FONT_SIZE * scale
    font = _font(letters)
    taken: list[_Rectangle] = []
    for box, colour, label in reversed(list(zip(boxes, colours, labels, strict=True))):  # best scores first
        width, height = draw.textlength(label, font=font) + 6 * scale, letters + 5.0 * scale
        place = _label_place(box, width, height, panel.size, taken)
        taken.append(place)
        draw.rectangle(place, fill=colour, outline="black")
        ink = "white" if colour in ("#0072B2", "#009E73", "#D55E00") else "black"
        draw.text((place[0] + 3 * scale, (place[1] + place[3]) / 2), label, fill=ink, font=font, anchor="lm")
    return panel


def _label_place(
    box: Sequence[float], width: float, height: float, panel: tuple[int, int], taken: Sequence[_Rectangle]
) -> _Rectangle:
    """Where a label hides least: tried around and inside the box, that overlapping others least."""
    x1, y1, x2, y2 = box
    corners = [(x1, y1 - height), (x1, y2), (x2 - width, y1 - height), (x2 - width, y2)]
    corners += [(x2, y1), (x1 - width, y1), (x1, y1), (x1, y2 - height), (x2, y2 - height)]
    places = []
    for x, y in corners:
        inside_x = min(max(x, 0.0), max(panel[0] - 1 - width, 0.0))
        inside_y = min(max(y, 0.0), max(panel[1] - 1 - height, 0.0))
        moved = abs(inside_x - x) + abs(inside_y - y)
        place = (inside_x, inside_y, inside_x + width, inside_y + height)
        places.append((sum(_overlap(place, other) for other in taken) + 10 * moved, place))
    return min(places, key=lambda candidate: candidate[0])[1]


def _overlap(first: _Rectangle, second: _Rectangle) -> float:
    across = min(first[2], second[2]) - max(first[0], second[0])
    down = min(first[3], second[3]) - max(first[1], second[1])
    return max(across, 0.0) * max(down, 0.0)
