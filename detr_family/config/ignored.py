"""Keys of Detectron2's that a set detector has no use for: who changes one is told so."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Iterator, Sequence

from detectron2.config import CfgNode, get_cfg

_REGIONS = "there are no anchors, proposals or regions"
_BOXES = "boxes alone are predicted"
_ADAMW = "the optimizer is AdamW, with SOLVER.WEIGHT_DECAY on every parameter"

# A key, or a group of them, with what is so instead. The first that fits a key counts.
IGNORED: dict[str, str] = {
    "MODEL.ROI_HEADS.NUM_CLASSES": "set MODEL.DETR.NUM_CLASSES",
    "MODEL.RETINANET.NUM_CLASSES": "set MODEL.DETR.NUM_CLASSES",
    "MODEL.ROI_HEADS.SCORE_THRESH_TEST": "the TEST.DETECTIONS_PER_IMAGE best predictions are given, of any score",
    "MODEL.RETINANET.SCORE_THRESH_TEST": "the TEST.DETECTIONS_PER_IMAGE best predictions are given, of any score",
    "MODEL.ROI_HEADS.NMS_THRESH_TEST": "sets are predicted without non-maximum suppression",
    "MODEL.RETINANET.NMS_THRESH_TEST": "sets are predicted without non-maximum suppression",
    "MODEL.RPN": _REGIONS,
    "MODEL.ROI_HEADS": _REGIONS,
    "MODEL.ROI_BOX_HEAD": _REGIONS,
    "MODEL.ROI_BOX_CASCADE_HEAD": _REGIONS,
    "MODEL.ROI_MASK_HEAD": _BOXES,
    "MODEL.ROI_KEYPOINT_HEAD": _BOXES,
    "MODEL.SEM_SEG_HEAD": _BOXES,
    "MODEL.PANOPTIC_FPN": _BOXES,
    "MODEL.RETINANET": _REGIONS,
    "MODEL.PROPOSAL_GENERATOR": _REGIONS,
    "MODEL.ANCHOR_GENERATOR": _REGIONS,
    "MODEL.LOAD_PROPOSALS": _REGIONS,
    "MODEL.MASK_ON": _BOXES,
    "MODEL.KEYPOINT_ON": _BOXES,
    "INPUT.MASK_FORMAT": _BOXES,
    "DATASETS.PROPOSAL_FILES_TRAIN": _REGIONS,
    "DATASETS.PROPOSAL_FILES_TEST": _REGIONS,
    "DATASETS.PRECOMPUTED_PROPOSAL_TOPK_TRAIN": _REGIONS,
    "DATASETS.PRECOMPUTED_PROPOSAL_TOPK_TEST": _REGIONS,
    "SOLVER.MOMENTUM": _ADAMW,
    "SOLVER.NESTEROV": _ADAMW,
    "SOLVER.WEIGHT_DECAY_NORM": _ADAMW,
    "SOLVER.WEIGHT_DECAY_BIAS": _ADAMW,
    "SOLVER.BIAS_LR_FACTOR": _ADAMW + "; learning rates of single parameters: SOLVER.LR_FACTORS",
    "TEST.KEYPOINT_OKS_SIGMAS": _BOXES,
    "GLOBAL": "nothing reads it",
}
# Read by some backbones only.
_FPN = {"MODEL.FPN": "only a backbone with a feature pyramid (build_resnet_fpn_backbone) reads it"}
_OTHERS = {  # backbones of this package's that do not read MODEL.RESNETS, by MODEL.BACKBONE.NAME
    "build_swin_backbone": "the backbone is a Swin transformer, set in MODEL.SWIN",
    "build_timm_backbone": "the backbone is timm's, set in MODEL.TIMM",
    "build_vit_backbone": "the backbone is a plain ViT, set in MODEL.VIT and MODEL.PYRAMID",
}
# What every recipe has from the base that a ResNet's and the others' share.
_OF_THE_BASE: dict[str, list[object]] = {
    "MODEL.RESNETS.STRIDE_IN_1X1": [False],
    "MODEL.RESNETS.OUT_FEATURES": [("res5",), ("res3", "res4", "res5"), ("res2", "res3", "res4", "res5")],
}
_NORM = {"SOLVER.CLIP_GRADIENTS.NORM_TYPE": 'the clip type "full_model" takes the L2 norm'}

_told: set[str] = set()


def ignored_keys(cfg: CfgNode) -> dict[str, str]:
    """Keys of Detectron2's that have another value than its default but no effect, with what is so instead.

    None where the detector is one of Detectron2's own.
    """
    from detectron2.modeling import META_ARCH_REGISTRY  # takes seconds to load

    name = cfg.MODEL.META_ARCHITECTURE
    if name in META_ARCH_REGISTRY and META_ARCH_REGISTRY.get(name).__module__.startswith("detectron2."):
        return {}
    backbone = cfg.MODEL.BACKBONE.NAME.lower()
    table = {
        **IGNORED,
        **({} if "fpn" in backbone else _FPN),
        **({"MODEL.RESNETS": _OTHERS[backbone]} if backbone in _OTHERS else {}),
        **(_NORM if cfg.SOLVER.CLIP_GRADIENTS.CLIP_TYPE == "full_model" else {}),
    }
    return {
        key: reason
        for key, value in _changed(cfg, get_cfg())
        for reason in [next((text for entry, text in table.items() if f"{key}.".startswith(f"{entry}.")), "")]
        if reason and value not in _OF_THE_BASE.get(key, [])
    }


def warn_of_ignored(cfg: CfgNode, but: Sequence[str] = ()) -> None:
    """One line in the log on `ignored_keys`; a process tells of each key once.

    Args:
        cfg: the whole configuration.
        but: groups that something else than this package may read, such as "SOLVER".
    """
    keys = {k: v for k, v in ignored_keys(cfg).items() if k not in _told and k.split(".")[0] not in but}
    _told.update(keys)
    by_reason: dict[str, list[str]] = defaultdict(list)
    for key, reason in keys.items():
        by_reason[reason].append(key)
    if keys:
        logging.getLogger(__name__).warning(
            "Set, but without effect on %s: %s",
            cfg.MODEL.META_ARCHITECTURE,
            "; ".join(f"{', '.join(names)} ({reason})" for reason, names in by_reason.items()),
        )


def _changed(cfg: CfgNode, default: CfgNode, prefix: str = "") -> Iterator[tuple[str, object]]:
    for key, value in default.items():
        if isinstance(value, CfgNode):
            yield from _changed(cfg[key], value, f"{prefix}{key}.")
        elif _plain(cfg[key]) != _plain(value):
            yield f"{prefix}{key}", _plain(cfg[key])


def _plain(value: object) -> object:
    """Lists as tuples: YAML files do not tell them apart."""
    return tuple(_plain(x) for x in value) if isinstance(value, (list, tuple)) else value
