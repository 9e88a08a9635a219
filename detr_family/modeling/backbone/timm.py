"""Any backbone of the timm package, by its name there, and the plain Vision Transformers among them as a pyramid.

- A hierarchical backbone (ConvNeXt, ResNet, EfficientNet ...) gives its stages, named by their strides.
- A plain Vision Transformer (ViT, DINOv2, DINOv3 ...) has one stride: its last feature map, in its place the simple
  feature pyramid of `detr_family.modeling.backbone.pyramid`.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from typing import Any

from detectron2.layers import ShapeSpec
from detectron2.modeling.backbone import Backbone
from torch import Tensor

# What lets a timm backbone take images of any size: its Vision Transformers know the first, its Swins the second.
_ANY_SIZE: tuple[dict[str, Any], ...] = ({"dynamic_img_size": True}, {"strict_img_size": False}, {})


class TimmBackbone(Backbone):
    """A timm backbone with Detectron2's contract.

    Args:
        name: timm's, with or without the weights' tag: "convnext_tiny.fb_in22k".
        pretrained: load timm's ImageNet weights of that name.
        in_channels: channels of the images.
        out_features: which stages, as "stride8"; of a plain Vision Transformer all of them are its last feature map.
        drop_path_rate: stochastic depth, for those that have it; 0 leaves it out.

    Attributes:
        plain: whether all feature maps have one stride.

    Raises:
        ImportError: timm is not installed.
        FileNotFoundError: the weights cannot be fetched.
        ValueError: a name that timm has not, one without feature maps or without weights, a stage that there is not.
    """

    def __init__(
        self,
        *,
        name: str,
        pretrained: bool,
        in_channels: int,
        out_features: Sequence[str],
        drop_path_rate: float,
    ) -> None:
        super().__init__()
        arguments: dict[str, Any] = {"in_chans": in_channels}
        if drop_path_rate > 0:
            arguments["drop_path_rate"] = drop_path_rate
        net, any_size = _create_for_any_size(name, arguments)
        strides, indices = net.feature_info.reduction(), list(net.feature_info.out_indices)
        self.plain = len(strides) > 1 and len(set(strides)) == 1
        if self.plain:
            out_features, chosen = [f"stride{strides[-1]}"], [indices[-1]]
        else:
            known = {f"stride{stride}": index for stride, index in zip(strides, indices, strict=True)}
            unknown = [feature for feature in out_features if feature not in known]
            if unknown or not out_features:
                raise ValueError(
                    f"MODEL.TIMM.OUT_FEATURES is {list(out_features)}; it must hold some of {', '.join(known)}, the "
                    f"stages of {name}"
                )
            chosen = sorted(known[feature] for feature in out_features)
        if pretrained or chosen != indices:  # what lies beyond the last stage is then left out
            net = _create(name, {**arguments, **any_size, "out_indices": tuple(chosen)}, pretrained)
        self.net = net
        info = net.feature_info
        self._out_features = [f"stride{stride}" for stride in info.reduction()]
        self._out_feature_strides = dict(zip(self._out_features, info.reduction(), strict=True))
        self._out_feature_channels = dict(zip(self._out_features, info.channels(), strict=True))

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """(B, C, H, W) -> a map (B, C', h, w) for each of the out-features."""
        features = {}
        for name, feature in zip(self._out_features, self.net(images), strict=True):
            if feature.shape[1] != self._out_feature_channels[name]:  # timm's Swins have channels last
                feature = feature.permute(0, 3, 1, 2).contiguous()
            features[name] = feature
        return features

    @property
    def size_divisibility(self) -> int:
        """The largest stride: not every timm backbone pads images to its patches itself."""
        return int(max(self._out_feature_strides.values()))

    def output_shape(self) -> dict[str, ShapeSpec]:
        """Channels and stride of each out-feature."""
        return {
            name: ShapeSpec(channels=self._out_feature_channels[name], stride=self._out_feature_strides[name])
            for name in self._out_features
        }


def _create_for_any_size(name: str, arguments: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """A network for images of any size, and the argument that makes it one."""
    for any_size in _ANY_SIZE[:-1]:
        try:
            return _create(name, {**arguments, **any_size}, False), any_size
        except TypeError:  # it does not know this argument
            continue
    return _create(name, arguments, False), _ANY_SIZE[-1]


def _create(name: str, arguments: dict[str, Any], pretrained: bool) -> Any:
    try:
        import timm
    except ImportError as error:
        raise ImportError(
            "MODEL.BACKBONE.NAME build_timm_backbone needs timm, which is not installed: "
            "pip install 'detr_family[timm]'"
        ) from error
    if not timm.is_model(name):
        known = timm.list_models() + timm.list_pretrained()
        close = difflib.get_close_matches(name, known, n=3)
        hint = f"; similar: {', '.join(close)}" if close else ""
        raise ValueError(f"MODEL.TIMM.NAME is {name!r}, which timm {timm.__version__} does not have{hint}")
    try:
        return timm.create_model(name, pretrained=pretrained, features_only=True, **arguments)
    except TypeError:
        raise
    except Exception as error:  # of huggingface_hub, httpx, urllib, torch and timm, without a common class
        reason = (str(error.__cause__ or error) or type(error).__name__).split("\n")[0]
        if "No pretrained weights" in reason or "Invalid pretrained tag" in reason:
            raise ValueError(f"timm has no weights {name!r} ({reason}): correct MODEL.TIMM.NAME") from error
        if not pretrained:
            raise ValueError(f"timm's {name} gives no feature maps for a detector: {reason}") from error
        raise FileNotFoundError(
            f"the ImageNet weights of timm's {name} cannot be fetched ({reason}): run this once where there is a "
            "network (huggingface_hub keeps them, HF_HOME says where), or set MODEL.TIMM.PRETRAINED False and name a "
            "detector's checkpoint in MODEL.WEIGHTS"
        ) from error
