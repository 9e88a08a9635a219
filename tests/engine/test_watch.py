"""Watching a run: what is written and when, that it changes nothing, and that it never stops a training."""

from __future__ import annotations

import base64
import io
import json
import logging
import random
import re
import shutil
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import own_data
import pytest
import tiny
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from PIL import Image

from detr_family.data import register_datasets
from detr_family.engine import Trainer, watch
from detr_family.visualization import report
from detr_family.visualization.report import write_report


def run(folder: Path, changes: dict[str, Any] | None = None, name: str = "other", **keys: Any) -> Trainer:
    """Trains a tiny detector for four iterations on a small set; one class more or less as `changes` say."""
    rng = np.random.default_rng(0)
    for image in own_data.IMAGES:
        pixels = rng.integers(0, 256, (image["height"], image["width"], 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / image["file_name"])
    cfg = tiny.cfg_of("DETR")
    val = own_data.write(folder, changes, "val.json")
    classes = {key: value for key, value in (changes or {}).items() if key == "categories"}
    if classes:
        single = [{**a, "category_id": classes["categories"][0]["id"]} for a in own_data.ANNOTATIONS]
        classes["annotations"] = single
    train = own_data.write(folder, classes, "train.json")
    cfg.DATASETS.COCO_FORMAT = [[f"{name} train", train, str(folder)], [f"{name} val", val, str(folder)]]
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = (f"{name} train",), (f"{name} val",)
    cfg.MODEL.DETR.NUM_CLASSES = -1
    cfg.DATALOADER.NUM_WORKERS, cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS = 0, False
    cfg.INPUT.MIN_SIZE_TRAIN, cfg.INPUT.MAX_SIZE_TRAIN, cfg.INPUT.CROP.ENABLED = (48, 64), 96, False
    cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST = 64, 96
    cfg.SOLVER.IMS_PER_BATCH, cfg.SOLVER.MAX_ITER, cfg.SOLVER.STEPS, cfg.SEED = 2, 4, (), 5
    cfg.OUTPUT_DIR, cfg.VIS_PERIOD = str(folder / "out"), 2
    for key, value in keys.items():
        cfg.merge_from_list([key.replace("__", "."), value])
    register_datasets(cfg)
    Path(cfg.OUTPUT_DIR).mkdir(exist_ok=True)
    Path(cfg.OUTPUT_DIR, "config.yaml").write_text(cfg.dump())
    torch.manual_seed(5)
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=False)
    trainer.train()
    return trainer


class Page(HTMLParser):
    """Headings, addresses and open elements of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.headings: list[str] = []
        self.addresses: list[str] = []
        self.stack: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.addresses += [value or "" for key, value in attributes if key in ("src", "href", "xlink:href")]
        if tag not in ("meta", "img", "br", "path", "use", "rect"):
            self.stack.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if self.stack and self.stack[-1] == tag:
            self.stack.pop()

    def handle_data(self, data: str) -> None:
        if self.stack and self.stack[-1] in ("h1", "h2"):
            self.headings.append(data)


def page(folder: Path) -> str:
    return (folder / "out" / "report.html").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with a run of DETR in out/, for the tests that look at it."""
    known = set(DatasetCatalog.list())
    folder = tmp_path_factory.mktemp("finished")
    run(folder, name="watch")
    yield folder
    for name in set(DatasetCatalog.list()) - known:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)


def test_a_run_leaves_images_curves_and_one_page(finished: Path) -> None:
    out = finished / "out"
    assert sorted(p.name for p in (out / "vis").iterdir()) == ["predictions_0000001.png", "predictions_0000003.png"]
    assert Image.open(out / "curves.png").width > 1000 and (out / "metrics.csv").is_file()
    text = page(finished)
    parsed = Page(text)
    assert parsed.headings == [
        "DETR, out",
        *("Summary", "Curves", "Results on watch val", "Where it errs on watch val"),
        "Best and worst images of watch val",
        *("Settings", "Environment"),
    ]
    assert "Could not be made" not in text
    assert "badly placed" in text and "Confusions at a score of" in text and "Best threshold by class" in text
    assert (out / "inference" / "images.csv").read_text().startswith("image,objects,found,wrong,AP50")
    assert "MODEL.DETR.HIDDEN_DIM" in text and "platelet" in text and "total over the iterations" in text
    images = [address for address in parsed.addresses if address.startswith("data:image/jpeg;base64,")]
    assert len(images) in (2, 3)  # those with objects, and the third if something was wrongly found in it
    for address in images:
        assert Image.open(io.BytesIO(base64.b64decode(address.split(",")[1]))).width > 100
    assert not [a for a in parsed.addresses if not a.startswith(("data:", "#"))]  # all in one file
    lines = (out / "metrics.json").read_text().splitlines()
    assert any("total_loss" in json.loads(line) for line in lines)
    assert "4</b>iterations of 4" in text


def test_images_and_scalars_reach_tensorboard(finished: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(finished / "out"), size_guidance={"images": 0})
    events.Reload()
    tags = events.Tags()
    assert {"predictions/a.png", "predictions/b.png"} <= set(tags["images"])
    assert [event.step for event in events.Images("predictions/a.png")] == [1, 3]
    assert {"total_loss", "loss_ce", "bbox/AP", "lr"} <= set(tags["scalars"])


def test_a_section_that_fails_is_told_on_the_page(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> None:
        raise RuntimeError("no <environment>")

    before = page(finished)
    monkeypatch.setattr(report, "collect_env", broken)
    write_report(finished / "out", tiny.cfg_of("DETR"))
    text = page(finished)
    assert "Could not be made: RuntimeError: no &lt;environment&gt;" in text and text.endswith("</html>\n")
    (finished / "out" / "report.html").write_text(before, encoding="utf-8")


def test_the_page_can_be_made_again_from_the_folder(finished: Path, tmp_path: Path) -> None:
    moved = shutil.copytree(finished / "out", tmp_path / "moved")
    (moved / "report.html").unlink()
    again = write_report(moved).read_text(encoding="utf-8")
    assert Page(again).headings[1:] == Page(page(finished)).headings[1:] and "Could not be made" not in again
    with pytest.raises(ValueError, match=r"has no config\.yaml"):
        write_report(tmp_path)


@pytest.mark.parametrize("detector", tiny.DETECTORS)
def test_predictions_of_every_detector_are_drawn(detector: str, coco_folder: Path) -> None:
    cfg = tiny.cfg_of(detector)
    path = own_data.write(coco_folder)
    cfg.DATASETS.COCO_FORMAT, cfg.DATASETS.TEST = [["drawn", path, str(coco_folder)]], ("drawn",)
    cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST = 64, 96
    cfg.OUTPUT_DIR, cfg.VIS_PERIOD = str(coco_folder / "out"), 3
    register_datasets(cfg)
    drawer = watch.PredictionDrawer(cfg)
    model = tiny.build(detector).train()
    shown: list[str] = []
    storage = SimpleNamespace(put_image=lambda name, pixels: shown.append(name))
    drawer.trainer = SimpleNamespace(model=model, iter=0, max_iter=5, storage=storage)
    for iteration in range(5):
        drawer.trainer.iter = iteration
        drawer.after_step()
        assert model.training
    names = sorted(p.name for p in (coco_folder / "out" / "vis").iterdir())
    assert names == ["predictions_0000002.png", "predictions_0000004.png"]
    assert shown == ["predictions/a.png", "predictions/b.png"] * 2


def test_watching_changes_nothing(coco_folder: Path) -> None:
    weights = []
    for period, show in ((0, False), (1, True)):
        trainer = run(coco_folder, VIS_PERIOD=period, VIS_REPORT=show, OUTPUT_DIR=str(coco_folder / f"out{period}"))
        weights.append({k: v.clone() for k, v in trainer.model.state_dict().items()})
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])
    assert not (coco_folder / "out0" / "report.html").exists() and not (coco_folder / "out0" / "vis").exists()


def test_modes_and_random_numbers_are_put_back() -> None:
    model = torch.nn.Sequential(torch.nn.BatchNorm1d(2), torch.nn.Dropout())
    model.train()
    model[0].eval()
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    with watch.untouched(model):
        model.eval()
        random.random(), np.random.rand(), torch.rand(1)
    assert (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()) == before
    assert (model.training, model[0].training, model[1].training) == (True, False, True)


def test_a_run_that_is_never_evaluated(coco_folder: Path) -> None:
    run(coco_folder, DATASETS__TEST=())
    text = page(coco_folder)
    assert "This run was never evaluated" in text and "Could not be made" not in text
    assert (coco_folder / "out" / "vis" / "predictions_0000003.png").is_file()  # of the training set


def test_a_test_set_without_boxes(coco_folder: Path) -> None:
    run(coco_folder, changes={"annotations": []})
    assert "Could not be made" not in page(coco_folder)


def test_one_class_and_names_that_are_code(coco_folder: Path) -> None:
    name = "<script>alert(1)</script> & \ud83d\ude00"
    one = [{"id": 4, "name": name}]
    changes = {"categories": one, "annotations": [{**own_data.ANNOTATIONS[0], "category_id": 4}]}
    run(coco_folder, changes=changes, name="<b>bold")
    text = page(coco_folder)
    assert "<b>bold" not in text and "<h2>Results on &lt;b&gt;bold val</h2>" in text
    assert "<script" not in text and "&lt;script&gt;" in text and "Could not be made" not in text
    assert re.search(r"By class</h3><table>.*&lt;script&gt;.*?<td class=\"n\">1</td>", text)


def test_a_test_set_without_annotations(coco_folder: Path) -> None:
    trainer = run(coco_folder, DATASETS__TEST=())
    blind = own_data.write(coco_folder, name="blind.json", without=["annotations"])
    cfg = trainer.cfg.clone()
    cfg.DATASETS.COCO_FORMAT = [*cfg.DATASETS.COCO_FORMAT, ["blind", blind, str(coco_folder)]]
    cfg.DATASETS.TEST = ("blind",)
    register_datasets(cfg)
    Trainer.test(cfg, trainer.model)
    write_report(cfg.OUTPUT_DIR, cfg)
    text = page(coco_folder)
    assert "The set has no annotations to compare with" in text and "Could not be made" not in text


def test_nothing_of_it_stops_a_training(
    coco_folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise RuntimeError("out of ink")

    for name in ("draw.draw_comparison", "curves.write_curves", "report.write_report"):
        monkeypatch.setattr(f"detr_family.visualization.{name}", broken)
    with caplog.at_level(logging.WARNING):
        trainer = run(coco_folder)
    assert trainer.iter == 4 - 1 or trainer.iter == 4
    for part in ("Predictions could not be drawn", "curves of this run could not", "report of this run could not"):
        assert part in caplog.text
