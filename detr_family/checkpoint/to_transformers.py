"""A detector of here as a folder that transformers' `from_pretrained` takes: config.json and model.safetensors.

DETR, Conditional DETR, DAB-DETR and Deformable DETR on a ResNet; transformers has no DN-DETR and no DINO. Names and
rows are those of `detr_family.checkpoint.transformers`, read from here to there. With a dilated last stage (DC5) the
backbone is timm's, else transformers' own.
"""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from detectron2.config import CfgNode
from torch import Tensor, nn

from detr_family.checkpoint.files import replacing, save_safetensors
from detr_family.checkpoint.transformers import BACKBONE, EPS, TABLES, unpacked

_logger = logging.getLogger(__name__)

# Meta-architecture here: the family of names there, model type, class of the model, of the image processor.
_MODELS = {
    "DETR": ("DETR", "detr", "Detr", "Detr"),
    "ConditionalDETR": ("Conditional DETR", "conditional_detr", "ConditionalDetr", "ConditionalDetr"),
    "DABDETR": ("DAB-DETR", "dab-detr", "DabDetr", "ConditionalDetr"),
    "DeformableDETR": ("Deformable DETR", "deformable_detr", "DeformableDetr", "DeformableDetr"),
}
_DEPTHS = {50: [3, 4, 6, 3], 101: [3, 4, 23, 3], 152: [3, 8, 36, 3]}
_STAGES = {"res2": "stage1", "res3": "stage2", "res4": "stage3", "res5": "stage4"}

# Detectron2's ResNet -> torchvision's, which is timm's; and then transformers' own.
_TORCHVISION = (
    (r"^stem\.conv1\.norm", "bn1"),
    (r"^stem\.conv1", "conv1"),
    (r"^res(\d)", lambda m: f"layer{int(m[1]) - 1}"),
    (r"\.shortcut\.norm", ".downsample.1"),
    (r"\.shortcut", ".downsample.0"),
    (r"\.conv(\d)\.norm", r".bn\1"),
)
_OWN = (
    (r"^conv1", "embedder.embedder.convolution"),
    (r"^bn1", "embedder.embedder.normalization"),
    (r"^layer(\d)\.(\d+)", lambda m: f"encoder.stages.{int(m[1]) - 1}.layers.{m[2]}"),
    (r"\.downsample\.0", ".shortcut.convolution"),
    (r"\.downsample\.1", ".shortcut.normalization"),
    (r"\.conv(\d)", lambda m: f".layer.{int(m[1]) - 1}.convolution"),
    (r"\.bn(\d)", lambda m: f".layer.{int(m[1]) - 1}.normalization"),
)


def write_for_transformers(folder: str, cfg: CfgNode, model: nn.Module, class_names: Sequence[str] | None) -> None:
    """Write config.json, preprocessor_config.json and model.safetensors.

    Args:
        folder: where to; it is made where there is none.
        cfg: the configuration that the model was built from.
        model: the detector.
        class_names: in the order of the classes; None where they are not known.

    Raises:
        ValueError: transformers has no such detector, or not with these settings.
    """
    config, state = transformers_config(cfg, class_names), transformers_state(cfg, model)
    eps = getattr(model, "eps", EPS)
    if eps != EPS:
        _logger.warning(
            "transformers takes the inverse sigmoid with an eps of %s, this detector one of %s: boxes near the "
            "image's border will differ, by some 1e-4 of its size", EPS, eps,
        )  # fmt: skip
    os.makedirs(folder, exist_ok=True)
    save_safetensors(os.path.join(folder, "model.safetensors"), state, {"format": "pt"})
    for name, content in (("config.json", config), ("preprocessor_config.json", _processor(cfg))):
        with replacing(os.path.join(folder, name)) as file:
            file.write(json.dumps(content, indent=2).encode())


def transformers_state(cfg: CfgNode, model: nn.Module) -> dict[str, Tensor]:
    """A detector's state dict under the names and with the rows of transformers' files."""
    which = _MODELS[cfg.MODEL.META_ARCHITECTURE][0]
    table = TABLES[which].inverse()
    dilated = cfg.MODEL.RESNETS.RES5_DILATION == 2
    prefix = BACKBONE + ("_backbone." if dilated and which == "DAB-DETR" else "")
    layers = cfg.MODEL.DETR.DEC_LAYERS
    state = {}
    for name, tensor in unpacked(model.state_dict()).items():
        if name.startswith("backbone."):
            state[prefix + _backbone_name(name.removeprefix("backbone."), own=not dilated)] = tensor
            continue
        there = table(name)
        if there is None:
            raise ValueError(f"transformers has nothing for {name}")
        if f"class_embed.{layers}." in name:  # for proposals: the last row says "object", there the first
            tensor = torch.cat([tensor[-1:], tensor[1:-1]])
        state[there] = tensor.clone()  # of its own: a file has no shared memory
    return state


def _backbone_name(name: str, *, own: bool) -> str:
    for pattern, there in (*_TORCHVISION, *(_OWN if own else ())):
        name = re.sub(pattern, there, name)
    return name


def transformers_config(cfg: CfgNode, class_names: Sequence[str] | None) -> dict[str, Any]:
    """What config.json says.

    Raises:
        ValueError: transformers has no such detector, or not with these settings.
    """
    _check(cfg)
    _, model_type, model_class, _ = _MODELS[cfg.MODEL.META_ARCHITECTURE]
    detr, resnet = cfg.MODEL.DETR, cfg.MODEL.RESNETS
    names = list(class_names or (f"LABEL_{i}" for i in range(detr.NUM_CLASSES)))
    config: dict[str, Any] = {
        "architectures": [f"{model_class}ForObjectDetection"],
        "model_type": model_type,
        "d_model" if model_type != "dab-detr" else "hidden_size": detr.HIDDEN_DIM,
        "num_queries": detr.NUM_QUERIES,
        **{f"{part}_layers": detr[key] for part, key in (("encoder", "ENC_LAYERS"), ("decoder", "DEC_LAYERS"))},
        **{f"{part}_attention_heads": detr.NUM_HEADS for part in ("encoder", "decoder")},
        **{f"{part}_ffn_dim": detr.FEEDFORWARD_DIM for part in ("encoder", "decoder")},
        **dict.fromkeys(("dropout", "attention_dropout", "activation_dropout"), detr.DROPOUT),
        "auxiliary_loss": False,
        "id2label": {str(i): name for i, name in enumerate(names)},
        "label2id": {name: i for i, name in enumerate(names)},
        "class_cost": detr.COST.CLASS,
        "bbox_cost": detr.COST.L1,
        "giou_cost": detr.COST.GIOU,
        "cls_loss_coefficient": detr.LOSS.CLASS,
        "bbox_loss_coefficient": detr.LOSS.L1,
        "giou_loss_coefficient": detr.LOSS.GIOU,
        "eos_coefficient": detr.NO_OBJECT_WEIGHT,
        "focal_alpha": detr.FOCAL_ALPHA,
        "use_pretrained_backbone": False,
    }
    stages = [_STAGES[name] for name in resnet.OUT_FEATURES]
    if resnet.RES5_DILATION == 2:
        config |= {"backbone": f"resnet{resnet.DEPTH}", "use_timm_backbone": True, "dilation": True}
    else:
        widths = [resnet.RES2_OUT_CHANNELS * 2**i for i in range(4)]
        config |= {
            "backbone": None,
            "use_timm_backbone": False,
            "dilation": False,
            "backbone_config": {
                "model_type": "resnet",
                "layer_type": "bottleneck",
                "embedding_size": resnet.STEM_OUT_CHANNELS,
                "hidden_sizes": widths,
                "depths": _DEPTHS[resnet.DEPTH],
                "out_features": stages,
            },
        }
    if model_type == "dab-detr":
        temperature = detr.SPATIAL_ENCODING.TEMPERATURE
        config |= {"temperature_height": temperature, "temperature_width": temperature}
        config |= {"num_patterns": cfg.MODEL.DAB.NUM_PATTERNS, "activation_function": "prelu"}
    elif model_type == "deformable_detr":
        deformable = cfg.MODEL.DEFORMABLE
        config |= {
            "num_feature_levels": deformable.NUM_LEVELS,
            "encoder_n_points": deformable.ENC_POINTS,
            "decoder_n_points": deformable.DEC_POINTS,
            "with_box_refine": deformable.BOX_REFINEMENT,
            "two_stage": deformable.TWO_STAGE,
            "two_stage_num_proposals": detr.NUM_QUERIES,
        }
    # Costs and temperatures are whole numbers there, and a float is refused.
    real = ("dropout", "attention_dropout", "activation_dropout", "eos_coefficient", "focal_alpha")
    return {
        key: int(value) if isinstance(value, float) and value.is_integer() and key not in real else value
        for key, value in config.items()
    }


def _check(cfg: CfgNode) -> None:
    """Refuse what transformers would compute otherwise, naming the key."""
    name, detr, resnet = cfg.MODEL.META_ARCHITECTURE, cfg.MODEL.DETR, cfg.MODEL.RESNETS
    if name not in _MODELS:
        raise ValueError(f"transformers has no {name}: it has {', '.join(_MODELS)}")
    encoding = detr.SPATIAL_ENCODING
    temperature = encoding.TEMPERATURE if name == "DABDETR" else 10000.0
    ways = (encoding.ENCODER, encoding.DECODER, detr.QUERY_ENCODING)
    allowed: Mapping[str, tuple[Any, Any]] = {
        "MODEL.BACKBONE.NAME": (cfg.MODEL.BACKBONE.NAME, "build_torchvision_resnet_backbone"),
        "MODEL.RESNETS.NORM": (resnet.NORM, "FrozenBN"),
        "MODEL.RESNETS.STRIDE_IN_1X1": (resnet.STRIDE_IN_1X1, False),
        "MODEL.DETR.PRE_NORM": (detr.PRE_NORM, False),
        "MODEL.DETR.SPATIAL_ENCODING.TYPE": (encoding.TYPE, "sine"),
        "MODEL.DETR.SPATIAL_ENCODING.TEMPERATURE": (encoding.TEMPERATURE, temperature),
        "MODEL.DETR.SPATIAL_ENCODING.OFFSET": (encoding.OFFSET, 0.0),
        "MODEL.DETR.SPATIAL_ENCODING.ENCODER, .DECODER and MODEL.DETR.QUERY_ENCODING": (ways, ("attention",) * 3),
        "MODEL.DAB.MODULATE": (cfg.MODEL.DAB.MODULATE, True),
        "MODEL.DAB.FIX_CENTRES": (cfg.MODEL.DAB.FIX_CENTRES, False),
        "INPUT.FORMAT": (cfg.INPUT.FORMAT, "RGB"),
    }
    if name == "DeformableDETR":
        allowed = {**allowed, "MODEL.DEFORMABLE.IGNORE_PADDING": (cfg.MODEL.DEFORMABLE.IGNORE_PADDING, False)}
    for key, (here, there) in allowed.items():
        if here != there:
            raise ValueError(f"{key} is {here}, which transformers does not have: only {there} can be written for it")
    if resnet.DEPTH not in _DEPTHS:
        raise ValueError(f"MODEL.RESNETS.DEPTH is {resnet.DEPTH}; only 50, 101 and 152 can be written for transformers")


def _processor(cfg: CfgNode) -> dict[str, Any]:
    """What preprocessor_config.json says: how images are made ready."""
    name = _MODELS[cfg.MODEL.META_ARCHITECTURE][3]
    return {
        "image_processor_type": f"{name}ImageProcessor",
        "format": "coco_detection",
        "do_resize": True,
        "size": {"shortest_edge": cfg.INPUT.MIN_SIZE_TEST, "longest_edge": cfg.INPUT.MAX_SIZE_TEST},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [x / 255 for x in cfg.MODEL.PIXEL_MEAN],
        "image_std": [x / 255 for x in cfg.MODEL.PIXEL_STD],
        "do_pad": True,
    }
