"""Checkpoints of transformers (github.com/huggingface/transformers): names and rows, there and back.

DETR, Conditional DETR, DAB-DETR and Deformable DETR, as files on the Hub and `save_pretrained` have them, and as
`state_dict()` of transformers 5 does; with timm's ResNet or its own. Projections of queries, keys and values are apart
there and one tensor here.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor

from detr_family.checkpoint.names import NameTable
from detr_family.checkpoint.releases import resnet_name
from detr_family.checkpoint.rows import CLASS_ROWS, COCO_IDS, COCO_NAMES, coco_rows, head_rows, proposal_rows

SIGN = re.compile(r"((conditional_)?detr\.)?model\.(backbone|encoder|decoder)\.")
FILES = ("model.safetensors", "pytorch_model.bin")
EPS = 1e-5  # of the inverse sigmoid, in all of its detectors
FAMILIES = ("DETR", "Conditional DETR", "DAB-DETR", "Deformable DETR")

BACKBONE = "model.backbone.conv_encoder.model."
# Its own ResNet's names -> torchvision's.
_OWN_RESNET = (
    (r"^embedder\.embedder\.convolution", "conv1"),
    (r"^embedder\.embedder\.normalization", "bn1"),
    (r"^encoder\.stages\.(\d)\.layers\.(\d+)", lambda m: f"layer{int(m[1]) + 1}.{m[2]}"),
    (r"\.shortcut\.convolution", ".downsample.0"),
    (r"\.shortcut\.normalization", ".downsample.1"),
    (r"\.layer\.(\d)\.convolution", lambda m: f".conv{int(m[1]) + 1}"),
    (r"\.layer\.(\d)\.normalization", lambda m: f".bn{int(m[1]) + 1}"),
)
# What transformers 5 says in memory -> what is in files. DAB-DETR's ResNet of timm has a name more in both.
_IN_MEMORY = (
    (r"^model\.backbone\.model\.", BACKBONE),
    (r"^model\.backbone\.conv_encoder\.model\._backbone\.", BACKBONE),
    (r"(layers\.\d+\.\w+)\.o_proj\.", r"\1.out_proj."),
)

_ENC, _DEC = "model.encoder.layers.#.", "model.decoder.layers.#."
_ENC_HERE, _DEC_HERE = "transformer.encoder.layers.#.", "transformer.decoder.layers.#."
_ATTENTION = {f"{x}_proj": f"in_proj.{x}" for x in "qkv"} | {"out_proj": "out_proj"}
_DEFORMABLE_ATTENTION = ("sampling_offsets", "attention_weights", "value_proj", "output_proj")
_CONDITIONAL = ("qcontent_proj", "qpos_proj", "kcontent_proj", "kpos_proj", "v_proj", "qpos_sine_proj")
_CONDITIONAL_IN_MEMORY = (
    "q_content_proj", "q_pos_proj", "k_content_proj", "k_pos_proj", "v_proj", "q_pos_sine_proj"
)  # fmt: skip
_ENCODER = {
    **{f"{_ENC}self_attn.{there}": f"{_ENC_HERE}self_attn.{here}" for there, here in _ATTENTION.items()},
    _ENC + "self_attn_layer_norm": _ENC_HERE + "norm1",
    **{f"{_ENC}{mlp}fc{i}": f"{_ENC_HERE}linear{i}" for mlp in ("", "mlp.") for i in (1, 2)},  # the latter in memory
    _ENC + "activation_fn": _ENC_HERE + "activation",  # PReLU
    _ENC + "final_layer_norm": _ENC_HERE + "norm2",
}
_DECODER = {
    _DEC + "self_attn_layer_norm": _DEC_HERE + "norm1",
    _DEC + "encoder_attn_layer_norm": _DEC_HERE + "norm2",
    **{f"{_DEC}{mlp}fc{i}": f"{_DEC_HERE}linear{i}" for mlp in ("", "mlp.") for i in (1, 2)},
    _DEC + "final_layer_norm": _DEC_HERE + "norm3",
    "model.decoder.layernorm": "transformer.decoder.norm",
}
_HEADS = {
    "model.input_projection": "input_proj",
    "class_labels_classifier": "class_embed",
    "bbox_predictor": "bbox_embed",
}
_DETR = {
    **_ENCODER,
    **_DECODER,
    **_HEADS,
    **{f"{_DEC}self_attn.{there}": f"{_DEC_HERE}self_attn.{here}" for there, here in _ATTENTION.items()},
    **{f"{_DEC}encoder_attn.{there}": f"{_DEC_HERE}multihead_attn.{here}" for there, here in _ATTENTION.items()},
    "model.query_position_embeddings": "query_embed",
}
_CONDITIONAL_DETR = {
    **_ENCODER,
    **_DECODER,
    **_HEADS,
    **{f"{_DEC}{part}_{x}": f"{_DEC_HERE}{part}_{x}" for part in ("sa", "ca") for x in _CONDITIONAL},
    **{  # in memory
        f"{_DEC}{attention}.{there}": f"{_DEC_HERE}{part}_{x}"
        for attention, part in (("self_attn", "sa"), ("encoder_attn", "ca"))
        for there, x in zip(_CONDITIONAL_IN_MEMORY, _CONDITIONAL, strict=True)
    },
    _DEC + "self_attn.out_proj": _DEC_HERE + "self_attn.out_proj",
    _DEC + "encoder_attn.out_proj": _DEC_HERE + "cross_attn.out_proj",
    "model.decoder.query_scale": "transformer.decoder.query_scale",
    "model.decoder.ref_point_head": "transformer.decoder.ref_point_head",
    "model.query_position_embeddings": "query_embed",
}
_DAB_NAMES = ("query_content_proj", "query_pos_proj", "key_content_proj", "key_pos_proj", "value_proj")
_DAB_DETR = {
    **_ENCODER,
    "class_embed": "class_embed",
    **_HEADS,
    _DEC + "self_attn.self_attn_layer_norm": _DEC_HERE + "norm1",
    _DEC + "cross_attn.cross_attn_layer_norm": _DEC_HERE + "norm2",
    _DEC + "mlp.fc1": _DEC_HERE + "linear1",
    _DEC + "mlp.fc2": _DEC_HERE + "linear2",
    _DEC + "mlp.activation_fn": _DEC_HERE + "activation",
    _DEC + "mlp.final_layer_norm": _DEC_HERE + "norm3",
    "model.decoder.layernorm": "transformer.decoder.norm",
    **{
        f"{_DEC}{attention}.{attention}_{there}": f"{_DEC_HERE}{part}_{here}"
        for attention, part in (("self_attn", "sa"), ("cross_attn", "ca"))
        for there, here in zip((*_DAB_NAMES, "query_pos_sine_proj"), _CONDITIONAL, strict=True)
    },
    **{f"{_DEC}{x}.{x}.output_proj": f"{_DEC_HERE}{x}.out_proj" for x in ("self_attn", "cross_attn")},
    **{f"model.{part}.query_scale": f"transformer.{part}.query_scale" for part in ("encoder", "decoder")},
    **{f"model.decoder.{x}": f"transformer.decoder.{x}" for x in ("ref_point_head", "ref_anchor_head", "bbox_embed")},
    "model.query_refpoint_embeddings": "refpoint_embed",
    "model.patterns": "transformer.patterns",
}
_DEFORMABLE_DETR = {
    **{f"{_ENC}self_attn.{x}": f"{_ENC_HERE}self_attn.{x}" for x in _DEFORMABLE_ATTENTION},
    **_ENCODER,
    **_DECODER,
    **{f"{_DEC}self_attn.{there}": f"{_DEC_HERE}self_attn.{here}" for there, here in _ATTENTION.items()},
    **{f"{_DEC}encoder_attn.{x}": f"{_DEC_HERE}cross_attn.{x}" for x in _DEFORMABLE_ATTENTION},
    # Here numbered as in the release: norm1 follows the cross-attention.
    _DEC + "self_attn_layer_norm": _DEC_HERE + "norm2",
    _DEC + "encoder_attn_layer_norm": _DEC_HERE + "norm1",
    **{f"{x}_embed": f"{x}_embed" for x in ("class", "bbox")},
    **{f"model.decoder.{x}_embed": f"transformer.decoder.{x}_embed" for x in ("class", "bbox")},
    "model.input_proj": "input_proj",
    "model.query_position_embeddings": "query_embed",
    **{
        f"model.{x}": f"transformer.{x}"
        for x in ("level_embed", "reference_points", "enc_output", "enc_output_norm", "pos_trans", "pos_trans_norm")
    },
}
TABLES = {
    name: NameTable(pairs)
    for name, pairs in zip(FAMILIES, (_DETR, _CONDITIONAL_DETR, _DAB_DETR, _DEFORMABLE_DETR), strict=True)
}


def in_files(name: str) -> str:
    """The spelling that files have of a name; of its own ResNet, timm's."""
    name = re.sub(r"^(conditional_)?detr\.", "", name)  # of a segmentation model
    for pattern, written in _IN_MEMORY:
        name = re.sub(pattern, written, name)
    if name.startswith(BACKBONE):
        tail = name[len(BACKBONE) :]
        for pattern, replacement in _OWN_RESNET:
            tail = re.sub(pattern, replacement, tail)
        name = BACKBONE + tail
    return name


def family(names: Collection[str]) -> str:
    """Which of FAMILIES a state dict is of, by its names in files."""
    if "model.query_refpoint_embeddings.weight" in names:
        return "DAB-DETR"
    if "model.level_embed" in names:
        return "Deformable DETR"
    if "model.decoder.query_scale.layers.0.weight" in names:
        return "Conditional DETR"
    return "DETR"


def folder(state: Collection[str]) -> str:
    """Where in configs/ a detector's settings are: DAB-DETR's inverse sigmoid has another eps than in the release."""
    return "transformers/" if family([in_files(name) for name in state]) == "DAB-DETR" else ""


def convert_transformers(state: Mapping[str, Tensor], num_classes: int) -> dict[str, Tensor]:
    """A state dict of transformers under the names here, with the rows that the models here have.

    Args:
        state: as in its file, or in memory; what several layers share may be there once.
        num_classes: of the model here; with 80 COCO's are picked from the 91 rows of the published files.

    Raises:
        ValueError: names that none of FAMILIES has.
    """
    there = {in_files(name): tensor for name, tensor in state.items() if not name.endswith("num_batches_tracked")}
    there = {k: v for k, v in there.items() if not k.startswith(("mask_head.", "bbox_attention."))}
    which = family(there)
    table = TABLES[which]
    converted: dict[str, Tensor] = {}
    unknown = []
    for name, tensor in there.items():
        if name.startswith(BACKBONE):
            converted["backbone." + resnet_name(name[len(BACKBONE) :])] = tensor
        elif (here := table(name)) is not None:
            converted[here] = tensor
        else:
            unknown.append(name)
    if unknown:
        raise ValueError(
            f"{len(unknown)} of its names ({', '.join(unknown[:3])}, ...) are in none of the detectors of transformers "
            f"that there are here, {', '.join(FAMILIES)}"
        )
    converted = _packed(converted)
    layers = _count(converted, "transformer.decoder.layers.")
    if which == "Deformable DETR":
        converted = _layers_filled(converted, layers)
    published = head_rows(converted) <= {91, 92}
    for name in [name for name in converted if CLASS_ROWS.search(name)]:
        proposals = f"class_embed.{layers}." in name  # of a two-stage Deformable DETR
        if published:
            converted[name] = coco_rows(converted[name], num_classes, proposals=proposals)
        elif proposals:
            converted[name] = proposal_rows(converted[name])
    return converted


def _packed(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Projections of queries, keys and values, one below the other in one tensor."""
    packed = {}
    for name, tensor in state.items():
        match = re.fullmatch(r"(.*\.in_proj)\.([qkv])\.(weight|bias)", name)
        if match is None:
            packed[name] = tensor
        elif match[2] == "q":
            parts = [state.get(f"{match[1]}.{x}.{match[3]}", tensor[:0]) for x in "qkv"]
            packed[f"{match[1]}_{match[3]}"] = torch.cat(parts)
    return packed


def unpacked(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The opposite."""
    apart = {}
    for name, tensor in state.items():
        match = re.fullmatch(r"(.*\.in_proj)_(weight|bias)", name)
        if match is None:
            apart[name] = tensor
        else:
            apart.update((f"{match[1]}.{x}.{match[2]}", part) for x, part in zip("qkv", tensor.chunk(3), strict=True))
    return apart


def _layers_filled(state: dict[str, Tensor], layers: int) -> dict[str, Tensor]:
    """Heads of all layers, where a file has the first one alone because all share it, or has them in the decoder."""
    filled = dict(state)
    for name, tensor in state.items():
        if match := re.match(r"transformer\.decoder\.((?:class|bbox)_embed\..*)", name):
            filled.setdefault(match[1], tensor)
    for name, tensor in list(filled.items()):
        if match := re.match(r"((?:class|bbox)_embed)\.0\.(.*)", name):
            for i in range(1, layers):
                filled.setdefault(f"{match[1]}.{i}.{match[2]}", tensor)
    return filled


def _count(state: Collection[str], prefix: str) -> int:
    """How many layers there are whose names begin with a prefix."""
    return len({name[len(prefix) :].split(".")[0] for name in state if name.startswith(prefix)})


def class_names(config: Mapping[str, Any]) -> list[str] | None:
    """The classes that a config.json names: COCO's 80 where it has COCO's 91 category ids; None where it has none."""
    labels = config.get("id2label") or {}
    names = [str(labels[key]) for key in sorted(labels, key=int)]
    if len(names) == 91 and all(names[i].lower() == name for i, name in zip(COCO_IDS, COCO_NAMES, strict=True)):
        return list(COCO_NAMES)
    return None if not names or all(re.fullmatch(r"LABEL_\d+", name) for name in names) else names


def is_dilated(config: Mapping[str, Any]) -> bool | None:
    """Whether a config.json has the backbone's last stage dilated; None where it does not say."""
    backbone = config.get("backbone_config") or {}
    if "dilation" not in config and "output_stride" not in backbone:
        return None
    return bool(config.get("dilation")) or backbone.get("output_stride") == 16


def differences(config: Mapping[str, Any], model: Any) -> list[str]:
    """Where a model computes something else than the detector that a config.json describes, one sentence each."""
    found = []
    encoding: Any = getattr(model, "position_encoding", None)
    temperature = config.get("temperature_height")
    if temperature is not None and getattr(encoding, "temperature_y", temperature) != temperature:
        found.append(f"the position encoding has temperature {encoding.temperature_y} here, {temperature} there")
    return found
