"""Deformable DETR, refined and with two stages too, against the `transformers` package."""

from __future__ import annotations

import pytest
import tiny
import torch
from detectron2.modeling import build_model
from test_transformers_parity import COMMON, WIDTHS, Rules, packed, their_value, transformers
from torch import nn

import projects.deformable  # noqa: F401
from detr_family.modeling.set_detector import SetDetector
from projects.deformable.deformable_detr import TwoStagePrediction

pytestmark = pytest.mark.parity

ATTENTION = r"(sampling_offsets|attention_weights|value_proj|output_proj)"
LAYER = r"model\.decoder\.layers\.(\d)\."
RULES: Rules = [
    (r"model", "transformer"),  # the level embedding
    (r"model\.(reference_points|enc_output\w*|pos_trans\w*)", r"transformer.\1"),
    (r"model\.input_proj\.(\d\.\d)", r"input_proj.\1"),
    (r"model\.encoder\.layers\.(\d)\.self_attn\." + ATTENTION, r"transformer.encoder.layers.\1.self_attn.\2"),
    (LAYER + r"encoder_attn\." + ATTENTION, r"transformer.decoder.layers.\1.cross_attn.\2"),
    (LAYER + r"self_attn\.([qkv])_proj", lambda m: packed(m, "decoder", "self_attn")),
    (LAYER + r"self_attn\.o_proj", r"transformer.decoder.layers.\1.self_attn.out_proj"),
    (LAYER + r"self_attn_layer_norm", r"transformer.decoder.layers.\1.norm2"),
    (LAYER + r"encoder_attn_layer_norm", r"transformer.decoder.layers.\1.norm1"),
    (r"model\.decoder\.class_embed\.(\d)", r"transformer.decoder.class_embed.\1"),
    (r"class_embed\.(\d)", r"class_embed.\1"),
    (r"bbox_embed\.(.*)", r"bbox_embed.\1"),
]


def ours(refine: bool, two_stage: bool) -> SetDetector:
    """A small detector on a narrow ResNet-50; of the papers' width, since transformers always norms in 32 groups."""
    cfg = tiny.cfg_of("DETR")
    cfg.MODEL.META_ARCHITECTURE = "DeformableDETR"
    cfg.MODEL.DETR.HIDDEN_DIM = 256
    cfg.MODEL.DETR.COST.CLASS = cfg.MODEL.DETR.LOSS.CLASS = 2.0
    cfg.MODEL.DEFORMABLE.ENC_POINTS, cfg.MODEL.DEFORMABLE.DEC_POINTS = 3, 2
    cfg.MODEL.DEFORMABLE.BOX_REFINEMENT, cfg.MODEL.DEFORMABLE.TWO_STAGE = refine, two_stage
    cfg.MODEL.BACKBONE.NAME = "build_torchvision_resnet_backbone"
    cfg.MODEL.RESNETS.OUT_FEATURES = ["res3", "res4", "res5"]
    cfg.MODEL.RESNETS.STEM_OUT_CHANNELS = 8
    cfg.MODEL.RESNETS.RES2_OUT_CHANNELS = WIDTHS[0]
    cfg.MODEL.RESNETS.WIDTH_PER_GROUP = WIDTHS[0] // 4
    cfg.MODEL.RESNETS.STRIDE_IN_1X1 = False
    cfg.MODEL.PIXEL_MEAN, cfg.MODEL.PIXEL_STD = [0.0, 0.0, 0.0], [255.0, 255.0, 255.0]
    torch.manual_seed(2)
    model = build_model(cfg)
    with torch.no_grad():
        for key, value in model.state_dict().items():
            if "norm" in key or key.endswith("bias") or "bbox_embed" in key or "class_embed" in key:
                value.add_(0.1 * torch.rand_like(value))
            if "sampling_offsets.weight" in key or "attention_weights.weight" in key:
                value.normal_(std=0.05)
        if refine and not two_stage:  # transformers ties the class heads here, which the release does not
            model.class_embed[0].load_state_dict(model.class_embed[1].state_dict())
    return model


def theirs(model: SetDetector, refine: bool, two_stage: bool) -> nn.Module:
    """The same model built by transformers, with our weights under its names."""
    backbone = transformers.ResNetConfig(
        embedding_size=8,
        hidden_sizes=WIDTHS,
        depths=[3, 4, 6, 3],
        layer_type="bottleneck",
        out_features=["stage2", "stage3", "stage4"],
    )
    config = transformers.DeformableDetrConfig(
        backbone_config=backbone, backbone=None, use_timm_backbone=False, use_pretrained_backbone=False,
        num_queries=7, two_stage_num_proposals=7, d_model=256, encoder_layers=1, decoder_layers=2,
        encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=24, decoder_ffn_dim=24,
        encoder_n_points=3, decoder_n_points=2, num_feature_levels=4, num_labels=tiny.NUM_CLASSES,
        with_box_refine=refine, two_stage=two_stage, auxiliary_loss=True,
        dropout=0.0, attention_dropout=0.0, activation_dropout=0.0,
    )  # fmt: skip
    other = transformers.DeformableDetrForObjectDetection(config)
    state = model.state_dict()
    filled = {name: their_value(name, state, RULES + COMMON) for name in other.state_dict()}
    left = [k for k, v in filled.items() if v is None and not k.endswith("num_batches_tracked")]
    assert not left, left
    if two_stage:  # its head for proposals has a row less, and the first in the place of our last
        for name in [name for name in filled if "class_embed.2" in name]:
            filled[name] = filled[name][[3, 1, 2]]
    other.load_state_dict({k: v for k, v in filled.items() if v is not None}, strict=False)
    return other.eval()


@pytest.mark.parametrize(("refine", "two_stage"), [(False, False), (True, False), (True, True)])
def test_outputs_and_losses_equal_those_of_transformers(refine: bool, two_stage: bool) -> None:
    model, inputs = ours(refine, two_stage), tiny.batch()
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
    with torch.no_grad():
        expected = theirs(model, refine, two_stage)(
            pixel_values=images.tensor, pixel_mask=(~model.padding_mask(images)).long(), labels=labels
        )
    torch.testing.assert_close(prediction.logits, expected.logits, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(prediction.boxes, expected.pred_boxes, rtol=1e-4, atol=2e-5)
    first, second = expected.auxiliary_outputs[0], prediction.aux[0]
    torch.testing.assert_close(second.logits, first["logits"], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(second.boxes, first["pred_boxes"], rtol=1e-4, atol=2e-5)
    for suffix in ("", "_0"):
        for term, weight in (("loss_ce", 2), ("loss_bbox", 5), ("loss_giou", 2)):
            value = weight * expected.loss_dict[term + suffix].item()
            assert losses[term + suffix].item() == pytest.approx(value, rel=1e-4), term + suffix
    assert isinstance(prediction, TwoStagePrediction) == two_stage
    if two_stage:
        proposals = prediction.proposals
        torch.testing.assert_close(proposals.logits[..., 3], expected.enc_outputs_class[..., 0], rtol=1e-4, atol=1e-4)
        boxes = expected.enc_outputs_coord_logits.sigmoid()
        torch.testing.assert_close(proposals.boxes, boxes, rtol=1e-4, atol=2e-5)
        if "loss_bbox_enc" in expected.loss_dict:
            for term, weight in (("loss_bbox_enc", 5), ("loss_giou_enc", 2)):
                assert losses[term].item() == pytest.approx(weight * expected.loss_dict[term].item(), rel=1e-3), term
