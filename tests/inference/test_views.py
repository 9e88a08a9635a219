"""Test-time augmentation: views, where their boxes come back to, how they are merged, and who honours the keys."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances
from PIL import Image
from predicting import config
from torch import nn

from detr_family.checkpoint import DETRCheckpointer
from detr_family.data.datasets.coco import register_datasets
from detr_family.data.datasets.shapes import write_shapes
from detr_family.engine import Trainer
from detr_family.inference.augmentation import AugmentedDetector, augmented, weighted_boxes_fusion
from detr_family.inference.predictor import Predictor


class Corner(nn.Module):
    """Finds the bright rectangle of an image and remembers the sizes that it saw."""

    num_classes = 1

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[int, ...]] = []

    def forward(self, inputs: list[dict[str, Any]]) -> list[dict[str, Instances]]:
        (entry,) = inputs
        image = entry["image"]
        self.seen.append(tuple(image.shape[1:]))
        rows, columns = (torch.nonzero(image[0].amax(i) > 127).flatten() for i in (1, 0))
        found = Instances((entry["height"], entry["width"]))
        scale = torch.tensor([entry["width"] / image.shape[2], entry["height"] / image.shape[1]] * 2)
        box = torch.tensor([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1])
        found.pred_boxes = Boxes(box[None] * scale)
        found.scores, found.pred_classes = torch.tensor([0.5 + 0.01 * len(self.seen)]), torch.tensor([0])
        return [{"instances": found}]


def detector(model: nn.Module, **changes: Any) -> AugmentedDetector:
    settings = {"min_sizes": (40, 80), "max_size": 1000, "flip": True, "merge": "wbf", "iou": 0.55, "detections": 10}
    return AugmentedDetector(model, **{**settings, "resize_rounding": "detectron2", **changes})


@pytest.mark.parametrize("merge", ["wbf", "nms"])
def test_views_of_all_sizes_come_back_to_the_same_place(merge: str) -> None:
    image = torch.zeros(3, 80, 120, dtype=torch.uint8)
    image[:, 20:40, 10:30] = 255
    model = Corner()
    (output,) = detector(model, merge=merge)([{"image": image, "height": 80, "width": 120}])
    assert model.seen == [(40, 60), (40, 60), (80, 120), (80, 120)]
    found = output["instances"]
    assert len(found) == 1 and found.image_size == (80, 120)
    torch.testing.assert_close(found.pred_boxes.tensor[0], torch.tensor([10.0, 20, 30, 40]), atol=1.5, rtol=0)
    assert float(found.scores[0]) == pytest.approx(0.525 if merge == "wbf" else 0.54)


def test_sizes_that_come_out_the_same_are_looked_at_once() -> None:
    image = torch.full((3, 80, 120), 255, dtype=torch.uint8)
    model = Corner()
    detector(model, max_size=60, flip=False)([{"image": image}])
    assert model.seen == [(40, 60)]


def test_weighted_boxes_fusion_by_hand() -> None:
    boxes = torch.tensor([[0.0, 0, 10, 10], [1, 0, 11, 10], [50, 0, 60, 10], [0, 0, 10, 10]])
    scores, classes = torch.tensor([0.8, 0.4, 0.6, 0.7]), torch.tensor([0, 0, 0, 1])
    fused, means, kinds = weighted_boxes_fusion(boxes, scores, classes, 0.55, 2)
    torch.testing.assert_close(fused[0], torch.tensor([0.4 / 1.2, 0, 10 + 0.4 / 1.2, 10]))
    assert means.tolist() == pytest.approx([0.6, 0.3, 0.35]) and kinds.tolist() == [0, 0, 1]
    nothing = weighted_boxes_fusion(boxes[:0], scores[:0], classes[:0], 0.55, 2)
    assert [len(part) for part in nothing] == [0, 0, 0]


@pytest.mark.parametrize(
    ("changes", "said"),
    [({"min_sizes": ()}, "MIN_SIZES"), ({"merge": "mean"}, "MERGE is 'mean'"), ({"iou": 1.0}, "MERGE_IOU is 1.0")],
)
def test_settings_that_cannot_be(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        detector(Corner(), **changes)


def with_views(cfg: CfgNode) -> CfgNode:
    cfg.TEST.AUG.ENABLED, cfg.TEST.AUG.MIN_SIZES, cfg.TEST.AUG.MAX_SIZE = True, (48, 64), 96
    return cfg


def test_predictor_and_evaluation_see_the_same_views(tmp_path: Path) -> None:
    entries = write_shapes(str(tmp_path / "data"), 2, 2, size=(64, 80))
    cfg = with_views(config("DETR"))
    entries = [("views_train", *entries[0][1:]), ("views_val", *entries[1][1:])]  # other tests have registered theirs
    cfg.DATASETS.COCO_FORMAT, cfg.DATASETS.TEST = [list(entry) for entry in entries], (entries[1][0],)
    cfg.DATALOADER.NUM_WORKERS, cfg.OUTPUT_DIR, cfg.MODEL.DEVICE = 0, str(tmp_path), "cpu"
    register_datasets(cfg)
    try:
        torch.manual_seed(0)
        model = build_model(cfg).eval()
        DETRCheckpointer(model, str(tmp_path), class_names=MetadataCatalog.get(entries[1][0]).thing_classes).save(
            "model"
        )
        batch = next(iter(Trainer.build_test_loader(cfg, entries[1][0])))
        path = batch[0]["file_name"]
        assert tuple(batch[0]["image"].shape[1:]) == Image.open(path).size[::-1]
        with torch.no_grad():
            evaluated = augmented(cfg, model)(batch)[0]["instances"]
            plain = model(batch)[0]["instances"]
        predicted = Predictor.from_config(cfg, tmp_path / "model.pth")(path)
        torch.testing.assert_close(predicted.pred_boxes.tensor, evaluated.pred_boxes.tensor)
        torch.testing.assert_close(predicted.scores, evaluated.scores)
        assert len(plain) != len(evaluated) or not torch.allclose(plain.scores, evaluated.scores)
        cfg.TEST.AUG.ENABLED = False
        assert augmented(cfg, model) is model
        seen = []
        cfg.TEST.AUG.ENABLED = True
        model.register_forward_pre_hook(lambda _, inputs: seen.append(min(inputs[0][0]["image"].shape[1:])))
        Trainer.test(cfg, model)
        assert seen[:4] == [48, 48, 64, 64] and len(seen) == 8
    finally:
        for entry in entries:
            DatasetCatalog.remove(entry[0])
            MetadataCatalog.remove(entry[0])
