"""DETR, Conditional DETR and DAB-DETR against an implementation that anybody can install: `transformers`.

    pip install -e '.[parity]' && pytest -m parity

With its own auxiliary losses on, transformers feeds DETR's normalised content to the next layer, which neither
the paper's release nor this project does; so they are off there, and an earlier layer's set is compared with a
model whose decoder ends at that layer.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import tiny
import torch
from detectron2.modeling import build_model
from torch import Tensor

from detr_family.modeling.set_detector import SetDetector

transformers = pytest.importorskip("transformers", reason="the transformers package is not installed")

pytestmark = pytest.mark.parity

WIDTHS = [16, 32, 64, 128]  # of the backbone's stages

# Their name -> ours, first match counts; `#0` takes the first third of what is packed in one tensor here.
Rules = list[tuple[str, str | Callable[[re.Match[str]], str]]]
LAYER = r"model\.(encoder|decoder)\.layers\.(\d)\."
COMMON: Rules = [
    (r".*embedder\.embedder\.convolution", "backbone.stem.conv1"),
    (r".*embedder\.embedder\.normalization", "backbone.stem.conv1.norm"),
    (r".*stages\.(\d)\.layers\.(\d)\.shortcut\.convolution", lambda m: f"backbone.res{int(m[1]) + 2}.{m[2]}.shortcut"),
    (
        r".*stages\.(\d)\.layers\.(\d)\.shortcut\.normalization",
        lambda m: f"backbone.res{int(m[1]) + 2}.{m[2]}.shortcut.norm",
    ),
    (
        r".*stages\.(\d)\.layers\.(\d)\.layer\.(\d)\.(convolution|normalization)",
        lambda m: (
            f"backbone.res{int(m[1]) + 2}.{m[2]}.conv{int(m[3]) + 1}" + (".norm" if m[4] == "normalization" else "")
        ),
    ),
    (r"model\.encoder\.layers\.(\d)\.self_attn\.([qkv])_proj", lambda m: packed(m, "encoder", "self_attn")),
    (r"model\.encoder\.layers\.(\d)\.self_attn\.o\w*_proj", r"transformer.encoder.layers.\1.self_attn.out_proj"),
    (r"model\.encoder\.layers\.(\d)\.final_layer_norm", r"transformer.encoder.layers.\1.norm2"),
    (LAYER + r"(?:mlp\.)?final_layer_norm", r"transformer.\1.layers.\2.norm3"),
    (LAYER + r"(?:mlp\.)?fc(\d)", r"transformer.\1.layers.\2.linear\3"),
    (LAYER + r"(?:mlp\.)?activation_fn", r"transformer.\1.layers.\2.activation"),
    (LAYER + r"(?:self_attn\.)?self_attn_layer_norm", r"transformer.\1.layers.\2.norm1"),
    (LAYER + r"(?:cross_attn\.)?(?:cross|encoder)_attn_layer_norm", r"transformer.\1.layers.\2.norm2"),
    (r"model\.decoder\.layernorm", "transformer.decoder.norm"),
    (r"model\.input_projection", "input_proj"),
    (r"model\.query_position_embeddings", "query_embed"),
    (r"model\.query_refpoint_embeddings", "refpoint_embed"),
    (r"class_labels_classifier", "class_embed"),
    (r"bbox_predictor\.(.*)", r"bbox_embed.\1"),
    (r"model\.(encoder|decoder)\.((?:query_scale|ref_\w+_head|bbox_embed)\..*)", r"transformer.\1.\2"),
    (r"class_embed", "class_embed"),
]
DETR_RULES: Rules = [
    (r"model\.decoder\.layers\.(\d)\.self_attn\.([qkv])_proj", lambda m: packed(m, "decoder", "self_attn")),
    (r"model\.decoder\.layers\.(\d)\.encoder_attn\.([qkv])_proj", lambda m: packed(m, "decoder", "multihead_attn")),
    (r"model\.decoder\.layers\.(\d)\.self_attn\.o\w*_proj", r"transformer.decoder.layers.\1.self_attn.out_proj"),
    (
        r"model\.decoder\.layers\.(\d)\.encoder_attn\.o\w*_proj",
        r"transformer.decoder.layers.\1.multihead_attn.out_proj",
    ),
]
DECODER = r"model\.decoder\.layers\.(\d)\."
CONDITIONAL_RULES: Rules = [
    (DECODER + r"self_attn\.([qk])_(content|pos)_proj", r"transformer.decoder.layers.\1.sa_\2\3_proj"),
    (DECODER + r"self_attn\.v_proj", r"transformer.decoder.layers.\1.sa_v_proj"),
    (DECODER + r"self_attn\.o_proj", r"transformer.decoder.layers.\1.self_attn.out_proj"),
    (DECODER + r"encoder_attn\.q_pos_sine_proj", r"transformer.decoder.layers.\1.ca_qpos_sine_proj"),
    (DECODER + r"encoder_attn\.([qk])_(content|pos)_proj", r"transformer.decoder.layers.\1.ca_\2\3_proj"),
    (DECODER + r"encoder_attn\.v_proj", r"transformer.decoder.layers.\1.ca_v_proj"),
    (DECODER + r"encoder_attn\.o_proj", r"transformer.decoder.layers.\1.cross_attn.out_proj"),
]
DAB_RULES: Rules = [
    (
        DECODER + r"(self|cross)_attn\.\2_attn_(query|key)_(content|pos)_proj",
        lambda m: f"transformer.decoder.layers.{m[1]}.{m[2][0]}a_{m[3][0]}{m[4]}_proj",
    ),
    (
        DECODER + r"(self|cross)_attn\.\2_attn_value_proj",
        lambda m: f"transformer.decoder.layers.{m[1]}.{m[2][0]}a_v_proj",
    ),
    (DECODER + r"cross_attn\.cross_attn_query_pos_sine_proj", r"transformer.decoder.layers.\1.ca_qpos_sine_proj"),
    (DECODER + r"(self|cross)_attn\.\2_attn\.output_proj", r"transformer.decoder.layers.\1.\2_attn.out_proj"),
]


def packed(match: re.Match[str], part: str, module: str) -> str:
    return f"transformer.{part}.layers.{match[1]}.{module}.in_proj#{'qkv'.index(match[2])}"


def their_value(name: str, state: dict[str, Tensor], rules: Rules) -> Tensor | None:
    """Our value of their parameter or buffer, None where there is nothing to be had."""
    stem, suffix = name.rsplit(".", 1)
    for pattern, replacement in rules:
        match = re.fullmatch(pattern, stem)
        if match:
            ours = replacement(match) if callable(replacement) else match.expand(replacement)
            if "#" in ours:
                ours, third = ours.split("#")
                return state[f"{ours}_{suffix}"].chunk(3)[int(third)]
            return state.get(f"{ours}.{suffix}")
    return None


def ours(name: str) -> SetDetector:
    """A small detector on a narrow ResNet-50, all parameters and statistics away from their initial values."""
    cfg = tiny.cfg_of(name)
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
        for key, value in model.state_dict().items():
            if "norm" in key or key.endswith("bias") or "bbox_embed" in key:
                value.add_(0.1 * torch.rand_like(value))
    return model


def theirs(model: SetDetector, family: str, rules: Rules, decoder_layers: int, **settings: Any) -> torch.nn.Module:
    """The same model built by transformers, of that many decoder layers, with our weights under its names."""
    backbone = transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=WIDTHS, depths=[3, 4, 6, 3], layer_type="bottleneck", out_features=["stage4"]
    )
    config = getattr(transformers, f"{family}Config")(
        backbone_config=backbone,
        backbone=None,
        use_timm_backbone=False,
        use_pretrained_backbone=False,
        num_queries=7,
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
        **settings,
    )
    other = getattr(transformers, f"{family}ForObjectDetection")(config)
    state = model.state_dict()
    filled = {name: their_value(name, state, rules + COMMON) for name in other.state_dict()}
    left = [k for k, v in filled.items() if v is None and not k.endswith("num_batches_tracked")]
    assert not left, left
    other.load_state_dict({k: v for k, v in filled.items() if v is not None}, strict=False)
    return other.eval()


@pytest.mark.parametrize(
    ("name", "family", "rules", "settings", "class_weight"),
    [
        ("DETR", "Detr", DETR_RULES, {"d_model": 16}, 1.0),
        ("ConditionalDETR", "ConditionalDetr", CONDITIONAL_RULES, {"d_model": 16}, 2.0),
        ("DABDETR", "DabDetr", DAB_RULES, {"hidden_size": 16}, 1.0),
    ],
)
def test_outputs_and_losses_equal_those_of_transformers(
    name: str, family: str, rules: Rules, settings: dict[str, int], class_weight: float
) -> None:
    model, inputs = ours(name), tiny.batch()
    images, targets = model.preprocess_image(inputs), model.targets(inputs)
    losses = model.train()(inputs)
    with torch.no_grad():
        prediction = model.eval().predict(images)
    labels = [
        {"class_labels": label, "boxes": box}
        for label, box in zip(
            targets.labels.split(targets.counts), targets.boxes_cxcywh.split(targets.counts), strict=True
        )
    ]
    for layer, suffix, ours_here in ((1, "_0", prediction.aux[0]), (2, "", prediction)):
        with torch.no_grad():
            expected = theirs(model, family, rules, layer, **settings)(
                pixel_values=images.tensor, pixel_mask=(~model.padding_mask(images)).long(), labels=labels
            )
        torch.testing.assert_close(ours_here.logits, expected.logits, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(ours_here.boxes, expected.pred_boxes, rtol=1e-4, atol=2e-5)
        for term, weight in (("loss_ce", class_weight), ("loss_bbox", 5), ("loss_giou", 2)):
            value = weight * expected.loss_dict[term].item()
            assert losses[term + suffix].item() == pytest.approx(value, rel=1e-4), term + suffix
