"""Checkpoints of detrex (github.com/IDEA-Research/detrex): names, rows, and the settings that its detectors have.

A layer there is a list of attentions, feed-forward networks and norms, whichever detector it is of. Classes are
contiguous. Most of its detectors compute what the papers' releases do; where they do not, the weights fit a model of
the release's config file and would be wrong in it without an error, so the model's settings are looked at.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor

from detr_family.checkpoint.names import NameTable
from detr_family.checkpoint.releases import resnet_name
from detr_family.checkpoint.rows import proposal_rows

SIGN = re.compile(r"transformer\.(encoder|decoder)\.layers\.\d+\.(attentions|ffns)\.\d+\.")

_FEEDFORWARD = {
    "layers.0.0": "linear1",
    "layers.0.1": "activation",  # PReLU, stored twice
    "activation": "activation",
    "layers.1": "linear2",
}
_SHARED = {
    "query_embedding": "query_embed",
    "anchor_box_embed": "refpoint_embed",
    "denoising_generator.label_encoder": "label_enc",
    "label_encoder": "label_enc",  # DN-DETR before 2022-09-15, DN-Deformable-DETR's converted file
    "neck.convs.#.conv": "input_proj.#.0",
    "neck.convs.#.norm": "input_proj.#.1",
    "transformer.level_embeds": "transformer.level_embed",
    "transformer.enc_outpout_norm": "transformer.enc_output_norm",  # before 2022-09-20
    "transformer.decoder.post_norm_layer": "transformer.decoder.norm",
    **{
        f"transformer.{part}.layers.#.ffns.0.{there}": f"transformer.{part}.layers.#.{here}"
        for part in ("encoder", "decoder")
        for there, here in _FEEDFORWARD.items()
    },
    "transformer.encoder.layers.#.attentions.0.attn": "transformer.encoder.layers.#.self_attn",
    "transformer.encoder.layers.#.attentions.0": "transformer.encoder.layers.#.self_attn",  # deformable
    "transformer.encoder.layers.#.norms.0": "transformer.encoder.layers.#.norm1",
    "transformer.encoder.layers.#.norms.1": "transformer.encoder.layers.#.norm2",
    "transformer.decoder.layers.#.attentions.0.attn": "transformer.decoder.layers.#.self_attn",
    "transformer.decoder.layers.#.attentions.1.attn": "transformer.decoder.layers.#.multihead_attn",
}
_NORMS = ("norm1", "norm2", "norm3")
# Conditional DETR's projections, and those of the detectors after it.
_PROJECTIONS = {
    "query_content_proj": "qcontent_proj",
    "query_pos_proj": "qpos_proj",
    "query_pos_sine_proj": "qpos_sine_proj",
    "key_content_proj": "kcontent_proj",
    "key_pos_proj": "kpos_proj",
    "value_proj": "v_proj",
}
_DECODER = "transformer.decoder.layers.#."
_SINGLE_SCALE = NameTable(
    {
        **_SHARED,
        **{
            f"{_DECODER}attentions.{i}.{there}": f"{_DECODER}{short}_{here}"
            for i, short in enumerate(("sa", "ca"))
            for there, here in _PROJECTIONS.items()
        },
        f"{_DECODER}attentions.0.out_proj": f"{_DECODER}self_attn.out_proj",
        f"{_DECODER}attentions.1.out_proj": f"{_DECODER}cross_attn.out_proj",
        **{f"{_DECODER}norms.{i}": _DECODER + norm for i, norm in enumerate(_NORMS)},
    }
)
_DEFORMABLE = NameTable(
    {
        **_SHARED,
        f"{_DECODER}attentions.1": f"{_DECODER}cross_attn",
        # Numbered by their place there, here as in the releases: norm1 follows the cross-attention.
        **{f"{_DECODER}norms.{i}": _DECODER + norm for i, norm in enumerate(("norm2", "norm1", "norm3"))},
    }
)


def convert_detrex(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A state dict of detrex under the names here, with the rows that the models here have.

    Args:
        state: as in its file; what is stored under two names may lack one.
    """
    deformable = "transformer.level_embeds" in state
    table = _DEFORMABLE if deformable else _SINGLE_SCALE
    dino, dab = _is_dino(state), "transformer.decoder.ref_point_head.layers.0.weight" in state
    maps = len({name.split(".")[2] for name in state if name.startswith("neck.convs.")})
    layers = len({name.split(".")[3] for name in state if name.startswith("transformer.decoder.layers.")})
    converted = {}
    for name, tensor in state.items():
        if name.startswith("criterion.") or name.endswith("num_batches_tracked"):
            continue
        if dab and name.startswith("transformer.pos_trans"):
            continue  # which its DAB-Deformable-DETR with two stages never had a use for
        if name.startswith("backbone.body."):  # torchvision's ResNet, of all with a dilated last stage
            converted["backbone." + resnet_name(name[len("backbone.body.") :])] = tensor
            continue
        if match := re.match(r"neck\.extra_convs\.(\d+)\.", name):
            name = f"neck.convs.{maps + int(match[1])}.{name[match.end() :]}"
        here = table(name) or name
        proposing = re.match(rf"(?:transformer\.decoder\.)?(class|bbox)_embed\.{layers}\.", here)
        if proposing and dino:
            here = f"transformer.enc_out_{proposing[1]}_embed.{here[proposing.end() :]}"
        elif proposing and proposing[1] == "class" and not dab:
            tensor = proposal_rows(tensor)  # Deformable DETR's: the first row says "object"
        elif here == "label_enc.weight" and dino:  # here there is a last row, which nothing reads
            tensor = torch.cat([tensor, torch.zeros_like(tensor[:1])])
        converted[here] = tensor
    return converted


def _is_dino(state: dict[str, Tensor]) -> bool:
    return "transformer.level_embeds" in state and "transformer.decoder.norm.weight" in state


def is_dilated(state: dict[str, Tensor]) -> bool:
    """Whether the backbone's last stage is dilated: all such there, and no others, have torchvision's names."""
    return any(name.startswith("backbone.body.") for name in state)


def differences(state: dict[str, Tensor], model: Any) -> list[str]:
    """Where a model computes something else than detrex's detector with these weights, one sentence each.

    What only matters to images that are padded to one size in a batch is no difference: there the models here are
    right (an image alone or in a batch has one result), and its are not.

    Args:
        state: as in the file.
        model: of the same names and shapes.
    """
    found = []
    encoding: Any = getattr(model, "position_encoding", None)
    if hasattr(encoding, "temperature_x"):
        has = (float(encoding.temperature_x), float(encoding.offset))
        right = _encodings(state)
        if has not in right:
            found.append(f"the position encoding has temperature and offset {has} here, {right[0]} there")
    eps = getattr(model, "eps", None)
    if eps is not None and eps != 1e-3:
        found.append(f"the inverse sigmoid has an eps of {eps} here, 0.001 there")
    heads = getattr(model, "class_embed", None)
    if _is_dino(state) and isinstance(heads, torch.nn.ModuleList) and len(heads) > 1 and len(set(heads)) == 1:
        found.append("all decoder layers share their heads here, each has its own there")
    return found


def _encodings(state: dict[str, Tensor]) -> list[tuple[float, float]]:
    """Temperature and offset of the position encoding; where the file does not tell, the commoner first."""
    if _is_dino(state):
        return [(10000.0, -0.5), (20.0, 0.0)]  # the latter of the 24-epoch R50 alone
    if "transformer.level_embeds" in state:
        return [(10000.0, -0.5)]
    if "transformer.decoder.ref_anchor_head.layers.0.weight" not in state:
        return [(10000.0, 0.0)]  # DETR, Conditional DETR
    denoising = any("label_encoder" in name for name in state)
    dilated = is_dilated(state) and not denoising and "transformer.patterns.weight" not in state
    return [(10.0, 0.0)] if dilated else [(20.0, 0.0)]
