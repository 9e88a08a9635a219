"""DAB-Deformable-DETR: DAB-DETR's anchors (arXiv 2201.12329) on Deformable DETR's transformer.

What differs from Deformable DETR with refinement:

- A query is a learned anchor box, from which the positional query is made anew for every layer, scaled by a function
  of the content from the second layer on; its learned content is apart from it.
- Learned patterns may be added to the content: every anchor is then decoded with each.

What differs from DAB-DETR: the attention, which samples points, has no use for modulation by width and height.
Parameter names are the release's. Letters as in `projects.deformable.deformable_detr`; P patterns.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from detectron2.config import CfgNode, configurable
from detectron2.modeling import META_ARCH_REGISTRY
from detectron2.structures import ImageList
from torch import Tensor, nn
from typing_extensions import Unpack

from detr_family.layers.boxes import inverse_sigmoid
from detr_family.layers.mlp import MLP
from detr_family.layers.position_encoding import sine_of_coordinates
from detr_family.modeling.dab_detr import EPS
from detr_family.modeling.deformable import (
    DeformableDecoderLayer,
    Levels,
    decoder_layers_of,
    encoder_of,
    init_transformer,
    level_tokens,
)
from detr_family.modeling.postprocessing import best_pairs
from detr_family.modeling.set_detector import CommonArguments, SetDetector
from detr_family.modeling.structures import SetPrediction, Targets
from detr_family.modeling.transformer import TransformerArguments, depths_and_layer, transformer_arguments
from projects.deformable.deformable_detr import (
    check_levels,
    deformable_arguments,
    level_arguments,
    level_projections,
    predict_layers,
    prediction_heads,
)


@META_ARCH_REGISTRY.register()
class DABDeformableDETR(SetDetector):
    """Backbone, transformer, prediction heads.

    Args:
        transformer: see `DABDeformableTransformer`; its decoder refines anchors by the box heads.
        class_embed: class heads, one per decoder layer.
        num_queries: anchors; with P patterns the predicted set has P times as many boxes.
        num_patterns: P; 0 for none.
        ignore_padding: see `LevelProjections`.
        **common: see `CommonArguments`.
    """

    @configurable
    def __init__(
        self,
        *,
        transformer: DABDeformableTransformer,
        class_embed: nn.ModuleList,
        num_queries: int,
        num_patterns: int,
        ignore_padding: bool,
        **common: Unpack[CommonArguments],
    ) -> None:
        super().__init__(select=best_pairs, **common)
        if num_queries < 1 or num_patterns < 0:
            raise ValueError(
                f"MODEL.DETR.NUM_QUERIES {num_queries} must be at least 1, MODEL.DAB.NUM_PATTERNS {num_patterns} "
                "at least 0"
            )
        self.features = list(self.backbone.output_shape())
        self.transformer = transformer
        self.class_embed = class_embed
        self.bbox_embed = transformer.decoder.bbox_embed  # the same modules: the release has both names
        self.input_proj = level_projections(self.backbone, transformer, ignore_padding=ignore_padding)
        self.tgt_embed = nn.Embedding(num_queries, transformer.dim)
        self.refpoint_embed = nn.Embedding(num_queries, 4)  # anchors before the sigmoid
        self.patterns_embed = nn.Embedding(num_patterns, transformer.dim) if num_patterns else None
        self.finish(DABDeformableDETR)

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        """The arguments of `__init__`, from Detectron2's configuration."""
        transformer, class_embed, arguments = dab_arguments(cfg)
        return {
            **arguments,
            "transformer": transformer,
            "class_embed": class_embed,
            "num_queries": cfg.MODEL.DETR.NUM_QUERIES,
            "num_patterns": cfg.MODEL.DAB.NUM_PATTERNS,
        }

    def predict(self, images: ImageList, targets: Targets | None = None) -> SetPrediction:
        """Predict a set of boxes per image and decoder layer, one for every anchor and pattern.

        Returns:
            SetPrediction with `layer_logits` (N, B, P * Q, K) and `layer_boxes` (N, B, P * Q, 4).
        """
        content, anchors = self.tgt_embed.weight, self.refpoint_embed.weight
        if self.patterns_embed is not None:  # the anchors one after another with the first pattern, then the second
            content = (self.patterns_embed.weight[:, None] + content).flatten(0, 1)
            anchors = anchors.repeat(len(self.patterns_embed.weight), 1)
        batch = images.tensor.shape[0]
        decoded, start = self.transformer(
            **level_tokens(self, images),
            content=content.expand(batch, -1, -1),
            anchors=anchors.expand(batch, -1, -1),
            blocked=None,
        )  # N x B x PQ x D and N x B x PQ x 4
        return SetPrediction(*predict_layers(self.class_embed, self.bbox_embed, decoded, start))


def dab_arguments(cfg: CfgNode) -> tuple[DABDeformableTransformer, nn.ModuleList, dict[str, Any]]:
    """The transformer, the class heads, and what the detectors with anchors read alike from a configuration."""
    for key, off in (("FIX_CENTRES", False), ("ANCHOR_SIZE", 0.0)):
        if cfg.MODEL.DAB[key]:
            raise ValueError(f"MODEL.DAB.{key} is nothing that {cfg.MODEL.META_ARCHITECTURE} has: set it to {off}")
    detr, arguments = cfg.MODEL.DETR, deformable_arguments(cfg)
    class_embed, bbox_embed = prediction_heads(
        detr.HIDDEN_DIM, arguments["num_classes"], detr.DEC_LAYERS, refine=True, two_stage=False
    )
    transformer = DABDeformableTransformer(
        **transformer_arguments(cfg),
        **level_arguments(cfg),
        bbox_embed=bbox_embed,
        ignore_padding=cfg.MODEL.DEFORMABLE.IGNORE_PADDING,
    )
    return transformer, class_embed, arguments


class DABDeformableTransformer(nn.Module):
    """Deformable encoder, and decoder with dynamic anchor boxes.

    Args:
        num_levels: L.
        encoder_points: points that a head samples on each level in the encoder.
        decoder_points: the same in the decoder.
        bbox_embed: N box heads, which move the anchors after each layer.
        ignore_padding: encode anchors as they lie in the image. False: as in the releases, as they lie in the
            finest level with its padding.
        **sizes: see `TransformerArguments`.

    Raises:
        ValueError: widths, depths or counts that cannot be.
    """

    def __init__(
        self,
        *,
        num_levels: int,
        encoder_points: int,
        decoder_points: int,
        bbox_embed: nn.ModuleList,
        ignore_padding: bool,
        **sizes: Unpack[TransformerArguments],
    ) -> None:
        super().__init__()
        encoder_layers, decoder_layers, layer = depths_and_layer(**sizes)
        check_levels(num_levels, encoder_points, decoder_points)
        dim = self.dim = layer["dim"]
        self.num_levels = num_levels
        self.level_embed = nn.Parameter(torch.empty(num_levels, dim))
        self.encoder = encoder_of(encoder_layers, num_levels=num_levels, num_points=encoder_points, **layer)
        self.decoder = DABDeformableDecoder(
            decoder_layers_of(decoder_layers, num_levels=num_levels, num_points=decoder_points, **layer),
            dim,
            ignore_padding=ignore_padding,
        )
        init_transformer(self)
        nn.init.normal_(self.level_embed)
        self.decoder.bbox_embed = bbox_embed  # which has starting values of its own

    def forward(
        self,
        tokens: Tensor,
        *,
        position: Tensor,
        levels: Levels,
        content: Tensor,
        anchors: Tensor,
        blocked: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """Encode the tokens, decode the anchors.

        Args:
            tokens: (B, S, D).
            position: (B, S, D) encoding of place and level of the tokens.
            levels: how the tokens lie.
            content: (B, Q, D) initial decoder embeddings.
            anchors: (B, Q, 4) before the sigmoid.
            blocked: (Q, Q) bool, True = this query does not see that one; None where all do.

        Returns:
            as `DABDeformableDecoder`.
        """
        memory = self.encoder(tokens, position=position, levels=levels)
        return self.decoder(content, memory, anchors=anchors, levels=levels, blocked=blocked)


class DABDeformableDecoder(nn.Module):
    """A stack of `DeformableDecoderLayer` around anchors that move from layer to layer.

    Args:
        layers: the layers, first to last.
        dim: D.
        ignore_padding: see `DABDeformableTransformer`.

    Attributes:
        bbox_embed: one box head per layer.
    """

    bbox_embed: nn.ModuleList

    def __init__(self, layers: Sequence[DeformableDecoderLayer], dim: int, *, ignore_padding: bool) -> None:
        super().__init__()
        self.ignore_padding = ignore_padding
        self.layers = nn.ModuleList(layers)
        self.query_scale = MLP(dim, dim, dim, num_layers=2)  # MLP^(csq), DAB-DETR's equation 5
        self.ref_point_head = MLP(2 * dim, dim, dim, num_layers=2)  # MLP of its equation 4

    def forward(
        self, content: Tensor, memory: Tensor, *, anchors: Tensor, levels: Levels, blocked: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Decode.

        Args:
            content: (B, Q, D) initial decoder embeddings.
            memory: (B, S, D).
            anchors: (B, Q, 4) before the sigmoid.
            levels: how the memory's tokens lie.
            blocked: (Q, Q) bool, True = this query does not see that one; None where all do.

        Returns:
            (N, B, Q, D), the output of every layer, and (N, B, Q, 4), the anchors that its boxes are relative to,
            before the sigmoid; those of the first layer have a gradient, the moved ones none.
        """
        dim = memory.shape[-1]
        anchor = anchors.float().sigmoid()
        outputs, starts = [], [inverse_sigmoid(anchor, EPS)]
        first: Any = self.layers[0]
        dtype = first.norm1.weight.dtype
        for i, layer in enumerate(self.layers):
            reference = levels.on_levels(anchor)  # B x Q x L x 4
            place = anchor if self.ignore_padding else reference[:, :, 0]
            encoding = sine_of_coordinates(place, dim // 2, temperature=10000.0)  # B x Q x 2D: y, x, w, h
            position = self.ref_point_head(encoding.to(dtype))
            if i > 0:
                position = position * self.query_scale(content)
            content = layer(
                content, memory, position=position, reference=reference, levels=levels, blocked=blocked
            )
            outputs.append(content)
            if i + 1 < len(self.layers):
                anchor = (self.bbox_embed[i](content).float() + starts[-1]).sigmoid().detach()
                starts.append(inverse_sigmoid(anchor, EPS))
        return torch.stack(outputs), torch.stack(starts)
