"""The releases' files fill the models, and the outputs are theirs."""

from __future__ import annotations

import itertools
from pathlib import Path

import golden
import pytest
import torch
import yaml
from detectron2.config import get_cfg
from detectron2.modeling import build_model
from torch import Tensor, nn

import projects.deformable  # noqa: F401
from detr_family import add_detr_family_config
from detr_family.checkpoint import DETRCheckpointer
from detr_family.checkpoint.releases import COCO_IDS, convert_released, released_name
from detr_family.config import load_config

CONFIGS = sorted((Path(__file__).resolve().parents[1] / "configs").glob("*.yaml"))
Shapes = dict[str, tuple[int, ...]]


def model_of(name: str) -> nn.Module:
    opts = ["MODEL.DEVICE", "cpu", "MODEL.DETR.NUM_CLASSES", "80", "MODEL.DETR.DROPOUT", "0"]
    torch.manual_seed(0)
    return build_model(load_config(str(CONFIGS[0].parent / f"{name}.yaml"), opts))


@pytest.mark.golden
def test_outputs_losses_and_gradients_are_the_papers(tmp_path: Path) -> None:
    expected = golden.load("deformable_detr_r50")
    model = golden.fill(model_of("deformable_detr_r50"), expected, tmp_path / "released.pth")
    golden.compare_outputs(model, expected)
    golden.compare_training(model, expected)


def linear(name: str, out: int, into: int) -> Shapes:
    return {f"{name}.weight": (out, into), f"{name}.bias": (out,)}


def norm(name: str, channels: int) -> Shapes:
    return linear(name, channels, 1) | {f"{name}.weight": (channels,)}


def mlp(name: str, widths: list[int]) -> Shapes:
    shapes: Shapes = {}
    for i, (into, out) in enumerate(itertools.pairwise(widths)):
        shapes |= linear(f"{name}.layers.{i}", out, into)
    return shapes


def released_shapes(name: str) -> Shapes:
    """Names and shapes of a release's state dict after the backbone."""
    ffn = 1024 if name.startswith("deformable") else 2048
    refine, two_stage = name != "deformable_detr_r50", name.endswith("two_stage")
    shapes: Shapes = {"transformer.level_embed": (4, 256)}
    for part in ("encoder", "decoder"):
        for i in range(6):
            layer = f"transformer.{part}.layers.{i}."
            attention = layer + ("self_attn" if part == "encoder" else "cross_attn")
            for projection, out in (
                ("sampling_offsets", 256), ("attention_weights", 128), ("value_proj", 256), ("output_proj", 256)
            ):  # fmt: skip
                shapes |= linear(f"{attention}.{projection}", out, 256)
            shapes |= linear(layer + "linear1", ffn, 256) | linear(layer + "linear2", 256, ffn)
            shapes |= norm(layer + "norm1", 256) | norm(layer + "norm2", 256)
            if part == "decoder":
                shapes |= norm(layer + "norm3", 256) | linear(layer + "self_attn.out_proj", 256, 256)
                shapes |= {f"{layer}self_attn.in_proj_weight": (768, 256), f"{layer}self_attn.in_proj_bias": (768,)}
    heads = 7 if two_stage else 6
    for prefix in ("", "transformer.decoder.") if refine else ("",):
        for i in range(heads):
            shapes |= mlp(f"{prefix}bbox_embed.{i}", [256, 256, 256, 4])
    for prefix in ("", "transformer.decoder.") if two_stage else ("",):
        for i in range(heads):
            shapes |= linear(f"{prefix}class_embed.{i}", 91, 256)
    for i, (channels, kernel) in enumerate(((512, 1), (1024, 1), (2048, 1), (2048, 3))):
        shapes |= {f"input_proj.{i}.0.weight": (256, channels, kernel, kernel), f"input_proj.{i}.0.bias": (256,)}
        shapes |= norm(f"input_proj.{i}.1", 256)
    if two_stage:
        shapes |= linear("transformer.enc_output", 256, 256) | norm("transformer.enc_output_norm", 256)
        shapes |= linear("transformer.pos_trans", 512, 512) | norm("transformer.pos_trans_norm", 512)
    elif name.startswith("deformable"):
        shapes |= linear("transformer.reference_points", 2, 256) | {"query_embed.weight": (300, 512)}
    else:
        content = 255 if name.startswith("dn") else 256
        shapes |= {"tgt_embed.weight": (300, content), "refpoint_embed.weight": (300, 4)}
        shapes |= mlp("transformer.decoder.query_scale", [256, 256, 256])
        shapes |= mlp("transformer.decoder.ref_point_head", [512, 256, 256])
        if name.startswith("dn"):
            shapes["label_enc.weight"] = (92, 255)
    return shapes


@pytest.mark.parametrize(
    "name",
    [
        "deformable_detr_r50",
        "deformable_detr_r50_refine",
        "deformable_detr_r50_two_stage",
        "dab_deformable_detr_r50",
        "dn_deformable_detr_r50",
    ],
)
def test_a_release_fills_the_model(name: str, tmp_path: Path) -> None:
    model = model_of(name)
    generator = torch.Generator().manual_seed(1)
    state = {k: torch.randn(s, generator=generator) for k, s in released_shapes(name).items()}
    for key in list(state):  # one module has both names, or all six
        twin = "transformer.decoder." + key
        state[key] = state.get(twin, state[key])
        if name == "deformable_detr_r50" and "_embed." in key and key.startswith(("class", "bbox")):
            state[key] = state[key.replace(key.split(".")[1], "0", 1)]
    backbone = {k: v + 1 for k, v in model.state_dict().items() if k.startswith("backbone.")}
    resnet = released_resnet(backbone)
    torch.save({"model": state | resnet, "epoch": 49}, tmp_path / "released.pth")
    DETRCheckpointer(model, whole=True).load(str(tmp_path / "released.pth"))

    loaded = model.state_dict()
    assert {released_name(k) for k in state | resnet} == loaded.keys()
    for key, tensor in state.items():
        if "class_embed" in key:
            rows = [*COCO_IDS, 0] if key.split(".")[-2] == "6" else COCO_IDS
            tensor = tensor[rows]
        elif "label_enc" in key:
            tensor = tensor[[*COCO_IDS, 91]]
        assert torch.equal(loaded[key], tensor), key
    assert all(torch.equal(loaded[k], v) for k, v in backbone.items())


def released_resnet(backbone: dict[str, Tensor]) -> dict[str, Tensor]:
    """Detectron2's ResNet under the names of the releases."""
    released = {}
    for key, value in backbone.items():
        name = key.removeprefix("backbone.").replace("stem.conv1.norm", "bn1").replace("stem.", "")
        name = name.replace("shortcut.norm", "downsample.1").replace("shortcut", "downsample.0")
        for i in (1, 2, 3):
            name = name.replace(f".conv{i}.norm", f".bn{i}")
        for i in (2, 3, 4, 5):
            name = name.replace(f"res{i}.", f"layer{i - 1}.")
        assert released_name(f"backbone.0.body.{name}") == key
        released[f"backbone.0.body.{name}"] = value
    return released


def test_all_91_rows_can_be_kept() -> None:
    state = {"class_embed.6.bias": torch.arange(91.0), "class_embed.0.bias": torch.arange(91.0)}
    converted = convert_released(state, 91, {"class_embed.6.bias"})
    assert converted["class_embed.6.bias"].tolist() == [*range(91), 0]
    assert converted["class_embed.0.bias"].tolist() == list(range(91))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_every_config_file_is_read_by_a_plain_detectron2_script_and_is_short(path: Path) -> None:
    cfg = get_cfg()
    add_detr_family_config(cfg)
    cfg.merge_from_file(str(path))
    assert cfg.MODEL.META_ARCHITECTURE.endswith("DeformableDETR")
    text = path.read_text()
    assert len(text.splitlines()) <= 25
    depth, base = 0, yaml.safe_load(text).get("_BASE_")
    while base:
        path = path.parent / base
        depth, base = depth + 1, yaml.safe_load(path.read_text()).get("_BASE_")
    assert depth <= 2


def test_recipe_of_deformable_detr() -> None:
    cfg = load_config(str(CONFIGS[0].parent / "deformable_detr_r50.yaml"))
    assert (cfg.SOLVER.BASE_LR, cfg.SOLVER.BACKBONE_MULTIPLIER, cfg.SOLVER.IMS_PER_BATCH) == (2e-4, 0.1, 32)
    assert (cfg.SOLVER.EPOCHS, cfg.SOLVER.DROP_EPOCHS) == (50, (40,))
    assert cfg.SOLVER.LR_FACTORS == [["reference_points|sampling_offsets", 0.1]]
    assert (cfg.MODEL.DETR.DROPOUT, cfg.MODEL.DETR.FEEDFORWARD_DIM, cfg.MODEL.DETR.NUM_QUERIES) == (0.1, 1024, 300)
    assert cfg.MODEL.DETR.LOSS.CLASS == 2.0 and cfg.TEST.DETECTIONS_PER_IMAGE == 100
