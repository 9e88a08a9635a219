"""A detector's weights as files of other projects have them, written by rules apart from those that read them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import torch
from detectron2.config import CfgNode
from safetensors.torch import load_file
from torch import Tensor, nn

from detr_family.checkpoint.rows import COCO_IDS
from detr_family.checkpoint.to_transformers import write_for_transformers
from detr_family.modeling.set_detector import SetDetector

State = dict[str, Tensor]

# torchvision's ResNet <- Detectron2's.
_TORCHVISION = (
    (r"^stem\.conv1\.norm\.", "bn1."),
    (r"^stem\.", ""),
    (r"^res(\d)\.", lambda m: f"layer{int(m[1]) - 1}."),
    (r"\.conv(\d)\.norm\.", r".bn\1."),
    (r"\.shortcut\.norm\.", ".downsample.1."),
    (r"\.shortcut\.", ".downsample.0."),
)
_DETREX_PROJECTIONS = {
    "qcontent_proj": "query_content_proj",
    "qpos_proj": "query_pos_proj",
    "qpos_sine_proj": "query_pos_sine_proj",
    "kcontent_proj": "key_content_proj",
    "kpos_proj": "key_pos_proj",
    "v_proj": "value_proj",
}


def torchvision_name(name: str) -> str:
    """`res2.0.conv2.norm.bias` -> `layer1.0.bn2.bias`."""
    for pattern, replacement in _TORCHVISION:
        name = re.sub(pattern, replacement, name)
    return name


def as_released(state: Mapping[str, Tensor]) -> State:
    """Under the names of the papers' authors; of COCO's 80 classes a row for each category id."""
    released = {}
    for name, tensor in state.items():
        tail = name.removeprefix("backbone.")
        if tail != name:
            resnet = tail.startswith(("stem.", "res"))
            name = "backbone.0." + ("body." + torchvision_name(tail) if resnet else tail)
        elif re.search(r"(class_embed|label_enc)\.", name) and len(tensor) in (80, 81):
            rows = tensor.new_zeros(len(tensor) + 11, *tensor.shape[1:])
            rows[[*COCO_IDS, 91][: len(tensor)]] = tensor
            tensor = rows
        released[name] = tensor
    return released


def as_detrex(state: Mapping[str, Tensor], *, dilated: bool = False) -> State:
    """Under detrex's names, everything that it stores twice twice.

    Args:
        state: a detector's, under the names here.
        dilated: with the backbone of its detectors whose last stage is dilated, torchvision's.
    """
    deformable = "transformer.level_embed" in state
    dino = deformable and "transformer.decoder.norm.weight" in state
    apart = any(".sa_qcontent_proj." in name for name in state)
    layers = 1 + max(int(name.split(".")[3]) for name in state if name.startswith("transformer.decoder.layers."))
    levels = len(state["transformer.level_embed"]) if deformable else 0
    maps = max(levels - 1, 1)
    written: State = {}
    for name, tensor in state.items():
        if name.startswith("backbone."):
            if dilated:
                name = "backbone.body." + torchvision_name(name[len("backbone.") :])
        elif match := re.match(r"input_proj\.(\d)\.(\d)\.(.*)", name):
            level, part = int(match[1]), ("conv", "norm")[int(match[2])]
            where = f"convs.{level}" if level < maps else f"extra_convs.{level - maps}"
            name = f"neck.{where}.{part}.{match[3]}"
        elif match := re.match(r"transformer\.(encoder|decoder)\.layers\.(\d+)\.(.*)", name):
            tails = _detrex_in_layer(match[3], decoder=match[1] == "decoder", deformable=deformable, apart=apart)
            written |= {f"transformer.{match[1]}.layers.{match[2]}.{tail}": tensor for tail in tails}
            continue
        elif match := re.match(r"transformer\.enc_out_(class|bbox)_embed\.(.*)", name):
            name = f"{match[1]}_embed.{layers}.{match[2]}"
            written[f"transformer.decoder.{name}"] = tensor
        elif name.startswith("label_enc."):
            name, tensor = (name, tensor[:-1]) if dino else ("denoising_generator.label_encoder.weight", tensor)
        elif name == "refpoint_embed.weight" and not deformable:
            name = "anchor_box_embed.weight"
        elif name == "query_embed.weight" and deformable:
            name = "query_embedding.weight"
        elif name == "transformer.level_embed":
            name = "transformer.level_embeds"
        elif name.startswith("transformer.decoder.norm.") and not dino:
            name = name.replace("norm", "post_norm_layer")
        elif re.search(rf"class_embed\.{layers}\.", name) and "transformer.pos_trans.weight" in state:
            # A two-stage Deformable DETR's head for proposals: "object" is the first row there, the last here.
            tensor = torch.cat([tensor[-1:], tensor[1:-1]])
        written[name] = tensor
    return written


def _detrex_in_layer(tail: str, *, decoder: bool, deformable: bool, apart: bool) -> list[str]:
    """What follows `transformer.decoder.layers.0.` there; `apart`: the decoder has Conditional DETR's projections."""
    name, _, last = tail.partition(".")
    if match := re.fullmatch(r"([sc]a)_(.*)", name):
        return [f"attentions.{int(match[1] == 'ca')}.{_DETREX_PROJECTIONS[match[2]]}.{last}"]
    if name.startswith("norm"):
        order = ("norm2", "norm1", "norm3") if deformable and decoder else ("norm1", "norm2", "norm3")
        return [f"norms.{order.index(name)}.{last}"]
    if name == "activation":
        return [f"ffns.0.activation.{last}", f"ffns.0.layers.0.1.{last}"]
    if name in ("linear1", "linear2"):
        return [f"ffns.0.layers.{'0.0' if name == 'linear1' else '1'}.{last}"]
    number = int(name in ("cross_attn", "multihead_attn"))
    plain = name == "multihead_attn" or (name == "self_attn" and not (apart if decoder else deformable))
    return [f"attentions.{number}.{'attn.' if plain else ''}{last}"]


def detrex_file(model: SetDetector, cfg: CfgNode, folder: Path, names: list[str]) -> str:
    """A checkpoint of detrex's training, which says nothing of classes."""
    torch.save({"model": as_detrex(model.state_dict()), "iteration": 89999}, folder / "detrex.pth")
    return str(folder / "detrex.pth")


def released_file(model: SetDetector, cfg: CfgNode, folder: Path, names: list[str]) -> str:
    """A checkpoint of the papers' authors, likewise."""
    torch.save({"model": as_released(model.state_dict()), "epoch": 49, "args": None}, folder / "released.pth")
    return str(folder / "released.pth")


def transformers_folder(model: SetDetector, cfg: CfgNode, folder: Path, names: list[str]) -> str:
    """What `save_pretrained` of transformers writes."""
    write_for_transformers(str(folder / "hub"), cfg, model, names)
    return str(folder / "hub")


def transformers_safetensors(model: SetDetector, cfg: CfgNode, folder: Path, names: list[str]) -> str:
    return f"{transformers_folder(model, cfg, folder, names)}/model.safetensors"


def transformers_bin(model: SetDetector, cfg: CfgNode, folder: Path, names: list[str]) -> str:
    """As transformers 4 wrote."""
    file = Path(transformers_safetensors(model, cfg, folder, names))
    torch.save(load_file(file), file.with_name("pytorch_model.bin"))
    file.unlink()
    return str(file.with_name("pytorch_model.bin"))


def numbered(model: nn.Module) -> State:
    """A state dict of a detector's names and shapes that takes no memory; each tensor is of one number, its place."""
    return {k: torch.tensor(float(i)).expand(v.shape) for i, (k, v) in enumerate(model.state_dict().items())}


def assert_numbered(converted: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """A converted state dict has the names, shapes and numbers that `numbered` gave."""
    assert converted.keys() == expected.keys()
    for name, tensor in expected.items():
        assert converted[name].shape == tensor.shape, name
        middle = tuple(size // 2 for size in tensor.shape)  # of tables of classes the last row may be a new one
        assert converted[name][middle] == tensor[middle], name
