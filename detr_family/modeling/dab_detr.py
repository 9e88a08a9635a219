"""DAB-DETR: Dynamic Anchor Boxes are Better Queries for DETR (arXiv 2201.12329).

What differs from Conditional DETR:

- A query is an anchor box x, y, w, h, learned, and refined layer by layer (sections 4.1 and 4.3); its positional
  query is a perceptron of the box's sine encoding (equation 4).
- Width and height modulate the positional attention (section 4.4, equation 6): it widens along the longer side.
- A low temperature, 20, of the image's encoding makes positional attention sharper (section 4.5).
- The encoder scales its positional encoding by a function of the content; PReLU; one box head shared by all
  layers, its last layer starting from zeros; optionally several learned content patterns for every anchor.

Parameter names are the release's. Letters as in `detr_family.modeling.detr`; P patterns.
"""

from __future__ import annotations

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
from detr_family.modeling.conditional_detr import ConditionalDecoderLayer, focal_arguments
from detr_family.modeling.detr import EncoderLayer, coarsest_map, map_tokens
from detr_family.modeling.heads import focal_heads
from detr_family.modeling.postprocessing import best_pairs
from detr_family.modeling.set_detector import CommonArguments, SetDetector, at_least_one, inverse_sigmoid_eps
from detr_family.modeling.structures import SetPrediction, Targets
from detr_family.modeling.transformer import (
    TransformerArguments,
    depths_and_layer,
    transformer_arguments,
    xavier_matrices,
)

EPS = 1e-3  # of inverse_sigmoid, in this paper's release and those that follow it


@META_ARCH_REGISTRY.register()
class DABDETR(SetDetector):
    """Backbone, transformer, prediction heads.

    Args:
        transformer: see `DABTransformer`; its decoder is given the box head.
        num_queries: anchors; with P patterns the predicted set has P times as many boxes.
        fix_centres: anchors' centres are drawn uniformly and never trained ("fixed x, y" of the paper's tables).
            The release has a setting of that name which freezes nothing, so its published figure had trained
            centres: the default is False.
        anchor_size: where learned anchors start, see `learned_anchors`; 0 is the release's way.
        **common: see `CommonArguments`.
    """

    fixed_centres: Tensor | None

    @configurable
    def __init__(
        self,
        *,
        transformer: DABTransformer,
        num_queries: int,
        fix_centres: bool,
        anchor_size: float = 0.0,
        **common: Unpack[CommonArguments],
    ) -> None:
        super().__init__(select=best_pairs, **common)
        self.transformer = transformer
        self.eps = transformer.decoder.eps
        self.feature, self.input_proj = coarsest_map(self.backbone, transformer.dim)
        self.refpoint_embed = learned_anchors(num_queries, anchor_size)  # A_q before the sigmoid
        # A buffer: weight decay would move a parameter that has no gradient.
        self.register_buffer("fixed_centres", drawn_centres(num_queries) if fix_centres else None)
        self.class_embed, self.bbox_embed = focal_heads(transformer.dim, self.num_classes)
        transformer.decoder.bbox_embed = self.bbox_embed  # the same module: the release has both names
        self.finish(DABDETR)

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        """The arguments of `__init__`, from Detectron2's configuration."""
        dab = cfg.MODEL.DAB
        return {
            **focal_arguments(cfg),
            "transformer": DABTransformer(
                **transformer_arguments(cfg),
                num_patterns=dab.NUM_PATTERNS,
                modulate=dab.MODULATE,
                eps=inverse_sigmoid_eps(cfg, EPS),
            ),
            "num_queries": cfg.MODEL.DETR.NUM_QUERIES,
            "fix_centres": dab.FIX_CENTRES,
            "anchor_size": dab.ANCHOR_SIZE,
        }

    def anchors(self) -> Tensor:
        """(Q, 4) anchors before the sigmoid, see `anchors_of`."""
        return anchors_of(self.refpoint_embed, self.fixed_centres)

    def predict(self, images: ImageList, targets: Targets | None = None) -> SetPrediction:
        """Predict a set of boxes per image and decoder layer, one for every anchor and pattern.

        Returns:
            SetPrediction with `layer_logits` (N, B, P * Q, K) and `layer_boxes` (N, B, P * Q, 4).
        """
        anchors = self.anchors()
        content, anchors = self.transformer.queries(anchors.new_zeros(self.transformer.dim), anchors)
        batch = images.tensor.shape[0]
        decoded, anchors = self.transformer(
            **map_tokens(self, images),
            content=content.expand(batch, -1, -1),
            anchors=anchors.expand(batch, -1, -1),
            blocked=None,
        )  # N x B x PQ x D and N x B x PQ x 4
        boxes = self.bbox_embed(decoded).float() + inverse_sigmoid(anchors, self.eps)
        return SetPrediction(layer_logits=self.class_embed(decoded), layer_boxes=boxes.sigmoid())


def learned_anchors(num_queries: int, size: float) -> nn.Embedding:
    """Anchors x, y, w, h before the sigmoid, (Q, 4), as they start.

    Args:
        num_queries: Q.
        size: width and height of all at the start, as shares of the image's, with centres spread evenly over it; 0
            draws all four from a normal distribution, as the release does: boxes around half the image's
            size, most of them near its middle. An optimizer that moves a parameter by the learning rate at most, as
            AdamW, needs thousands of steps to make them small.

    Raises:
        ValueError: there are none, or the size is none.
    """
    if not 0 <= size < 1:
        raise ValueError(f"MODEL.DAB.ANCHOR_SIZE is {size}: a share of the image's size is needed, or 0")
    anchors = nn.Embedding(at_least_one(num_queries), 4)
    if size:
        with torch.no_grad():
            anchors.weight[:, :2] = drawn_centres(num_queries)
            anchors.weight[:, 2:] = torch.logit(torch.tensor(size))
    return anchors


def drawn_centres(num_queries: int) -> Tensor:
    """(Q, 2) centres x, y before the sigmoid, drawn uniformly over the image."""
    return inverse_sigmoid(torch.rand(num_queries, 2), EPS)


def anchors_of(learned: nn.Embedding, fixed_centres: Tensor | None) -> Tensor:
    """(Q, 4) anchors before the sigmoid: x, y, w, h. Fixed centres, where there are, take the place of learned ones."""
    return learned.weight if fixed_centres is None else torch.cat([fixed_centres, learned.weight[:, 2:]], dim=1)


class DABTransformer(nn.Module):
    """Encoder with scaled positions, decoder with dynamic anchor boxes (figure 5).

    Args:
        num_patterns: P, learned contents that every anchor is decoded with (3 in the starred rows of the
            paper's tables); 0 for none.
        modulate: modulate positional attention by width and height.
        eps: of the inverse sigmoid of the anchors, see `DABDecoder`.
        **sizes: see `TransformerArguments`.

    Raises:
        ValueError: widths, depths or counts that cannot be.
    """

    def __init__(
        self,
        *,
        num_patterns: int,
        modulate: bool,
        eps: float = EPS,
        **sizes: Unpack[TransformerArguments],
    ) -> None:
        super().__init__()
        encoder_layers, decoder_layers, layer = depths_and_layer(**sizes)
        if num_patterns < 0:
            raise ValueError(f"MODEL.DAB.NUM_PATTERNS {num_patterns} must be at least 0")
        self.dim = layer["dim"]
        self.encoder = DABEncoder(encoder_layers, **layer)
        self.decoder = DABDecoder(decoder_layers, modulate=modulate, eps=eps, **layer)
        xavier_matrices(self)
        self.patterns = nn.Embedding(num_patterns, self.dim) if num_patterns else None

    def queries(self, content: Tensor, anchors: Tensor) -> tuple[Tensor, Tensor]:
        """Every anchor with the same content or, where there are patterns, with each of them added to it.

        Args:
            content: (D,).
            anchors: (Q, 4).

        Returns:
            (P * Q, D) contents and (P * Q, 4) anchors: one after another with the first pattern, then with the
            second, ... P counts as 1 where there are no patterns.
        """
        if self.patterns is None:
            return content.expand(len(anchors), -1), anchors
        contents = (content + self.patterns.weight).repeat_interleave(len(anchors), 0)
        return contents, anchors.repeat(len(self.patterns.weight), 1)

    def forward(
        self,
        tokens: Tensor,
        *,
        position: Tensor,
        padding: Tensor | None,
        content: Tensor,
        anchors: Tensor,
        blocked: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """Decode the anchors.

        Args:
            tokens: (B, S, D).
            position: (B, S, D) spatial encoding of the tokens.
            padding: (B, S) bool, True = padding; None where nothing is padded.
            content: (B, Q, D) what the queries start from, Q with all patterns.
            anchors: (B, Q, 4) before the sigmoid.
            blocked: (Q, Q) bool, True = this query does not see that one; None where all do.

        Returns:
            as `DABDecoder`.
        """
        memory = self.encoder(tokens, position=position, padding=padding)
        return self.decoder(
            content, memory, anchors=anchors, memory_position=position, padding=padding, blocked=blocked
        )


class DABEncoder(nn.Module):
    """DETR's encoder layers, each seeing the positions scaled by a function of its own input.

    Args:
        num_layers: layers, possibly 0.
        dim, num_heads, feedforward_dim, dropout: see `LayerArguments`.
    """

    def __init__(self, num_layers: int, dim: int, num_heads: int, feedforward_dim: int, dropout: float) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            EncoderLayer(dim, num_heads, feedforward_dim, dropout, pre_norm=False, activation=nn.PReLU())
            for _ in range(num_layers)
        )
        self.query_scale = MLP(dim, dim, dim, num_layers=2)

    def forward(self, tokens: Tensor, *, position: Tensor, padding: Tensor | None) -> Tensor:
        """(B, S, D) tokens, their encoding and (B, S) padding mask -> (B, S, D) memory."""
        for layer in self.layers:
            tokens = layer(tokens, position=position * self.query_scale(tokens), padding=padding)
        return tokens


class DABDecoder(nn.Module):
    """Conditional DETR's decoder layers around anchors that move from layer to layer.

    Args:
        num_layers: N, at least 1.
        dim, num_heads, feedforward_dim, dropout: see `LayerArguments`.
        modulate: modulate positional attention by width and height (equation 6).
        eps: an anchor's coordinate that is nearer to 0 or 1 counts as so near when its logit is taken.

    Attributes:
        bbox_embed: the detector's box head, which moves the anchors after each layer; the detector sets it.
    """

    bbox_embed: MLP

    def __init__(
        self,
        num_layers: int,
        dim: int,
        num_heads: int,
        feedforward_dim: int,
        dropout: float,
        *,
        modulate: bool,
        eps: float = EPS,
    ) -> None:
        super().__init__()
        self.eps = eps
        self.layers = nn.ModuleList(
            ConditionalDecoderLayer(dim, num_heads, feedforward_dim, dropout, first=i == 0, activation=nn.PReLU())
            for i in range(num_layers)
        )
        self.norm = nn.LayerNorm(dim)
        self.query_scale = MLP(dim, dim, dim, num_layers=2)  # MLP^(csq), equation 5
        self.ref_point_head = MLP(2 * dim, dim, dim, num_layers=2)  # MLP of equation 4
        self.ref_anchor_head = MLP(dim, dim, 2, num_layers=2) if modulate else None  # equation 7

    def forward(
        self,
        content: Tensor,
        memory: Tensor,
        *,
        anchors: Tensor,
        memory_position: Tensor,
        padding: Tensor | None,
        blocked: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """Decode.

        Args:
            content: (B, Q, D) initial decoder embeddings.
            memory: (B, S, D).
            anchors: (B, Q, 4) before the sigmoid.
            memory_position: (B, S, D).
            padding: (B, S) bool, True = padding.
            blocked: (Q, Q) bool, True = this query does not see that one; None where all do.

        Returns:
            (N, B, Q, D) normalised outputs, and (N, B, Q, 4) the anchors that each layer's box starts from. A
            layer works on a detached anchor, but its box is predicted from the one that still has its gradient.
        """
        dim = memory.shape[-1]
        anchor = anchors.float().sigmoid()
        outputs, started_from = [], [anchor]
        for i, layer in enumerate(self.layers):
            encoding = sine_of_coordinates(anchor, dim // 2, temperature=10000.0)  # B x Q x 2D: y, x, w, h
            place = encoding[..., :dim]
            if i > 0:
                place = place * self.query_scale(content)
            if self.ref_anchor_head is not None:
                place = place * self.modulation(content, anchor)
            content = layer(
                content,
                memory,
                object_queries=self.ref_point_head(encoding.to(memory_position.dtype)),
                spatial_query=place.to(memory_position.dtype),
                memory_position=memory_position,
                padding=padding,
                blocked=blocked,
            )
            outputs.append(self.norm(content))
            if i + 1 < len(self.layers):
                # The release moves anchors by the output before its norm, and predicts boxes from that after it.
                moved = (self.bbox_embed(content).float() + inverse_sigmoid(anchor, self.eps)).sigmoid()
                started_from.append(moved)
                anchor = moved.detach()
        return torch.stack(outputs), torch.stack(started_from)

    def modulation(self, content: Tensor, anchor: Tensor) -> Tensor:
        """Equation 6: w_ref / w for the channels of x, h_ref / h for those of y, which come first.

        Args:
            content: (B, Q, D), from which the reference width and height are predicted.
            anchor: (B, Q, 4) in [0, 1].

        Returns:
            (B, Q, D).
        """
        assert self.ref_anchor_head is not None
        ratio = self.ref_anchor_head(content).float().sigmoid() / anchor[..., 2:]  # B x Q x 2: w, h
        return ratio.flip(-1).repeat_interleave(content.shape[-1] // 2, dim=-1)
