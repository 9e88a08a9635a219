"""Small detectors of transformers, as files, and what they compute beside what a detector here does."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import tiny
import torch
from detectron2.config import CfgNode
from safetensors.torch import load_file
from torch import nn

from detr_family.checkpoint.transformers import in_files
from detr_family.modeling.set_detector import SetDetector

WIDTHS = [16, 32, 64, 128]  # of the backbone's stages


def transformers() -> ModuleType:
    """The library; the test is skipped where there is none."""
    module: ModuleType = pytest.importorskip("transformers", reason="the transformers package is not installed")
    return module


def narrow(cfg: CfgNode) -> CfgNode:
    """A narrow ResNet-50, and images that are not normalised."""
    cfg.MODEL.BACKBONE.NAME = "build_torchvision_resnet_backbone"
    cfg.MODEL.RESNETS.OUT_FEATURES = ["res5"]
    cfg.MODEL.RESNETS.STEM_OUT_CHANNELS = 8
    cfg.MODEL.RESNETS.RES2_OUT_CHANNELS = WIDTHS[0]
    cfg.MODEL.RESNETS.WIDTH_PER_GROUP = WIDTHS[0] // 4
    cfg.MODEL.RESNETS.STRIDE_IN_1X1 = False
    cfg.MODEL.PIXEL_MEAN, cfg.MODEL.PIXEL_STD = [0.0, 0.0, 0.0], [255.0, 255.0, 255.0]
    return cfg


def there(family: str, num_labels: int = tiny.NUM_CLASSES, **settings: Any) -> nn.Module:
    """A detector of transformers, with none of its parameters and statistics where they start."""
    library = transformers()
    backbone = library.ResNetConfig(
        embedding_size=8,
        hidden_sizes=WIDTHS,
        depths=[3, 4, 6, 3],
        layer_type="bottleneck",
        out_features=settings.pop("out_features", ["stage4"]),
    )
    config = getattr(library, f"{family}Config")(
        backbone_config=backbone, backbone=None, use_timm_backbone=False, use_pretrained_backbone=False,
        num_queries=7, encoder_layers=1, decoder_layers=2, encoder_attention_heads=2, decoder_attention_heads=2,
        encoder_ffn_dim=24, decoder_ffn_dim=24, num_labels=num_labels,
        dropout=0.0, attention_dropout=0.0, activation_dropout=0.0, **settings,
    )  # fmt: skip
    torch.manual_seed(3)
    model = getattr(library, f"{family}ForObjectDetection")(config).eval()
    return away_from_the_start(model)


def away_from_the_start(model: nn.Module) -> nn.Module:
    """Norms, statistics, biases and heads with values of their own."""
    with torch.no_grad():
        for name, value in model.state_dict().items():
            if value.is_floating_point() and (value.dim() < 2 or "bbox" in name or "class" in name):
                value.add_(0.1 * (torch.rand_like(value) - (0.5 if value.dim() > 1 else 0.0)))
    return model


def compare_outputs(model: SetDetector, other: nn.Module) -> None:
    """Outputs of a batch of two sizes."""
    images = model.preprocess_image(tiny.batch())
    with torch.no_grad():
        prediction = model.eval().predict(images)
        expected = other(pixel_values=images.tensor, pixel_mask=(~model.padding_mask(images)).long())
    assert prediction.logits.std() > 1e-3 and prediction.boxes.std() > 1e-3
    torch.testing.assert_close(expected.logits, prediction.logits, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(expected.pred_boxes, prediction.boxes, rtol=1e-4, atol=1e-4)


def compare(model: SetDetector, other: nn.Module, class_weight: float) -> None:
    """Outputs, and losses of the last decoder layer, of a batch of two sizes."""
    inputs = tiny.batch()
    images, targets = model.preprocess_image(inputs), model.targets(inputs)
    losses = model.train()(inputs)
    counts = targets.counts
    labels = [
        {"class_labels": label, "boxes": box}
        for label, box in zip(targets.labels.split(counts), targets.boxes_cxcywh.split(counts), strict=True)
    ]
    with torch.no_grad():
        prediction = model.eval().predict(images)
        expected = other(pixel_values=images.tensor, pixel_mask=(~model.padding_mask(images)).long(), labels=labels)
    assert prediction.logits.std() > 1e-3 and prediction.boxes.std() > 1e-3
    torch.testing.assert_close(prediction.logits, expected.logits, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(prediction.boxes, expected.pred_boxes, rtol=1e-4, atol=1e-4)
    for term, weight in (("loss_ce", class_weight), ("loss_bbox", 5), ("loss_giou", 2)):
        assert losses[term].item() == pytest.approx(weight * expected.loss_dict[term].item(), rel=1e-4), term


def as_folder(other: Any, folder: Path) -> Path:
    other.save_pretrained(folder)
    return folder


def as_safetensors(other: Any, folder: Path) -> Path:
    return as_folder(other, folder) / "model.safetensors"


def as_bin(other: Any, folder: Path) -> Path:
    """As transformers 4 wrote."""
    torch.save(load_file(as_safetensors(other, folder)), folder / "pytorch_model.bin")
    return folder / "pytorch_model.bin"


def as_in_memory(other: Any, folder: Path) -> Path:
    torch.save(other.state_dict(), folder / "state.pth")
    return folder / "state.pth"


def as_with_timm(other: Any, folder: Path) -> Path:
    """The names that a backbone of timm has."""
    extra = "_backbone." if "DabDetr" in type(other).__name__ else ""
    state = {}
    for name, value in load_file(as_safetensors(other, folder)).items():
        name = in_files(name)
        state[name.replace("conv_encoder.model.", "conv_encoder.model." + extra)] = value
    assert f"model.backbone.conv_encoder.model.{extra}layer1.0.conv1.weight" in state
    torch.save(state, folder / "timm.bin")
    return folder / "timm.bin"
