"""Detectors small enough to train in a test; all sizes distinct, so that no swapped axis goes unnoticed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from detectron2.config import CfgNode, get_cfg
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, build_model
from detectron2.modeling.backbone import Backbone
from detectron2.structures import Boxes, Instances
from torch import Tensor, nn

from detr_family import add_detr_family_config
from detr_family.modeling.set_detector import SetDetector

STRIDE = 16
NUM_CLASSES = 3


class PatchBackbone(Backbone):
    """Non-overlapping patches of STRIDE pixels, frozen stem, no padding: what it computes is local."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 12, kernel_size=8, stride=8)
        self.res5 = nn.Conv2d(12, 20, kernel_size=2, stride=2)
        self.stem.requires_grad_(False)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"res5": self.res5(self.stem(x).relu()).relu()}

    def output_shape(self) -> dict[str, ShapeSpec]:
        return {"res5": ShapeSpec(channels=20, stride=STRIDE)}


@BACKBONE_REGISTRY.register()
def build_patch_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> Backbone:
    return PatchBackbone()


def detr_cfg(cfg: CfgNode) -> None:
    cfg.MODEL.META_ARCHITECTURE = "DETR"


def conditional_detr_cfg(cfg: CfgNode) -> None:
    cfg.MODEL.META_ARCHITECTURE = "ConditionalDETR"
    cfg.MODEL.DETR.COST.CLASS = cfg.MODEL.DETR.LOSS.CLASS = 2.0


def dab_detr_cfg(cfg: CfgNode) -> None:
    cfg.MODEL.META_ARCHITECTURE = "DABDETR"
    cfg.MODEL.DETR.COST.CLASS = 2.0
    cfg.MODEL.DETR.SPATIAL_ENCODING.TEMPERATURE = 20.0


def dn_detr_cfg(cfg: CfgNode) -> None:
    dab_detr_cfg(cfg)
    cfg.MODEL.META_ARCHITECTURE = "DNDETR"
    cfg.MODEL.DN.GROUPS = 3


def dino_cfg(cfg: CfgNode) -> None:
    dab_detr_cfg(cfg)
    cfg.MODEL.META_ARCHITECTURE = "DINO"
    dino = cfg.MODEL.DINO
    dino.NUM_LEVELS, dino.ENC_POINTS, dino.DEC_POINTS, dino.DN_PAIRS = 3, 2, 5, 9
    dino.IGNORE_PADDING = True


# A detector joins every test of tests/modeling/test_detectors.py by its line here.
DETECTORS: dict[str, Callable[[CfgNode], None]] = {
    "DETR": detr_cfg,
    "ConditionalDETR": conditional_detr_cfg,
    "DABDETR": dab_detr_cfg,
    "DNDETR": dn_detr_cfg,
    "DINO": dino_cfg,
}


def cfg_of(name: str) -> CfgNode:
    """A configuration of the named detector with two layers and sixteen channels, on the CPU."""
    cfg = get_cfg()
    add_detr_family_config(cfg)
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.WEIGHTS = ""
    cfg.MODEL.BACKBONE.NAME = "build_patch_backbone"
    cfg.MODEL.PIXEL_MEAN = [120.0, 110.0, 100.0]
    cfg.MODEL.PIXEL_STD = [60.0, 57.0, 55.0]
    cfg.INPUT.FORMAT = "RGB"
    detr = cfg.MODEL.DETR
    detr.NUM_CLASSES, detr.NUM_QUERIES = NUM_CLASSES, 7
    detr.HIDDEN_DIM, detr.NUM_HEADS, detr.FEEDFORWARD_DIM = 16, 2, 24
    detr.ENC_LAYERS, detr.DEC_LAYERS, detr.DROPOUT = 1, 2, 0.0
    DETECTORS[name](cfg)
    return cfg


def build(name: str, **keys: Any) -> SetDetector:
    """The named tiny detector, seeded; `keys` are keys of MODEL.DETR."""
    cfg = cfg_of(name)
    for key, value in keys.items():
        cfg.MODEL.DETR[key] = value
    torch.manual_seed(11)
    return build_model(cfg)


def quiet(name: str) -> SetDetector:
    """The named tiny detector whose denoising queries have no noise: what it computes does not depend on a draw."""
    cfg = cfg_of(name)
    for noise in (cfg.MODEL.DN, cfg.MODEL.DINO):
        noise.LABEL_NOISE = noise.BOX_NOISE = 0.0
    torch.manual_seed(11)
    return build_model(cfg)


def image(height: int, width: int, boxes: int, seed: int, num_classes: int = NUM_CLASSES) -> dict[str, Any]:
    """An image of noise with `boxes` boxes, as Detectron2's mappers give it."""
    g = torch.Generator().manual_seed(seed)
    size = torch.tensor([width, height], dtype=torch.float32)
    centre = (0.3 + 0.4 * torch.rand(boxes, 2, generator=g)) * size
    half = (0.05 + 0.2 * torch.rand(boxes, 2, generator=g)) * size
    truth = Instances((height, width))
    truth.gt_boxes = Boxes(torch.cat([centre - half, centre + half], 1))
    truth.gt_classes = torch.randint(num_classes, (boxes,), generator=g)
    return {
        "image": torch.randint(256, (3, height, width), generator=g).to(torch.uint8),
        "instances": truth,
        "height": height,
        "width": width,
        "file_name": f"picture_{seed}.jpg",
    }


def batch(counts: tuple[int, ...] = (3, 2)) -> list[dict[str, Any]]:
    """Images of two sizes with that many boxes each."""
    sizes = ((64, 96), (80, 48))
    return [image(*sizes[i % 2], n, seed=i) for i, n in enumerate(counts)]
