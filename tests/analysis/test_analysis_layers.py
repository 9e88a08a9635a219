"""AP of each decoder layer: as the evaluator says of a detector cut off there, with and without NMS."""

from __future__ import annotations

import csv
from typing import Any

import pytest
import tiny
import torch
from detectron2.structures import ImageList
from PIL import Image

from detr_family.analysis import layers, loading
from detr_family.analysis.command_line import main
from detr_family.modeling.structures import SetPrediction


@pytest.mark.parametrize("name", tiny.DETECTORS)
def test_command(name: str, work: Any) -> None:
    written = work.call("layers", name)
    assert [p.name for p in written] == ["layers.png", "layers.svg", "layers.csv"] and all(p.is_file() for p in written)
    rows = list(csv.DictReader(written[2].open()))
    assert [(r["layer"], r["nms"]) for r in rows] == [("1", "no"), ("1", "yes"), ("2", "no"), ("2", "yes")]
    assert all(0 <= float(r["AP"]) <= float(r["AP50"]) <= 100 for r in rows)
    assert not (work.folder / "run").exists()  # the run's own results are left alone


def test_nms_and_layers_make_the_difference_that_they_should(work: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Layer 1 predicts nothing right; layer 2 every true box, and a duplicate of each."""
    cfg = loading.load_cfg(work.config("DETR"))
    model = loading.load_detector(cfg, untrained=True)
    records = iter(loading.dataset(cfg))
    mapper = loading.DETRDatasetMapper(cfg, is_train=False)

    def predict(images: ImageList, targets: None = None) -> SetPrediction:
        targets = loading.map_image(cfg, mapper, next(records)).targets(torch.device("cpu"))
        logits = torch.full((2, 1, 14, 4), -9.0)
        logits[..., 3] = 9.0
        boxes = torch.full((2, 1, 14, 4), 0.01)
        for copy in range(2):
            for i in range(len(targets)):
                slot = copy * 7 + i
                logits[:, 0, slot] = torch.tensor([-9.0] * 4)
                logits[:, 0, slot, targets.labels[i]] = 9.0 + copy + 0.1 * i
                boxes[1, 0, slot] = targets.boxes_cxcywh[i]
        return SetPrediction(logits, boxes)

    monkeypatch.setattr(model, "predict", predict)
    rows = {(r["layer"], r["nms"]): r for r in layers.layer_ap(cfg, model, nms_iou=0.95)}
    assert rows[1, "no"]["AP"] == 0
    assert rows[2, "yes"]["AP"] == pytest.approx(100)
    assert 30 < rows[2, "no"]["AP"] < 80  # half of the detections are duplicates


def test_a_limit_counts_the_rest_as_missed(work: Any) -> None:
    rows = list(csv.DictReader(work.call("layers", "DABDETR", "--limit", "1")[2].open()))
    assert len(rows) == 4


@pytest.mark.parametrize("name", ["DETR", "DNDETR", "DINO"])
def test_one_class(name: str, work: Any) -> None:
    work.with_one_class()
    output, opts = ["--output", str(work.output)], ["MODEL.DETR.NUM_CLASSES", "1"]
    for command in ("layers", "attention", "queries", "matching"):
        assert main([command, "--config-file", work.config(name), "--untrained", *output, *opts])
    if name != "DETR":
        assert main(["denoising", "--config-file", work.config(name), *output, *opts])


def test_a_image_alone_without_any_test_set(work: Any) -> None:
    Image.new("RGB", (90, 60), (200, 10, 30)).save(work.folder / "mine.png")
    for name in ("DETR", "DINO"):
        image = ["--image", str(work.folder / "mine.png"), "--score", "0.999"]
        assert work.call("attention", name, *image, opts=("DATASETS.TEST", "()"))


def test_what_cannot_be(work: Any) -> None:
    with pytest.raises(SystemExit, match=r"layers: --nms 1\.5 is no IoU"):
        work.call("layers", "DETR", "--nms", "1.5")
    work.without_boxes()
    with pytest.raises(SystemExit, match="'shapes_val' has no annotations"):
        work.call("layers", "DETR")


def test_loading_mistakes(work: Any) -> None:
    config = work.config("DETR")
    with pytest.raises(SystemExit, match=r"there is no config file 'none\.yaml'"):
        main(["layers", "--config-file", "none.yaml"])
    with pytest.raises(SystemExit, match=r"MODEL\.WEIGHTS is empty"):
        main(["layers", "--config-file", config])
    with pytest.raises(SystemExit, match=r"DATASETS\.TEST is empty"):
        work.call("layers", "DETR", opts=("DATASETS.TEST", "()"))
    with pytest.raises(SystemExit, match=r"similar: MODEL\.DETR\.NUM_QUERIES"):
        main(["layers", "--config-file", config, "MODEL.DETR.NUM_QUERYS", "3"])


def test_a_image_of_ones_own(work: Any) -> None:
    """A file alone is enough; one that the dataset has brings its boxes."""
    cfg = loading.load_cfg(work.config("DETR"))
    Image.new("RGB", (90, 60), (200, 10, 30)).save(work.folder / "mine.png")
    mine = loading.choose_image(cfg, str(work.folder / "mine.png"))
    assert len(mine.truth) == 0 and mine.image.shape == (64, 96, 3) and mine.image[0, 0].tolist() == [200, 10, 30]
    record = max(loading.dataset(cfg), key=lambda r: len(r["annotations"]))
    known = loading.choose_image(cfg, record["file_name"])
    assert len(known.truth) == len(record["annotations"]) > 0
    x, y, w, h = record["annotations"][0]["bbox"]
    scale = known.image.shape[1] / record["width"]
    assert known.truth_xyxy[0].tolist() == pytest.approx([scale * v for v in (x, y, x + w, y + h)], rel=0.05)
    with pytest.raises(ValueError, match="no true boxes"):
        loading.choose_image(cfg, str(work.folder / "mine.png"), need_boxes=True)
    with pytest.raises(ValueError, match="--index 9: 'shapes_val' has 4 images"):
        loading.choose_image(cfg, index=9)


def test_bgr_images_are_shown_in_rgb(work: Any) -> None:
    cfg = loading.load_cfg(work.config("DETR"), ["INPUT.FORMAT", "BGR"])
    Image.new("RGB", (90, 60), (200, 10, 30)).save(work.folder / "mine.png")
    assert loading.choose_image(cfg, str(work.folder / "mine.png")).image[0, 0].tolist() == [200, 10, 30]


@pytest.mark.parametrize("name", tiny.DETECTORS)
def test_detections_are_the_detectors_own_with_their_queries(name: str, work: Any) -> None:
    cfg = loading.load_cfg(work.config(name))
    model = loading.load_detector(cfg, untrained=True)
    image = loading.choose_image(cfg)
    prediction = loading.predict(model, image)
    found = loading.detections(model, prediction)
    scores, classes, boxes = model.select(prediction.logits, prediction.boxes, model.topk)
    assert torch.equal(found.scores, scores[0]) and torch.equal(found.classes, classes[0])
    assert torch.equal(found.boxes_cxcywh, boxes[0]) and torch.equal(prediction.boxes[0, found.queries], boxes[0])
    assert len(found.above(2.0, 5)) == 0 and len(found.above(0.0, 3)) == 3
