"""The predictor: every detector, every kind of input, and the same results as an evaluation."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from detectron2.engine import DefaultPredictor
from detectron2.structures import Instances
from PIL import Image
from predicting import NAMES, Bomb, config

from detr_family.checkpoint import DETRCheckpointer, read_class_names
from detr_family.data.dataset_mapper import DETRDatasetMapper
from detr_family.inference.predictor import Predictor


@pytest.fixture
def weights(tmp_path: Path) -> Any:
    """Makes a checkpoint of the named tiny detector with class names."""

    def make(name: str, names: list[str] | None = NAMES) -> str:
        DETRCheckpointer(tiny.build(name), str(tmp_path), class_names=names).save(name)
        return str(tmp_path / f"{name}.pth")

    return make


@pytest.fixture
def image(tmp_path: Path) -> Path:
    pixels = np.random.default_rng(0).integers(0, 256, (50, 80, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    return tmp_path / "a.png"


def equal(first: Instances, second: Instances, tolerance: float = 0.0) -> None:
    assert first.image_size == second.image_size
    for key in ("scores", "pred_classes"):
        torch.testing.assert_close(getattr(first, key), getattr(second, key), atol=tolerance, rtol=0)
    torch.testing.assert_close(first.pred_boxes.tensor, second.pred_boxes.tensor, atol=100 * tolerance, rtol=0)


@pytest.mark.parametrize("name", tiny.DETECTORS)
def test_predicts_what_an_evaluation_does(name: str, weights: Any, image: Path) -> None:
    predictor = Predictor.from_config(config(name), weights(name))
    found = predictor(str(image))
    record = {"file_name": str(image), "height": 50, "width": 80, "image_id": 1}
    mapped = DETRDatasetMapper(config(name), False)(record)
    assert tuple(mapped["image"].shape) == (3, 60, 96)
    with torch.no_grad():
        (evaluated,) = predictor.model([mapped])
    assert len(found) == len(evaluated["instances"]) > 0
    equal(found, evaluated["instances"])
    assert predictor.class_names == NAMES
    assert predictor.names(found) == [NAMES[i] for i in found.pred_classes]


@pytest.mark.parametrize("input_format", ["RGB", "BGR"])
def test_paths_and_arrays_of_either_order_are_the_same_image(input_format: str, weights: Any, image: Path) -> None:
    cfg = config("DETR")
    cfg.INPUT.FORMAT = input_format
    predictor = Predictor.from_config(cfg, weights("DETR"))
    rgb = np.asarray(Image.open(image))
    expected = predictor(image)
    equal(predictor(rgb, array_format="RGB"), expected)
    equal(predictor(np.ascontiguousarray(rgb[:, :, ::-1])), expected)  # as cv2 reads it
    cfg.MODEL.WEIGHTS, cfg.MODEL.DETR.NUM_CLASSES = weights("DETR"), 3
    equal(DefaultPredictor(cfg)(rgb[:, :, ::-1])["instances"], expected, 1e-5)  # the detector as it is
    other = predictor(np.ascontiguousarray(rgb[:, :, ::-1]), array_format="RGB")
    assert not torch.allclose(other.scores, expected.scores)


@pytest.mark.parametrize("name", tiny.DETECTORS)
def test_batches_give_what_single_images_give(name: str, weights: Any) -> None:
    rng = np.random.default_rng(1)
    sizes = [(48, 96), (48, 96), (97, 50), (80, 81), (32, 64), (32, 64), (32, 64), (32, 64)]
    cfg = config(name)
    images = [rng.integers(0, 256, (*size, 3), dtype=np.uint8) for size in sizes]
    path = weights(name)
    single = Predictor.from_config(cfg, path)
    alone = [single(image) for image in images]
    predictor = Predictor.from_config(cfg, path, batch_size=3)
    batches: list[int] = []
    predictor.model.register_forward_pre_hook(lambda module, inputs: batches.append(len(inputs[0])))
    together = predictor(images)
    assert batches == [2, 1, 1, 3, 1] and len(together) == 8
    for one, other, size in zip(alone, together, sizes, strict=True):
        assert other.image_size == size
        equal(one, other, 1e-4)


def test_images_are_read_as_they_are_needed(weights: Any, image: Path) -> None:
    taken = []

    def endless() -> Any:
        while True:
            taken.append(1)
            yield image

    stream = Predictor.from_config(config("DETR"), weights("DETR"), batch_size=2).stream(endless())
    prediction = next(stream)
    assert len(taken) == 2 and prediction.source == image and prediction.image.shape == (50, 80, 3)


def test_a_image_that_cannot_be_read(weights: Any, image: Path) -> None:
    predictor = Predictor.from_config(config("DETR"), weights("DETR"), batch_size=2)
    broken = image.with_name("broken.png")
    broken.write_bytes(image.read_bytes()[:300])
    with pytest.raises(ValueError, match=r"broken\.png cannot be read"):
        predictor([image, broken])
    failed = []
    images = [broken, image, broken, image, image]
    found = list(predictor.stream(images, on_error=lambda source, error: failed.append((source, str(error)))))
    assert [prediction.source for prediction in found] == [image] * 3
    assert [source for source, _ in failed] == [broken] * 2 and "cannot be read" in failed[0][1]


def test_a_model_alone_will_do() -> None:
    predictor = Predictor(tiny.build("DETR").train(), min_size=64, max_size=96)
    assert not predictor.model.training
    instances = predictor(np.zeros((64, 64, 3), np.uint8))
    assert predictor.names(instances[:1]) == [f"class {int(instances.pred_classes[0])}"]
    with pytest.raises(ValueError, match="batch_size is 0"):
        Predictor(tiny.build("DETR"), batch_size=0)
    with pytest.raises(ValueError, match="array_format is 'GBR'"):
        predictor(np.zeros((64, 64, 3), np.uint8), array_format="GBR")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_its_model_may_be_cast(dtype: torch.dtype) -> None:
    array = np.random.default_rng(0).integers(0, 256, (50, 80, 3), dtype=np.uint8)
    predictor = Predictor(tiny.build("DETR"), min_size=64, max_size=96)
    expected = predictor(array)
    predictor.model.to(dtype)
    found = predictor(array)
    assert torch.equal(found.pred_classes, expected.pred_classes)
    equal(found, expected, tolerance=max(torch.finfo(dtype).eps, 1e-6))


def test_class_names_of_checkpoints(weights: Any, tmp_path: Path) -> None:
    assert read_class_names(weights("DETR")) == NAMES
    assert read_class_names(weights("DETR", None)) is None
    release = {"backbone.0.body.conv1.weight": torch.zeros(1), "class_embed.bias": torch.zeros(92)}
    torch.save({"model": release}, tmp_path / "release.pth")
    names = read_class_names(str(tmp_path / "release.pth"))
    assert names is not None and (len(names), names[0], names[-1]) == (80, "person", "toothbrush")


def test_without_class_names_the_count_must_be_given(weights: Any) -> None:
    cfg = config("DETR")
    with pytest.raises(ValueError, match=r"NUM_CLASSES is -1"):
        Predictor.from_config(cfg, weights("DETR", None))
    cfg.MODEL.DETR.NUM_CLASSES = 3
    assert Predictor.from_config(cfg, weights("DETR", None)).class_names is None


def test_weights_that_are_missing_or_no_detector(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"none\.pth"):
        Predictor.from_config(config("DETR"), tmp_path / "none.pth")
    cfg = config("DETR")
    cfg.MODEL.DETR.NUM_CLASSES = 3
    with pytest.raises(ValueError, match=r"MODEL\.WEIGHTS is empty"):
        Predictor.from_config(cfg)
    with pytest.raises((FileNotFoundError, ValueError), match=r"none\.yaml"):
        Predictor.from_config(tmp_path / "none.yaml")


@pytest.mark.parametrize("forced", [False, True])
@pytest.mark.parametrize("place", ["model", "class_names", "args"])
@pytest.mark.parametrize("suffix", [".pth", ".pkl", ".pyth", ".bin"])
def test_a_malicious_checkpoint_is_refused(
    suffix: str, place: str, forced: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if forced:  # set by people who have old files of other projects
        monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    path = tmp_path / f"bomb{suffix}"
    bomb = Bomb(tmp_path / "exploded")
    content: dict[str, Any] = {"model": tiny.build("DETR").state_dict(), "class_names": NAMES}
    content[place] = {"weight": bomb} if place == "model" else [bomb]
    path.write_bytes(pickle.dumps(content)) if suffix == ".pkl" else torch.save(content, path)
    for use in (read_class_names, lambda weights: Predictor.from_config(config("DETR"), weights)):
        with pytest.raises(ValueError, match=r"bomb.* is not a checkpoint that can be loaded safely"):
            use(str(path))
    assert not (tmp_path / "exploded").exists()
