"""DETR: End-to-End Object Detection with Transformers (arXiv 2005.12872).

- An encoder over the tokens of one feature map, a decoder over learned object queries, both plain transformers.
- Spatial encodings are added to queries and keys at every attention, not to values (section A.3).
- All queries are decoded in parallel; every decoder layer predicts a set with the same heads.
- Sets are compared by bipartite matching: no anchors, no NMS.

Parameter names are the release's. Shapes: B images, Q queries, D channels, N decoder layers, K logits
(classes and no-object), S tokens of a feature map of H x W.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from detectron2.config import CfgNode, configurable
from detectron2.modeling import META_ARCH_REGISTRY
from detectron2.modeling.backbone import Backbone
from detectron2.structures import ImageList
from torch import Tensor, nn
from typing_extensions import Unpack

from detr_family.layers.fused import feed_forward
from detr_family.layers.mlp import MLP
from detr_family.layers.position_encoding import LearnedPositionEncoding
from detr_family.modeling.criterion import SoftmaxClassLoss
from detr_family.modeling.matcher import softmax_class_cost
from detr_family.modeling.postprocessing import best_class_per_query
from detr_family.modeling.set_detector import (
    CommonArguments,
    SetDetector,
    at_least_one,
    common_arguments,
    sine_encoding,
)
from detr_family.modeling.structures import SetPrediction, Targets
from detr_family.modeling.transformer import (
    TransformerArguments,
    depths_and_layer,
    transformer_arguments,
    xavier_matrices,
)


@META_ARCH_REGISTRY.register()
class DETR(SetDetector):
    """The detector of figure 2: backbone, transformer, prediction heads.

    Args:
        transformer: see `Transformer`.
        num_queries: Q, the size of the predicted set.
        **common: see `CommonArguments`.
    """

    @configurable
    def __init__(
        self,
        *,
        transformer: Transformer,
        num_queries: int,
        **common: Unpack[CommonArguments],
    ) -> None:
        super().__init__(select=best_class_per_query, **common)
        dim = transformer.dim
        self.transformer = transformer
        self.feature, self.input_proj = coarsest_map(self.backbone, dim)
        self.query_embed = nn.Embedding(at_least_one(num_queries), dim)  # the object queries
        self.class_embed = nn.Linear(dim, self.num_classes + 1)
        self.bbox_embed = MLP(dim, dim, 4, num_layers=3)
        self.finish(DETR)

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        """The arguments of `__init__`, from Detectron2's configuration."""
        detr = cfg.MODEL.DETR
        encoding = detr.SPATIAL_ENCODING
        position_encoding: nn.Module
        if encoding.TYPE == "sine":
            position_encoding = sine_encoding(cfg)
        elif encoding.TYPE == "learned":
            position_encoding = LearnedPositionEncoding(detr.HIDDEN_DIM, size=encoding.LEARNED_SIZE)
        else:
            raise ValueError(f"MODEL.DETR.SPATIAL_ENCODING.TYPE is {encoding.TYPE!r}; it may be 'sine' or 'learned'")
        return {
            **common_arguments(
                cfg,
                position_encoding=position_encoding,
                class_cost=softmax_class_cost,
                class_loss=SoftmaxClassLoss(detr.NO_OBJECT_WEIGHT),
            ),
            "transformer": Transformer(
                **transformer_arguments(cfg),
                pre_norm=detr.PRE_NORM,
                encoder_position=encoding.ENCODER,
                decoder_position=encoding.DECODER,
                query_position=detr.QUERY_ENCODING,
            ),
            "num_queries": detr.NUM_QUERIES,
        }

    def predict(self, images: ImageList, targets: Targets | None = None) -> SetPrediction:
        """Predict a set of Q boxes per image and decoder layer.

        Returns:
            SetPrediction with `layer_logits` (N, B, Q, K), no-object last, and `layer_boxes` (N, B, Q, 4).
        """
        decoded = self.transformer(**map_tokens(self, images), queries=self.query_embed.weight)  # N x B x Q x D
        return SetPrediction(
            layer_logits=self.class_embed(decoded), layer_boxes=self.bbox_embed(decoded).float().sigmoid()
        )


def coarsest_map(backbone: Backbone, dim: int) -> tuple[str, nn.Conv2d]:
    """The name of the backbone's coarsest feature map, and the projection of its channels to D."""
    shapes = backbone.output_shape()
    name = list(shapes)[-1]
    return name, nn.Conv2d(shapes[name].channels, dim, kernel_size=1)


def map_tokens(detector: Any, images: ImageList) -> dict[str, Tensor | None]:
    """What a transformer on one feature map reads of the images.

    Args:
        detector: with the feature map `feature` and its projection `input_proj`, see `coarsest_map`.
        images: from `preprocess_image`.

    Returns:
        `tokens` (B, S, D), their spatial encoding `position` (B, S, D), and `padding` (B, S) bool, True = padding, or
        None where nothing is padded.
    """
    feature = detector.backbone(images.tensor)[detector.feature]  # B x C x H x W
    mask = detector.level_mask(detector.padding_mask(images), feature)  # B x H x W
    return {
        "tokens": detector.input_proj(feature).flatten(2).transpose(1, 2),
        "position": detector.position_encoding(mask).flatten(1, 2).to(images.tensor.dtype),
        "padding": mask.flatten(1) if detector.has_padding(images) else None,
    }


POSITIONS = ("attention", "input", "none")


class Transformer(nn.Module):
    """Encoder and decoder (section 3.2, figure 10).

    Args:
        pre_norm: normalise before each sublayer in place of after it.
        encoder_position: where the spatial encoding enters the encoder: "attention" (queries and keys of every
            layer), "input" (added once to the tokens) or "none".
        decoder_position: where it enters the decoder: "attention" (keys of every cross-attention), "input"
            (added once to the encoder's output) or "none".
        query_position: where the object queries enter: "attention" (queries and keys of every layer, the
            content starts from zero) or "input" (they are the content that the first layer starts from).
        **sizes: see `TransformerArguments`.

    Raises:
        ValueError: a setting that is not one of the above.
    """

    def __init__(
        self,
        *,
        pre_norm: bool,
        encoder_position: str,
        decoder_position: str,
        query_position: str,
        **sizes: Unpack[TransformerArguments],
    ) -> None:
        super().__init__()
        encoder_layers, decoder_layers, layer = depths_and_layer(**sizes)
        for key, value, allowed in (
            ("SPATIAL_ENCODING.ENCODER", encoder_position, POSITIONS),
            ("SPATIAL_ENCODING.DECODER", decoder_position, POSITIONS),
            ("QUERY_ENCODING", query_position, POSITIONS[:2]),
        ):
            if value not in allowed:
                raise ValueError(f"MODEL.DETR.{key} is {value!r}; it may be one of {', '.join(allowed)}")
        self.dim = layer["dim"]
        self.encoder_position = encoder_position
        self.decoder_position = decoder_position
        self.query_position = query_position
        self.encoder = Encoder(
            [EncoderLayer(**layer, pre_norm=pre_norm, activation=nn.ReLU()) for _ in range(encoder_layers)],
            norm=nn.LayerNorm(self.dim) if pre_norm else None,
        )
        self.decoder = Decoder(
            [DecoderLayer(**layer, pre_norm=pre_norm) for _ in range(decoder_layers)], norm=nn.LayerNorm(self.dim)
        )
        xavier_matrices(self)

    def forward(self, tokens: Tensor, *, position: Tensor, padding: Tensor | None, queries: Tensor) -> Tensor:
        """Decode the object queries.

        Args:
            tokens: (B, S, D).
            position: (B, S, D) spatial encoding of the tokens.
            padding: (B, S) bool, True = padding; None where nothing is padded.
            queries: (Q, D) object queries.

        Returns:
            (N, B, Q, D), the output of every decoder layer, normalised.
        """
        if self.encoder_position == "input":
            tokens = tokens + position
        at_encoder = position if self.encoder_position == "attention" else None
        memory = self.encoder(tokens, position=at_encoder, padding=padding)

        if self.decoder_position == "input":
            memory = memory + position
        at_decoder = position if self.decoder_position == "attention" else None

        queries = queries.expand(tokens.shape[0], -1, -1)  # B x Q x D
        if self.query_position == "input":
            content, at_queries = queries, None
        else:
            content, at_queries = torch.zeros_like(queries), queries
        return self.decoder(content, memory, query_position=at_queries, memory_position=at_decoder, padding=padding)


def with_position(x: Tensor, position: Tensor | None) -> Tensor:
    """`x` with its encoding added, where there is one."""
    return x if position is None else x + position


class Encoder(nn.Module):
    """A stack of `EncoderLayer`.

    Args:
        layers: the layers, first to last.
        norm: applied to the result; the pre-norm variant needs it.
    """

    def __init__(self, layers: Sequence[EncoderLayer], norm: nn.LayerNorm | None) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.norm = norm

    def forward(self, tokens: Tensor, *, position: Tensor | None, padding: Tensor | None) -> Tensor:
        """(B, S, D) tokens, their encoding and (B, S) padding mask -> (B, S, D) memory."""
        for layer in self.layers:
            tokens = layer(tokens, position=position, padding=padding)
        return tokens if self.norm is None else self.norm(tokens)


class EncoderLayer(nn.Module):
    """Self-attention and a feed-forward network, each with a residual connection.

    Args:
        dim: D.
        num_heads: attention heads.
        feedforward_dim: width of the hidden layer.
        dropout: probability in both sublayers and in the attention weights.
        pre_norm: normalise before each sublayer in place of after it.
        activation: between the two linear layers; ReLU in DETR.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        feedforward_dim: int,
        dropout: float,
        *,
        pre_norm: bool,
        activation: nn.Module,
    ) -> None:
        super().__init__()
        self.pre_norm = pre_norm
        self.self_attn = nn.MultiheadAttention(dim, num_heads, dropout=dropout, batch_first=True)
        self.linear1 = nn.Linear(dim, feedforward_dim)
        self.linear2 = nn.Linear(feedforward_dim, dim)
        self.norm1 = nn.LayerNorm(dim)
        self.norm2 = nn.LayerNorm(dim)
        self.dropout = nn.Dropout(dropout)
        self.activation = activation

    def forward(self, tokens: Tensor, *, position: Tensor | None, padding: Tensor | None) -> Tensor:
        """(B, S, D), encoding (B, S, D) and padding mask (B, S) -> (B, S, D)."""
        if self.pre_norm:
            tokens = tokens + self.dropout(self.attend(self.norm1(tokens), position, padding))
            return tokens + self.dropout(self.feed_forward(self.norm2(tokens)))
        tokens = self.norm1(tokens + self.dropout(self.attend(tokens, position, padding)))
        return self.norm2(tokens + self.dropout(self.feed_forward(tokens)))

    def attend(self, tokens: Tensor, position: Tensor | None, padding: Tensor | None) -> Tensor:
        """Self-attention; the encoding goes to queries and keys only."""
        q = k = with_position(tokens, position)
        return self.self_attn(q, k, tokens, key_padding_mask=padding, need_weights=False)[0]

    def feed_forward(self, tokens: Tensor) -> Tensor:
        """The two linear layers with activation and dropout between them."""
        return feed_forward(tokens, self.linear1, self.activation, self.dropout, self.linear2)


class Decoder(nn.Module):
    """A stack of `DecoderLayer` whose every output is returned, normalised by one shared norm.

    Args:
        layers: the layers, first to last.
        norm: shared by the outputs of all layers, as auxiliary losses need it (section 3.2).
    """

    def __init__(self, layers: Sequence[DecoderLayer], norm: nn.LayerNorm) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.norm = norm

    def forward(
        self,
        content: Tensor,
        memory: Tensor,
        *,
        query_position: Tensor | None,
        memory_position: Tensor | None,
        padding: Tensor | None,
    ) -> Tensor:
        """(B, Q, D) content and (B, S, D) memory with their encodings -> (N, B, Q, D)."""
        outputs = []
        for layer in self.layers:
            content = layer(
                content,
                memory,
                query_position=query_position,
                memory_position=memory_position,
                padding=padding,
            )
            outputs.append(self.norm(content))
        return torch.stack(outputs)


class DecoderLayer(nn.Module):
    """Self-attention of the queries, cross-attention to the memory, a feed-forward network.

    Args:
        dim: D.
        num_heads: attention heads.
        feedforward_dim: width of the hidden layer.
        dropout: probability in the three sublayers and in the attention weights.
        pre_norm: normalise before each sublayer in place of after it.
    """

    def __init__(self, dim: int, num_heads: int, feedforward_dim: int, dropout: float, pre_norm: bool) -> None:
        super().__init__()
        self.pre_norm = pre_norm
        self.self_attn = nn.MultiheadAttention(dim, num_heads, dropout=dropout, batch_first=True)
        self.multihead_attn = nn.MultiheadAttention(dim, num_heads, dropout=dropout, batch_first=True)
        self.linear1 = nn.Linear(dim, feedforward_dim)
        self.linear2 = nn.Linear(feedforward_dim, dim)
        self.norm1 = nn.LayerNorm(dim)
        self.norm2 = nn.LayerNorm(dim)
        self.norm3 = nn.LayerNorm(dim)
        self.dropout = nn.Dropout(dropout)

    def forward(
        self,
        content: Tensor,
        memory: Tensor,
        *,
        query_position: Tensor | None,
        memory_position: Tensor | None,
        padding: Tensor | None,
    ) -> Tensor:
        """(B, Q, D) content, (B, S, D) memory, their encodings and the memory's padding (B, S) -> (B, Q, D)."""
        if self.pre_norm:
            content = content + self.dropout(self.attend(self.norm1(content), query_position))
            content = content + self.dropout(
                self.look(self.norm2(content), memory, query_position, memory_position, padding)
            )
            return content + self.dropout(self.feed_forward(self.norm3(content)))
        content = self.norm1(content + self.dropout(self.attend(content, query_position)))
        content = self.norm2(
            content + self.dropout(self.look(content, memory, query_position, memory_position, padding))
        )
        return self.norm3(content + self.dropout(self.feed_forward(content)))

    def attend(self, content: Tensor, position: Tensor | None) -> Tensor:
        """Self-attention of the queries."""
        q = k = with_position(content, position)
        return self.self_attn(q, k, content, need_weights=False)[0]

    def look(
        self,
        content: Tensor,
        memory: Tensor,
        query_position: Tensor | None,
        memory_position: Tensor | None,
        padding: Tensor | None,
    ) -> Tensor:
        """Cross-attention to the unpadded tokens of the memory."""
        return self.multihead_attn(
            with_position(content, query_position),
            with_position(memory, memory_position),
            memory,
            key_padding_mask=padding,
            need_weights=False,
        )[0]

    def feed_forward(self, content: Tensor) -> Tensor:
        """The two linear layers with ReLU and dropout between them."""
        return feed_forward(content, self.linear1, F.relu, self.dropout, self.linear2)
