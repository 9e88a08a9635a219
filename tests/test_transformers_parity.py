"""DETR against an independent implementation that anybody can install: the `transformers` package.

    pip install -e '.[parity]' && pytest -m parity

transformers normalises the content between decoder layers when its own auxiliary losses are on, which neither
the paper's release nor this project does; so those are off there, and an earlier layer's set is compared with
a model whose decoder ends at that layer.
"""

from __future__ import annotations

import re

import pytest
import tiny
import torch
from detectron2.modeling import build_model
from torch import Tensor

from detr_family.set_detector import SetDetector
from detr_family.structures import Targets

transformers = pytest.importorskip("transformers", reason="the transformers package is not installed")

pytestmark = pytest.mark.parity

WIDTHS = [16, 32, 64, 128]  # of the backbone's stages


def ours() -> SetDetector:
    """A small DETR on a narrow ResNet-50, all parameters and statistics away from their initial values."""
    cfg = tiny.cfg_of("DETR")
    cfg.MODEL.BACKBONE.NAME = "build_torchvision_resnet_backbone"
    cfg.MODEL.RESNETS.OUT_FEATURES = ["res5"]
    cfg.MODEL.RESNETS.STEM_OUT_CHANNELS = 8
    cfg.MODEL.RESNETS.RES2_OUT_CHANNELS = WIDTHS[0]
    cfg.MODEL.RESNETS.WIDTH_PER_GROUP = WIDTHS[0] // 4
    cfg.MODEL.RESNETS.STRIDE_IN_1X1 = False
    cfg.MODEL.PIXEL_MEAN, cfg.MODEL.PIXEL_STD = [0.0, 0.0, 0.0], [255.0, 255.0, 255.0]
    torch.manual_seed(2)
    model = build_model(cfg)
    with torch.no_grad():
        for name, value in model.state_dict().items():
            if "norm" in name or name.endswith("bias"):
                value.add_(0.1 * torch.rand_like(value))
    return model


def theirs(model: SetDetector, decoder_layers: int) -> torch.nn.Module:
    """The same model built by transformers, of that many decoder layers, with our weights under its names."""
    backbone = transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=WIDTHS, depths=[3, 4, 6, 3], layer_type="bottleneck", out_features=["stage4"]
    )
    config = transformers.DetrConfig(
        backbone_config=backbone,
        backbone=None,
        use_timm_backbone=False,
        use_pretrained_backbone=False,
        num_queries=7,
        d_model=16,
        encoder_layers=1,
        decoder_layers=decoder_layers,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=24,
        decoder_ffn_dim=24,
        num_labels=tiny.NUM_CLASSES,
        dropout=0.0,
        attention_dropout=0.0,
        activation_dropout=0.0,
        auxiliary_loss=False,
    )
    other = transformers.DetrForObjectDetection(config)
    state = model.state_dict()
    filled = {name: their_value(name, state) for name in other.state_dict()}
    other.load_state_dict({k: v for k, v in filled.items() if v is not None})
    left = [k for k, v in filled.items() if v is None and not k.endswith("num_batches_tracked")]
    assert not left, left
    return other


def their_value(name: str, state: dict[str, Tensor]) -> Tensor | None:
    """Our value of their parameter `name`."""
    suffix = name.rsplit(".", 1)[-1]
    if name.endswith("num_batches_tracked"):
        return None
    if "embedder.embedder" in name:
        return state[f"backbone.stem.conv1.{'norm.' if 'normalization' in name else ''}{suffix}"]
    stage = re.search(r"stages\.(\d)\.layers\.(\d)\.(?:layer\.(\d)|shortcut)", name)
    if stage:
        conv = "shortcut" if stage[3] is None else f"conv{int(stage[3]) + 1}"
        norm = "norm." if "normalization" in name else ""
        return state[f"backbone.res{int(stage[1]) + 2}.{stage[2]}.{conv}.{norm}{suffix}"]
    layer = re.match(r"model\.(encoder|decoder)\.layers\.(\d)\.(.*)", name)
    if layer:
        part, number, rest = layer.groups()
        prefix = f"transformer.{part}.layers.{number}."
        attention = re.match(r"(self_attn|encoder_attn)\.([qkvo])\w*_?proj\.", rest)
        if rest.split(".")[1] == "out_proj":
            attention = re.match(r"(self_attn|encoder_attn)\.(o)ut_proj", rest)
        if attention:
            module = {"self_attn": "self_attn", "encoder_attn": "multihead_attn"}[attention[1]]
            if attention[2] == "o":
                return state[f"{prefix}{module}.out_proj.{suffix}"]
            return state[f"{prefix}{module}.in_proj_{suffix}"].chunk(3)["qkv".index(attention[2])]
        norms = {"self_attn_layer_norm": "norm1", "encoder_attn_layer_norm": "norm2"}
        norms["final_layer_norm"] = "norm2" if part == "encoder" else "norm3"
        linear = re.search(r"fc(\d)", rest)
        return state[f"{prefix}linear{linear[1]}.{suffix}" if linear else f"{prefix}{norms[rest.split('.')[0]]}.{suffix}"]
    plain = {
        "model.query_position_embeddings.weight": "query_embed.weight",
        "model.input_projection": "input_proj",
        "model.decoder.layernorm": "transformer.decoder.norm",
        "class_labels_classifier": "class_embed",
        "bbox_predictor": "bbox_embed",
    }
    for theirs_prefix, ours_prefix in plain.items():
        if name.startswith(theirs_prefix):
            return state[ours_prefix + name[len(theirs_prefix) :]]
    return None


def test_outputs_and_losses_equal_those_of_transformers() -> None:
    model, inputs = ours(), tiny.batch()
    images = model.preprocess_image(inputs)
    targets: Targets = model.targets(inputs)

    model.train()
    losses = model(inputs)
    model.eval()
    with torch.no_grad():
        prediction = model.predict(images)
    labels = [
        {"class_labels": label, "boxes": box}
        for label, box in zip(
            targets.labels.split(targets.counts), targets.boxes_cxcywh.split(targets.counts), strict=True
        )
    ]
    for layer, suffix, ours_here in ((1, "_0", prediction.aux[0]), (2, "", prediction)):
        with torch.no_grad():
            expected = theirs(model, layer).eval()(
                pixel_values=images.tensor, pixel_mask=(~model.padding_mask(images)).long(), labels=labels
            )
        torch.testing.assert_close(ours_here.logits, expected.logits, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(ours_here.boxes, expected.pred_boxes, rtol=1e-4, atol=1e-5)
        for name, weight in (("loss_ce", 1), ("loss_bbox", 5), ("loss_giou", 2)):
            value = weight * expected.loss_dict[name].item()
            assert losses[name + suffix].item() == pytest.approx(value, rel=1e-4), name + suffix
