"""Configuration, weights and images, as train_net.py takes them, for the commands that look at a model."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.detection_utils import annotations_to_instances
from detectron2.modeling import build_model
from detectron2.structures import Instances
from torch import Tensor, nn
from torchvision.ops import box_convert

from detr_family.checkpoint import DETRCheckpointer
from detr_family.config import check_class_count, class_names, load_config, num_classes
from detr_family.config.ignored import warn_of_ignored
from detr_family.data.dataset_mapper import DETRDatasetMapper
from detr_family.data.datasets.coco import register_datasets
from detr_family.data.images import to_rgb
from detr_family.modeling.set_detector import SetDetector
from detr_family.modeling.structures import SetPrediction, Targets


def load_cfg(config_file: str, opts: Sequence[str] = ()) -> CfgNode:
    """The configuration of a file and KEY VALUE pairs, its datasets registered.

    Raises:
        FileNotFoundError, ValueError: see `detr_family.config.load_config` and `register_datasets`.
    """
    cfg = load_config(config_file, opts)
    register_datasets(cfg)
    warn_of_ignored(cfg, but=["SOLVER"])
    cfg.MODEL.TIMM.PRETRAINED = False  # a whole detector's weights follow, or none
    cfg.freeze()
    return cfg


def load_detector(cfg: CfgNode, untrained: bool = False) -> SetDetector:
    """The detector in evaluation mode, with the weights of MODEL.WEIGHTS.

    Args:
        cfg: from `load_cfg`.
        untrained: leave the weights as they are initialised, from the seed in SEED (0 where that is negative).

    Raises:
        ValueError: MODEL.WEIGHTS is empty, a backbone's, or another detector's; the meta-architecture is none of
            this package.
    """
    check_class_count(cfg)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(max(cfg.SEED, 0))
        with quiet("detectron2", "fvcore"):
            model = build_model(cfg)
    if not isinstance(model, SetDetector):
        raise ValueError(f"MODEL.META_ARCHITECTURE is {cfg.MODEL.META_ARCHITECTURE!r}, which predicts no sets")
    if not untrained:
        with quiet("detectron2", "fvcore"):
            DETRCheckpointer(model, whole=True, averaged=cfg.TEST.EMA).load(cfg.MODEL.WEIGHTS)
    return model.eval()


@contextlib.contextmanager
def datasets_for_now() -> Iterator[None]:
    """Forget afterwards what is registered inside: the next run may give the same names to other files."""
    known = set(DatasetCatalog.list())
    try:
        yield
    finally:
        for name in set(DatasetCatalog.list()) - known:
            DatasetCatalog.remove(name)
            MetadataCatalog.pop(name, None)


@contextlib.contextmanager
def quiet(*loggers: str) -> Iterator[None]:
    """No line below a warning from these while inside."""
    found = [logging.getLogger(name) for name in loggers]
    before = [logger.level for logger in found]
    for logger in found:
        logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        for logger, level in zip(found, before, strict=True):
            logger.setLevel(level)


TITLES = {
    **{"ConditionalDETR": "Conditional DETR", "DABDETR": "DAB-DETR", "DNDETR": "DN-DETR"},
    **{"DeformableDETR": "Deformable DETR", "DABDeformableDETR": "DAB-Deformable-DETR"},
    "DNDeformableDETR": "DN-Deformable-DETR",
}


def title_of(model: SetDetector) -> str:
    """The detector's name as its paper writes it; the class's own where it is none of those."""
    name = type(model).__name__
    return TITLES.get(name, name)


def encoding_of(model: SetDetector) -> nn.Module:
    """The module that encodes the places of a feature map's tokens."""
    return model.get_submodule("position_encoding")


def names_of_classes(cfg: CfgNode) -> list[str]:
    """Names of the classes; "class 0" and so on where no dataset tells them."""
    try:
        names = class_names(cfg)
    except ValueError:
        names = None
    return names or [f"class {i}" for i in range(num_classes(cfg))]


def dataset(cfg: CfgNode, limit: int = 0) -> list[dict[str, Any]]:
    """Detectron2's dicts of DATASETS.TEST[0].

    Args:
        cfg: from `load_cfg`.
        limit: the first so many; 0 for all.

    Raises:
        ValueError: no dataset, an unknown or an empty one, or its file cannot be read.
    """
    if not cfg.DATASETS.TEST:
        raise ValueError("DATASETS.TEST is empty: name the dataset to look at")
    name = cfg.DATASETS.TEST[0]
    if name not in DatasetCatalog:
        raise ValueError(
            f"dataset {name!r} is not registered: name it in DATASETS.COCO_FORMAT or correct DATASETS.TEST"
        )
    try:
        records: list[dict[str, Any]] = DatasetCatalog.get(name)
    except FileNotFoundError as error:
        raise ValueError(f"the dataset {name!r} in DATASETS.TEST is not here ({error})") from error
    if not records:
        raise ValueError(f"the dataset {name!r} in DATASETS.TEST has no images")
    return records[:limit] if limit else records


@dataclass
class Image:
    """One image as the model sees it.

    Attributes:
        name: the file's name without its folder.
        inputs: what the model takes.
        image: (H, W, 3) uint8 RGB, resized as for the model.
        truth: ground truth in pixels of the original; empty where there is none.
    """

    name: str
    inputs: dict[str, Any]
    image: np.ndarray
    truth: Instances

    @property
    def truth_xyxy(self) -> np.ndarray:
        """(T, 4) true boxes in pixels of `image`."""
        height, width = self.truth.image_size
        scale = np.array([self.image.shape[1] / width, self.image.shape[0] / height] * 2)
        return np.asarray(self.truth.gt_boxes.tensor.numpy() * scale)

    def in_pixels(self, boxes_cxcywh: Tensor) -> np.ndarray:
        """(..., 4) normalised boxes as xyxy in pixels of `image`."""
        height, width = self.image.shape[:2]
        xyxy = box_convert(boxes_cxcywh.detach().float().cpu(), "cxcywh", "xyxy")
        return (xyxy * torch.tensor([width, height] * 2)).numpy()

    def targets(self, device: torch.device) -> Targets:
        """The ground truth as matcher and criterion take it."""
        return Targets.from_instances([self.truth], device)


def map_image(cfg: CfgNode, mapper: DETRDatasetMapper, record: dict[str, Any]) -> Image:
    """Read and resize one image as evaluation does."""
    inputs = mapper(record)
    pixels = to_rgb(inputs["image"].permute(1, 2, 0).numpy(), cfg.INPUT.FORMAT)
    annotations = [a for a in record.get("annotations", []) if not a.get("iscrowd", 0)]
    truth = annotations_to_instances(
        [{k: v for k, v in a.items() if k in ("bbox", "bbox_mode", "category_id")} for a in annotations],
        (inputs["height"], inputs["width"]),
    )
    return Image(os.path.basename(record["file_name"]), inputs, np.ascontiguousarray(pixels), truth)


def choose_image(cfg: CfgNode, image: str = "", index: int = -1, need_boxes: bool = False) -> Image:
    """The image that a command draws.

    Args:
        cfg: from `load_cfg`.
        image: an image file; its annotations are taken where DATASETS.TEST[0] has an image of that name. Empty:
            take one of DATASETS.TEST[0].
        index: which of the dataset, from 0; negative: the first one with at least two boxes, else with one,
            else the first.
        need_boxes: refuse an image without boxes.

    Raises:
        ValueError: there is no such image, or it has no boxes and needs them.
    """
    mapper = DETRDatasetMapper(cfg, is_train=False)
    if image and not os.path.isfile(image):
        raise ValueError(f"there is no image {image!r}")
    if image:
        try:
            records = dataset(cfg)
        except ValueError:  # an image alone is enough
            records = []
        known = [r for r in records if os.path.basename(r["file_name"]) == os.path.basename(image)]
        record = {**known[0], "file_name": image} if known else {"file_name": image}
    else:
        records = dataset(cfg)
        if index >= len(records):
            raise ValueError(f"--index {index}: {cfg.DATASETS.TEST[0]!r} has {len(records)} images")
        if index >= 0:
            record = records[index]
        else:
            record = max(records, key=lambda r: min(len(r.get("annotations", [])), 2))
    chosen = map_image(cfg, mapper, record)
    if need_boxes and not len(chosen.truth):
        raise ValueError(f"{chosen.name} has no true boxes, and there is nothing to draw without: choose with --index")
    return chosen


@torch.no_grad()
def predict(model: SetDetector, image: Image) -> SetPrediction:
    """The sets of every decoder layer for one image."""
    return model.predict(model.preprocess_image([image.inputs]))


@dataclass
class Detections:
    """What a model finds in one image, best first, and which query says so.

    Attributes:
        scores: (k,).
        classes: (k,) int64.
        boxes_cxcywh: (k, 4) in [0, 1].
        queries: (k,) int64.
    """

    scores: Tensor
    classes: Tensor
    boxes_cxcywh: Tensor
    queries: Tensor

    def above(self, threshold: float, most: int) -> Detections:
        """Those that score at least `threshold`, at most so many."""
        keep = int((self.scores[:most] >= threshold).sum())
        return Detections(self.scores[:keep], self.classes[:keep], self.boxes_cxcywh[:keep], self.queries[:keep])

    def once_per_query(self) -> Detections:
        """The best of each query: sigmoid classifiers may let one speak for several classes."""
        numbers = self.queries.tolist()
        keep = [i for i, number in enumerate(numbers) if number not in numbers[:i]]
        return Detections(self.scores[keep], self.classes[keep], self.boxes_cxcywh[keep], self.queries[keep])

    def __len__(self) -> int:
        return len(self.scores)


def detections(model: SetDetector, prediction: SetPrediction) -> Detections:
    """The detector's own selection of its last layer, with the queries that it took.

    Args:
        model: whose `select` and `topk` count.
        prediction: of one image.
    """
    logits, boxes = prediction.logits, prediction.boxes
    # `select` gathers boxes by query: given each query's number in their place, it says which it took.
    numbers = torch.arange(boxes.shape[1], device=boxes.device, dtype=torch.float64)
    scores, classes, chosen = model.select(logits, numbers[None, :, None].expand(1, -1, 4), model.topk)
    queries = chosen[0, :, 0].long()
    return Detections(scores[0].cpu(), classes[0].cpu(), boxes[0, queries].float().cpu(), queries.cpu())
