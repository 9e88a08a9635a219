"""Conditional DETR for Fast Training Convergence (arXiv 2108.06152).

What differs from DETR:

- In cross-attention, content and position stand beside each other instead of being added (section 3.3), so that
  content queries need not be good at finding places.
- The spatial query is conditional: the sine encoding of a reference point, scaled by a function of the decoder's
  content (equation 6). The reference point comes from the query embedding, is the same for every layer and is
  never refined; boxes are predicted relative to it (equation 2).
- Focal loss in place of cross-entropy, and the best pairs of query and class at inference.

The encoder is DETR's. Parameter names are the release's. Letters as in `detr_family.modeling.detr`; M attention heads.
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

from detr_family.layers.attention import ProjectedAttention
from detr_family.layers.boxes import inverse_sigmoid
from detr_family.layers.fused import feed_forward
from detr_family.layers.mlp import MLP
from detr_family.layers.position_encoding import sine_of_coordinates
from detr_family.modeling.criterion import FocalClassLoss
from detr_family.modeling.detr import Encoder, EncoderLayer, coarsest_map, map_tokens
from detr_family.modeling.heads import focal_heads
from detr_family.modeling.matcher import FocalClassCost
from detr_family.modeling.postprocessing import best_pairs
from detr_family.modeling.set_detector import (
    CommonArguments,
    SetDetector,
    at_least_one,
    common_arguments,
    inverse_sigmoid_eps,
    sine_encoding,
)
from detr_family.modeling.structures import SetPrediction, Targets
from detr_family.modeling.transformer import (
    TransformerArguments,
    depths_and_layer,
    transformer_arguments,
    xavier_matrices,
)

EPS = 1e-5  # of inverse_sigmoid, in this paper's release


@META_ARCH_REGISTRY.register()
class ConditionalDETR(SetDetector):
    """Backbone, transformer, prediction heads.

    Args:
        transformer: see `ConditionalTransformer`.
        num_queries: Q.
        eps: of the inverse sigmoid of the reference points.
        **common: see `CommonArguments`.
    """

    @configurable
    def __init__(
        self,
        *,
        transformer: ConditionalTransformer,
        num_queries: int,
        eps: float = EPS,
        **common: Unpack[CommonArguments],
    ) -> None:
        super().__init__(select=best_pairs, **common)
        self.eps = eps
        self.transformer = transformer
        self.feature, self.input_proj = coarsest_map(self.backbone, transformer.dim)
        self.query_embed = nn.Embedding(at_least_one(num_queries), transformer.dim)  # the object queries o_q
        self.class_embed, self.bbox_embed = focal_heads(transformer.dim, self.num_classes)
        self.finish(ConditionalDETR)

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        """The arguments of `__init__`, from Detectron2's configuration."""
        return {
            **focal_arguments(cfg),
            "transformer": ConditionalTransformer(**transformer_arguments(cfg)),
            "num_queries": cfg.MODEL.DETR.NUM_QUERIES,
            "eps": inverse_sigmoid_eps(cfg, EPS),
        }

    def predict(self, images: ImageList, targets: Targets | None = None) -> SetPrediction:
        """Predict a set of Q boxes per image and decoder layer.

        Returns:
            SetPrediction with `layer_logits` (N, B, Q, K) and `layer_boxes` (N, B, Q, 4).
        """
        decoded, reference = self.transformer(
            **map_tokens(self, images), queries=self.query_embed.weight
        )  # N x B x Q x D and Q x 2
        boxes = self.bbox_embed(decoded).float()
        # Equation 2: b = sigmoid(FFN(f) + [s 0 0]). The release goes through the sigmoid and back.
        centre = boxes[..., :2] + inverse_sigmoid(reference.float(), self.eps)
        return SetPrediction(
            layer_logits=self.class_embed(decoded), layer_boxes=torch.cat([centre, boxes[..., 2:]], -1).sigmoid()
        )


def focal_arguments(cfg: CfgNode) -> CommonArguments:
    """What this detector and those of the papers after it read alike: `common_arguments` with the focal loss."""
    alpha, gamma = cfg.MODEL.DETR.FOCAL_ALPHA, cfg.MODEL.DETR.FOCAL_GAMMA
    return common_arguments(
        cfg,
        position_encoding=sine_encoding(cfg),
        class_cost=FocalClassCost(alpha, gamma),
        class_loss=FocalClassLoss(alpha, gamma),
    )


class ConditionalTransformer(nn.Module):
    """DETR's encoder and a decoder with conditional cross-attention (section 3, figure 3).

    Args:
        **sizes: see `TransformerArguments`.

    Raises:
        ValueError: widths or depths that cannot be.
    """

    def __init__(self, **sizes: Unpack[TransformerArguments]) -> None:
        super().__init__()
        encoder_layers, decoder_layers, layer = depths_and_layer(**sizes)
        self.dim = layer["dim"]
        self.encoder = Encoder(
            [EncoderLayer(**layer, pre_norm=False, activation=nn.ReLU()) for _ in range(encoder_layers)], norm=None
        )
        self.decoder = ConditionalDecoder(
            [ConditionalDecoderLayer(**layer, first=i == 0, activation=nn.ReLU()) for i in range(decoder_layers)],
            self.dim,
        )
        xavier_matrices(self)

    def forward(
        self, tokens: Tensor, *, position: Tensor, padding: Tensor | None, queries: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Decode the object queries.

        Args:
            tokens: (B, S, D).
            position: (B, S, D) spatial encoding of the tokens.
            padding: (B, S) bool, True = padding; None where nothing is padded.
            queries: (Q, D) object queries.

        Returns:
            (N, B, Q, D), the output of every decoder layer, and (Q, 2) reference points x, y in [0, 1].
        """
        memory = self.encoder(tokens, position=position, padding=padding)
        return self.decoder(memory, memory_position=position, padding=padding, queries=queries)


class ConditionalDecoder(nn.Module):
    """A stack of `ConditionalDecoderLayer` around fixed reference points.

    Args:
        layers: the layers, first to last.
        dim: D.
    """

    def __init__(self, layers: Sequence[ConditionalDecoderLayer], dim: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.norm = nn.LayerNorm(dim)
        self.query_scale = MLP(dim, dim, dim, num_layers=2)  # T, from the content (equation 5)
        self.ref_point_head = MLP(dim, dim, 2, num_layers=2)  # s, from the object query (section 3.2)

    def forward(
        self, memory: Tensor, *, memory_position: Tensor, padding: Tensor | None, queries: Tensor
    ) -> tuple[Tensor, Tensor]:
        """(B, S, D) memory and (Q, D) object queries -> (N, B, Q, D) and reference points (Q, 2)."""
        batch, dim = memory.shape[0], memory.shape[-1]
        reference = self.ref_point_head(queries).float().sigmoid()  # Q x 2
        place = sine_of_coordinates(reference, dim // 2, temperature=10000.0)  # p_s, Q x D
        object_queries = queries.expand(batch, -1, -1)
        content = torch.zeros_like(object_queries)  # B x Q x D
        outputs = []
        for i, layer in enumerate(self.layers):
            # The first layer's content is nothing yet: the release leaves its spatial query unscaled.
            spatial_query = place.expand(batch, -1, -1) if i == 0 else place * self.query_scale(content)
            content = layer(
                content,
                memory,
                object_queries=object_queries,
                spatial_query=spatial_query.to(memory_position.dtype),
                memory_position=memory_position,
                padding=padding,
                blocked=None,
            )
            outputs.append(self.norm(content))
        return torch.stack(outputs), reference


class ConditionalDecoderLayer(nn.Module):
    """Self-attention, conditional cross-attention, a feed-forward network.

    Args:
        dim: D.
        num_heads: M.
        feedforward_dim: width of the hidden layer.
        dropout: probability in the three sublayers and in the attention weights.
        first: whether it is the first layer, which alone adds the object queries to the cross-attention's
            content (`ca_qpos_proj`): its own content starts from zeros.
        activation: between the two linear layers; ReLU here, PReLU in DAB-DETR.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        feedforward_dim: int,
        dropout: float,
        *,
        first: bool,
        activation: nn.Module,
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.sa_qcontent_proj = nn.Linear(dim, dim)
        self.sa_qpos_proj = nn.Linear(dim, dim)
        self.sa_kcontent_proj = nn.Linear(dim, dim)
        self.sa_kpos_proj = nn.Linear(dim, dim)
        self.sa_v_proj = nn.Linear(dim, dim)
        self.self_attn = ProjectedAttention(dim, num_heads, dropout)
        self.norm1 = nn.LayerNorm(dim)

        self.ca_qcontent_proj = nn.Linear(dim, dim)  # c_q
        self.ca_qpos_proj = nn.Linear(dim, dim) if first else None
        self.ca_kcontent_proj = nn.Linear(dim, dim)  # c_k
        self.ca_kpos_proj = nn.Linear(dim, dim)  # p_k
        self.ca_v_proj = nn.Linear(dim, dim)
        self.ca_qpos_sine_proj = nn.Linear(dim, dim)  # p_q
        self.cross_attn = ProjectedAttention(dim, num_heads, dropout)
        self.norm2 = nn.LayerNorm(dim)

        self.linear1 = nn.Linear(dim, feedforward_dim)
        self.linear2 = nn.Linear(feedforward_dim, dim)
        self.activation = activation
        self.norm3 = nn.LayerNorm(dim)
        self.dropout = nn.Dropout(dropout)

    def forward(
        self,
        content: Tensor,
        memory: Tensor,
        *,
        object_queries: Tensor,
        spatial_query: Tensor,
        memory_position: Tensor,
        padding: Tensor | None,
        blocked: Tensor | None,
    ) -> Tensor:
        """Decode one layer further.

        Args:
            content: (B, Q, D) decoder embeddings.
            memory: (B, S, D).
            object_queries: (B, Q, D), added to queries and keys of the self-attention.
            spatial_query: (B, Q, D) scaled encoding of the reference points.
            memory_position: (B, S, D) spatial encoding of the memory.
            padding: (B, S) bool, True = padding.
            blocked: (Q, Q) bool, True = this query does not see that one; None where all do.

        Returns:
            (B, Q, D).
        """
        content = self.norm1(content + self.dropout(self.attend(content, object_queries, blocked)))
        seen = self.look(content, memory, object_queries, spatial_query, memory_position, padding)
        content = self.norm2(content + self.dropout(seen))
        seen = feed_forward(content, self.linear1, self.activation, self.dropout, self.linear2)
        return self.norm3(content + self.dropout(seen))

    def attend(self, content: Tensor, object_queries: Tensor, blocked: Tensor | None) -> Tensor:
        """Self-attention: content and position are projected apart and added."""
        q = self.sa_qcontent_proj(content) + self.sa_qpos_proj(object_queries)
        k = self.sa_kcontent_proj(content) + self.sa_kpos_proj(object_queries)
        return self.self_attn(q, k, self.sa_v_proj(content), blocked=blocked)

    def look(
        self,
        content: Tensor,
        memory: Tensor,
        object_queries: Tensor,
        spatial_query: Tensor,
        memory_position: Tensor,
        padding: Tensor | None,
    ) -> Tensor:
        """Cross-attention: q . k = c_q . c_k + p_q . p_k, content and position beside each other (equation 1)."""
        q, k = self.ca_qcontent_proj(content), self.ca_kcontent_proj(memory)
        p_q, p_k = self.ca_qpos_sine_proj(spatial_query), self.ca_kpos_proj(memory_position)
        if self.ca_qpos_proj is not None:
            q, k = q + self.ca_qpos_proj(object_queries), k + p_k
        return self.cross_attn(self.beside(q, p_q), self.beside(k, p_k), self.ca_v_proj(memory), padding=padding)

    def beside(self, content: Tensor, position: Tensor) -> Tensor:
        """Concatenate within each head: two (B, S, D) -> (B, S, 2 D)."""
        heads = (x.unflatten(-1, (self.num_heads, -1)) for x in (content, position))
        return torch.cat(list(heads), -1).flatten(-2)
