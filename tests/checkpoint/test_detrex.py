"""detrex's checkpoints load as they are and compute what they do there; a wrong config file is refused."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import foreign
import golden
import pytest
import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from torch import nn

from detr_family.checkpoint import DETRCheckpointer, read_class_names
from detr_family.checkpoint.architecture import config_file
from detr_family.checkpoint.detrex import convert_detrex, differences
from detr_family.checkpoint.formats import recognise
from detr_family.checkpoint.rows import COCO_NAMES
from detr_family.config import load_config

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
DETECTORS = ["detr_r50", "conditional_detr_r50", "dab_detr_r50", "dn_detr_r50", "dino_r50_4scale"]


def model_of(name: str, *opts: str) -> nn.Module:
    """The detector of a config file, untrained."""
    cfg = load_config(str(CONFIGS / f"{name}.yaml"), ["MODEL.DEVICE", "cpu", "MODEL.DETR.NUM_CLASSES", "80", *opts])
    return build_model(quiet(cfg))


def quiet(cfg: CfgNode) -> CfgNode:
    """As golden outputs are made: no dropout, no noise, 100 queries of DINO."""
    cfg.MODEL.DETR.DROPOUT = cfg.MODEL.SWIN.DROP_PATH_RATE = 0.0
    for noise in (cfg.MODEL.DN, cfg.MODEL.DINO):
        noise.LABEL_NOISE = noise.BOX_NOISE = 0.0
    if cfg.MODEL.META_ARCHITECTURE == "DINO":
        cfg.MODEL.DETR.NUM_QUERIES = 100
    return cfg


@pytest.mark.golden
@pytest.mark.parametrize("name", DETECTORS)
def test_outputs_and_losses_of_single_images_are_detrexs(name: str, tmp_path: Path) -> None:
    expected = golden.load(f"detrex_{name}")
    model = golden.fill(model_of(f"detrex/{name}"), expected, tmp_path / "detrex.pth")
    golden.compare_single_images(model, expected, proposals="_interm")
    names = foreign.as_detrex(model.state_dict())  # so those that the tests write are its own
    assert names.keys() == expected.state_shapes.keys()
    assert read_class_names(str(tmp_path / "detrex.pth")) == COCO_NAMES


@pytest.mark.golden
@pytest.mark.parametrize(
    ("name", "wrong", "said"),
    [
        ("dino_r50_4scale", "dino_r50_4scale", "are one parameter here and two in the file"),
        ("dino_r50_4scale", "detrex/dino_r50_4scale 10", r"temperature and offset \(10.0, -0.5\) .*\(10000.0, -0.5\)"),
        ("conditional_detr_r50", "conditional_detr_r50", "eps of 1e-05 here, 0.001 there"),
        ("dab_detr_r50", "detrex/dn_detr_r50", "does not fit DNDETR as configured"),
        ("dab_detr_r50", "detrex/dab_detr_r50_dc5", "stride 16 here, 32 there"),
    ],
)
def test_another_config_file_is_refused_with_the_name_of_the_right_one(
    name: str, wrong: str, said: str, tmp_path: Path
) -> None:
    path = golden.released_file(golden.load(f"detrex_{name}"), tmp_path / "detrex.pth")
    wrong, _, temperature = wrong.partition(" ")
    model = model_of(wrong, *(["MODEL.DETR.SPATIAL_ENCODING.TEMPERATURE", temperature] if temperature else []))
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(ValueError, match=rf"detrex\.pth .*{said}.*configs/detrex/{name}\.yaml"):
        DETRCheckpointer(model).load(str(path))
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize("path", sorted((CONFIGS / "detrex").glob("*.yaml")), ids=lambda p: p.stem)
def test_every_config_file_is_filled_by_its_weights_which_name_it(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if "swin" in path.stem:  # Detectron2's asks for the numbers of its drop path
        monkeypatch.setattr(torch, "linspace", partial(torch.linspace, device="cpu"))
    with torch.device("meta"):
        model = model_of(f"detrex/{path.stem}", "MODEL.DEVICE", "meta")
    name = config_file(model.state_dict(), dilated="dc5" in path.stem, folder="detrex/")
    assert name == f"configs/detrex/{path.stem.removesuffix('_24ep')}.yaml"
    numbered = foreign.numbered(model)
    there = foreign.as_detrex(numbered, dilated="dc5" in path.stem)
    assert recognise(there) is not None and recognise(there).name == "detrex" and not differences(there, model)
    foreign.assert_numbered(convert_detrex(there), numbered)


def test_averaged_weights_and_old_names(tmp_path: Path) -> None:
    model = model_of("detrex/dab_detr_r50", "MODEL.DETR.NUM_QUERIES", "7")
    state = {k: v + 1 for k, v in model.state_dict().items() if "transformer.decoder.bbox_embed" not in k}
    layer = "transformer.encoder.layers.0."
    marks = {layer + "ffns.0.layers.1.bias": state.pop(layer + "linear2.bias")}
    torch.save({"model": {}, "ema_state": state | marks, "iteration": 9}, tmp_path / "ema.pth")
    with pytest.raises(ValueError, match="holds no weights"):
        DETRCheckpointer(model).load(str(tmp_path / "ema.pth"))
    torch.save({"model": {"x": torch.zeros(1)}, "ema_state": state | marks}, tmp_path / "ema.pth")
    DETRCheckpointer(model, averaged=True, whole=True).load(str(tmp_path / "ema.pth"))
    assert torch.equal(model.refpoint_embed.weight, state["refpoint_embed.weight"])
    assert torch.equal(model.transformer.decoder.bbox_embed.layers[0].bias, state["bbox_embed.layers.0.bias"])


def test_names_that_only_some_detectors_have() -> None:
    one = torch.ones(3)
    state = {
        "transformer.level_embeds": one,
        "neck.convs.0.conv.bias": one * 2,
        "neck.convs.1.norm.bias": one * 3,
        "neck.extra_convs.0.conv.bias": one * 4,
        "neck.extra_convs.1.norm.bias": one * 5,
        "query_embedding.weight": one,
        "label_encoder.weight": one,
        "transformer.enc_outpout_norm.bias": one,
        "transformer.decoder.layers.0.attentions.0.attn.in_proj_bias": one,
        "transformer.decoder.layers.0.attentions.1.output_proj.bias": one,
        "transformer.decoder.layers.0.norms.0.bias": one * 6,
        "transformer.decoder.layers.0.norms.1.bias": one * 7,
        "transformer.decoder.layers.0.norms.2.bias": one * 8,
        "class_embed.1.bias": torch.tensor([5.0, 6.0, 7.0]),
        "backbone.body.layer1.0.bn1.bias": one,
        "backbone.body.layer1.0.bn1.num_batches_tracked": one,
        "criterion.empty_weight": one,
    }
    converted = convert_detrex(state)
    places = ((0, 0), (1, 1), (2, 0), (3, 1))
    assert [converted[f"input_proj.{i}.{j}.bias"][0].item() for i, j in places] == [2, 3, 4, 5]
    layer = "transformer.decoder.layers.0."
    assert [converted[f"{layer}norm{i}.bias"][0].item() for i in (1, 2, 3)] == [7, 6, 8]  # norm1 after cross-attention
    # A two-stage Deformable DETR's head for proposals: the first row says "object", here the last.
    assert converted["class_embed.1.bias"].tolist() == [-20, 6, 7, 5]
    rest = {"transformer.level_embed", "query_embed.weight", "label_enc.weight", "transformer.enc_output_norm.bias"}
    rest |= {layer + "self_attn.in_proj_bias", layer + "cross_attn.output_proj.bias", "backbone.res2.0.conv1.norm.bias"}
    assert rest <= converted.keys() and len(converted) == 4 + 3 + 1 + len(rest)
