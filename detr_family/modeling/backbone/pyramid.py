"""Plain Vision Transformers for detectors: Detectron2's, and the simple feature pyramid (ViTDet, arXiv 2203.16527).

Needs a Detectron2 that has them (after 0.6), and timm, from which Detectron2 takes the layers of its blocks.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from detectron2.modeling.backbone import Backbone
from detectron2.modeling.backbone.vit import SimpleFeaturePyramid, ViT
from torch import nn

# Width, blocks and heads (arXiv 2010.11929, table 1; T and S: arXiv 2012.12877, table 1).
SIZES = {"T": (192, 12, 3), "S": (384, 12, 6), "B": (768, 12, 12), "L": (1024, 24, 16), "H": (1280, 32, 16)}
SCALES = (4.0, 2.0, 1.0, 0.5)


class Pyramid(SimpleFeaturePyramid):
    """Detectron2's, with the divisibility of images where this package's detectors look for it."""

    @property
    def size_divisibility(self) -> int:
        """The largest stride, of the patches or of the maps."""
        strides = [shape.stride for shape in (*self.net.output_shape().values(), *self.output_shape().values())]
        return int(max(strides))


def simple_feature_pyramid(net: Backbone, *, scales: Sequence[float], channels: int, norm: str) -> Backbone:
    """Feature maps of several strides, each made from the last one of a plain backbone alone (section 3).

    Args:
        net: a backbone with one feature map.
        scales: of the maps against the backbone's, of 4, 2, 1 and 0.5, descending, each half of the one before.
        channels: of every map.
        norm: Detectron2's name of a norm, "LN" as in the paper.

    Returns:
        A backbone with the maps "p3" for stride 8, "p4" for 16 and so on.

    Raises:
        ValueError: scales that cannot be.
    """
    scales = [float(scale) for scale in scales]
    if not any(tuple(scales) == SCALES[i:j] for i in range(4) for j in range(i + 1, 5)):
        raise ValueError(f"MODEL.PYRAMID.SCALES is {scales}; it must be a run of 4.0, 2.0, 1.0, 0.5, in this order")
    (name,) = net.output_shape()
    return Pyramid(net, name, channels, scales, norm=norm)


def vision_transformer(
    *, size: str, in_channels: int, patch_size: int, window_size: int, image_size: int, drop_path_rate: float
) -> Backbone:
    """Detectron2's ViT, as ViTDet uses it: attention in windows but in the last block of each quarter.

    Args:
        size: a name in SIZES.
        in_channels: channels of the images.
        patch_size: pixels.
        window_size: side of the windows, tokens; 0: every block sees the whole image.
        image_size: side of the images that the tables of relative positions are made for, pixels; they are
            interpolated for others.
        drop_path_rate: stochastic depth of the last block, rising linearly from 0.

    Raises:
        ImportError: timm is not installed.
        ValueError: an unknown size.
    """
    if size not in SIZES:
        raise ValueError(f"MODEL.VIT.SIZE is {size!r}; it may be one of {', '.join(SIZES)}")
    width, depth, heads = SIZES[size]
    quarter = depth // 4
    arguments: dict[str, Any] = {
        "img_size": image_size,
        "patch_size": patch_size,
        "in_chans": in_channels,
        "embed_dim": width,
        "depth": depth,
        "num_heads": heads,
        "drop_path_rate": drop_path_rate,
        "norm_layer": partial(nn.LayerNorm, eps=1e-6),
        "use_rel_pos": True,
        "window_size": window_size,
        "window_block_indexes": [i for i in range(depth) if (i + 1) % quarter],
    }
    try:
        return ViT(**arguments)
    except ImportError as error:
        raise ImportError(
            "MODEL.BACKBONE.NAME build_vit_backbone needs timm, which is not installed: pip install 'detr_family[timm]'"
        ) from error
