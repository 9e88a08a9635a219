"""The backbone is torchvision's ResNet, dilation included."""

import pytest
import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_backbone
from torchvision.models import resnet50

from detr_family.checkpoint.releases import resnet_name


@pytest.mark.parametrize("dilated", [False, True])
def test_features_equal_torchvisions(cfg: CfgNode, dilated: bool) -> None:
    cfg.MODEL.BACKBONE.NAME = "build_torchvision_resnet_backbone"
    cfg.MODEL.RESNETS.STRIDE_IN_1X1 = False
    cfg.MODEL.RESNETS.OUT_FEATURES = ["res5"]
    cfg.MODEL.RESNETS.RES5_DILATION = 2 if dilated else 1
    torch.manual_seed(0)
    theirs = resnet50(weights=None, replace_stride_with_dilation=[False, False, dilated]).eval()
    ours = build_backbone(cfg).eval()
    state = {resnet_name(k): v for k, v in theirs.state_dict().items() if not k.startswith("fc.")}
    result = ours.load_state_dict(state, strict=False)
    assert not result.missing_keys and all("num_batches_tracked" in k for k in result.unexpected_keys)

    image = torch.randn(1, 3, 97, 130)
    with torch.no_grad():
        x = theirs.maxpool(theirs.relu(theirs.bn1(theirs.conv1(image))))
        expected = theirs.layer4(theirs.layer3(theirs.layer2(theirs.layer1(x))))
        actual = ours(image)["res5"]
    assert actual.shape[-2:] == ((7, 9) if dilated else (4, 5))
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


def test_stem_and_first_stage_are_frozen(cfg: CfgNode) -> None:
    cfg.MODEL.BACKBONE.NAME = "build_torchvision_resnet_backbone"
    cfg.MODEL.RESNETS.OUT_FEATURES = ["res5"]
    backbone = build_backbone(cfg)
    trained = {k.split(".")[0] for k, p in backbone.named_parameters() if p.requires_grad}
    assert trained == {"res3", "res4", "res5"}
