"""A tiny detector of each kind, its checkpoint and a handful of generated images, as a user would have them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import tiny
from detectron2.data import DatasetCatalog, MetadataCatalog

from detr_family.analysis.command_line import main
from detr_family.checkpoint import DETRCheckpointer
from detr_family.data.datasets.shapes import write_shapes


@dataclass
class Work:
    """What a command is called with, and where it writes.

    Attributes:
        folder: of everything.
        val_json: annotations of the test set.
    """

    folder: Path
    val_json: Path

    @property
    def output(self) -> Path:
        return self.folder / "out"

    def config(self, name: str) -> str:
        path = self.folder / f"{name}.yaml"
        if not path.is_file():
            cfg = tiny.cfg_of(name)
            entries = [
                [f"shapes_{s}", str(self.folder / f"data/{s}.json"), str(self.folder / f"data/{s}")]
                for s in ("train", "val")
            ]
            cfg.DATASETS.COCO_FORMAT = entries
            cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = ("shapes_train",), ("shapes_val",)
            cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST = 64, 100
            cfg.INPUT.MIN_SIZE_TRAIN, cfg.INPUT.MAX_SIZE_TRAIN = (64,), 100
            cfg.OUTPUT_DIR = str(self.folder / "run")
            path.write_text(cfg.dump())
            DETRCheckpointer(tiny.build(name), str(self.folder)).save(name)
        return str(path)

    def weights(self, name: str) -> str:
        self.config(name)
        return str(self.folder / f"{name}.pth")

    def call(self, command: str, name: str, *arguments: str, opts: tuple[str, ...] = ()) -> list[Path]:
        """Run a command on the named detector with its checkpoint."""
        model = ["--config-file", self.config(name), "--output", str(self.output)]
        return main([command, *arguments, *model, "MODEL.WEIGHTS", self.weights(name), *opts])

    def with_one_class(self) -> None:
        """Make every object of both sets a circle, and that the only class."""
        for path in (self.val_json, self.val_json.with_name("train.json")):
            data = json.loads(path.read_text())
            annotations = [{**annotation, "category_id": 1} for annotation in data["annotations"]]
            categories = [category for category in data["categories"] if category["id"] == 1]
            path.write_text(json.dumps({**data, "annotations": annotations, "categories": categories}))

    def without_boxes(self) -> None:
        """Leave the test set's images without any annotation."""
        data = json.loads(self.val_json.read_text())
        self.val_json.write_text(json.dumps({**data, "annotations": []}))


@pytest.fixture
def work(tmp_path: Path) -> Iterator[Work]:
    known = set(DatasetCatalog.list())
    write_shapes(str(tmp_path / "data"), 6, 4, size=(64, 80), seed=3)
    yield Work(tmp_path, tmp_path / "data" / "val.json")
    for name in set(DatasetCatalog.list()) - known:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)
