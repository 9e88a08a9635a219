"""Computing again gives what keeping gives: losses, gradients, random numbers, statistics."""

from __future__ import annotations

import copy

import pytest
import tiny
import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_backbone, build_model
from torch import Tensor, nn

from detr_family.layers.checkpointing import backbone_blocks, checkpoint_activations

PARTS = ("BACKBONE", "ENCODER", "DECODER")


def model_of(name: str, parts: tuple[str, ...]) -> nn.Module:
    cfg = tiny.cfg_of(name)
    cfg.MODEL.DETR.DROPOUT = 0.3
    for part in parts:
        cfg.MODEL.DETR.CHECKPOINT[part] = True
    torch.manual_seed(11)
    return build_model(cfg).train()


def kept_for_backward(model: nn.Module) -> tuple[dict[str, Tensor], int]:
    """Gradients by name, and how many numbers the forward pass kept for the backward pass."""
    kept = 0

    def pack(x: Tensor) -> Tensor:
        nonlocal kept
        kept += x.numel()
        return x

    torch.manual_seed(5)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        loss = sum(model(tiny.batch()).values())
    forward = kept
    loss.backward()
    return {k: p.grad for k, p in model.named_parameters() if p.requires_grad}, forward


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("name", tiny.DETECTORS)
def test_gradients_are_the_same_with_dropout_and_less_is_kept(name: str, part: str) -> None:
    plain, kept = kept_for_backward(model_of(name, ()))
    again, fewer = kept_for_backward(model_of(name, (part,)))
    assert plain.keys() == again.keys()
    for key, gradient in plain.items():
        assert torch.equal(again[key], gradient), key
    # The tiny backbone's blocks are single convolutions, which keep no more than what goes in.
    assert fewer <= kept if part == "BACKBONE" else fewer < kept


def test_buffers_of_the_second_pass_do_not_count() -> None:
    def net() -> nn.Module:
        torch.manual_seed(3)
        return nn.Sequential(nn.Sequential(nn.Conv2d(3, 5, 1), nn.BatchNorm2d(5), nn.ReLU()), nn.Conv2d(5, 2, 1))

    plain, again = net().train(), net().train()
    checkpoint_activations([again[0]])
    for model in (plain, again):
        torch.manual_seed(0)
        model(torch.randn(2, 3, 7, 7)).square().sum().backward()
    for key, value in plain.state_dict().items():
        assert torch.equal(again.state_dict()[key], value), key
    assert plain[0][1].num_batches_tracked == 1


def test_evaluation_and_copies_are_not_disturbed() -> None:
    model = model_of("DETR", PARTS)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.class_embed.bias.add_(1)
        for layer in twin.transformer.encoder.layers:
            layer.linear2.bias.add_(1)
    inputs = tiny.batch()
    a, b = (x.eval().predict(x.preprocess_image(inputs)).logits for x in (model, twin))
    assert not torch.allclose(a, b)  # the copy's layers are its own
    with torch.no_grad():
        plain = model_of("DETR", ()).eval()
        torch.testing.assert_close(plain.predict(plain.preprocess_image(inputs)).logits, a)


@pytest.mark.parametrize("name", ["build_resnet_backbone", "build_resnet_fpn_backbone"])
def test_the_blocks_of_detectron2s_backbones(name: str, cfg: CfgNode) -> None:
    cfg.MODEL.BACKBONE.NAME = name
    features = ["res2", "res3", "res4", "res5"]
    cfg.MODEL.RESNETS.OUT_FEATURES = cfg.MODEL.FPN.IN_FEATURES = features
    assert [type(x).__name__ for x in backbone_blocks(build_backbone(cfg))] == ["BottleneckBlock"] * 16


def test_a_stage_of_lists_is_taken_block_by_block() -> None:
    class Stage(nn.Module):  # as Swin's
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(nn.TransformerEncoderLayer(4, 2, 8) for _ in range(2))
            self.downsample = nn.Linear(4, 4)

    backbone = nn.Module()
    backbone.layers = nn.ModuleList([Stage(), Stage()])
    assert [type(x).__name__ for x in backbone_blocks(backbone)] == ["TransformerEncoderLayer"] * 4
