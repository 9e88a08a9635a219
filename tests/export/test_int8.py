"""Eight bits by OpenVINO's quantiser: what it needs, and that a file of it runs."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny
import torch
from exporting import NAMES, SIZE, exported, spread
from PIL import Image

from detr_family.commands.export_model import calibration_images
from detr_family.errors import UserError
from detr_family.export import export_model
from detr_family.inference import Predictor

IMAGES = [tiny.image(60, 80 + 8 * i, 0, seed=i)["image"] for i in range(6)]


def test_what_cannot_be(tmp_path: Path) -> None:
    model = tiny.build("DETR")
    with pytest.raises(UserError, match="to calibrate on: --data DIR"):
        export_model(model, "openvino", tmp_path / "a.xml", precision="int8")
    with pytest.raises(UserError, match="for openvino 'float16' or 'int8'"):
        export_model(model, "onnx", tmp_path / "a.onnx", precision="int8", calibration=IMAGES)
    with pytest.raises(UserError, match="has no images to calibrate on"):
        calibration_images(tmp_path)


def test_images_are_taken_from_the_whole_folder(tmp_path: Path) -> None:
    (tmp_path / "below").mkdir()
    for i in range(9):
        Image.new("RGB", (8, 6), (i, 0, 0)).save(tmp_path / "below" / f"{i}.png")
    found = calibration_images(tmp_path, 3)
    assert [int(image[0, 0, 0]) for image in found] == [0, 3, 6] and found[0].shape == (3, 6, 8)
    assert len(calibration_images(tmp_path, 20)) == 9


@pytest.mark.slow
def test_a_file_of_eight_bits(tmp_path: Path) -> None:
    pytest.importorskip("nncf", reason="the int8 extra is not installed")
    plain = exported("DETR", "openvino", tmp_path)[1]
    path = tmp_path / "int8.xml"
    predictor = Predictor(spread(tiny.build("DETR")), class_names=NAMES, min_size=64, max_size=112)
    difference = export_model(predictor, "openvino", path, size=SIZE, precision="int8", calibration=IMAGES)
    assert difference is not None and difference.compared > 20
    assert "FakeQuantize" in path.read_text() and "FakeQuantize" not in plain.read_text()
    assert path.with_suffix(".bin").stat().st_size < 0.7 * plain.with_suffix(".bin").stat().st_size
    image = IMAGES[0].permute(1, 2, 0).numpy()
    expected, found = predictor(image, "RGB"), Predictor.from_exported(path)(image, "RGB")
    assert len(expected) == len(found)
    assert 0 < float((expected.scores - found.scores).abs().max()) < 0.1
    assert not torch.isnan(found.pred_boxes.tensor).any()
