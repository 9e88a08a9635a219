"""Deformable DETR: Deformable Transformers for End-to-End Object Detection (arXiv 2010.04159).

What differs from DETR:

- Tokens of several feature levels; encoder and decoder look at a few sampled points of each in place of all tokens
  (sections 4.1 and 4.2, `detr_family.modeling.deformable`).
- Boxes are predicted relative to reference points, which come from the object queries (appendix A.3).
- Focal loss, 300 queries, the best pairs of query and class at inference.
- Optionally, boxes are refined layer by layer; and the encoder proposes the boxes to start from (section 4.2).

Parameter names are the release's. Shapes: B images, Q queries, D channels, L feature levels, S tokens of all
levels, N decoder layers, K classes.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from detectron2.config import CfgNode, configurable
from detectron2.modeling import META_ARCH_REGISTRY
from detectron2.modeling.backbone import Backbone
from detectron2.structures import ImageList
from torch import Tensor, nn
from typing_extensions import Unpack

from detr_family.layers.boxes import inverse_sigmoid
from detr_family.layers.position_encoding import sine_of_coordinates
from detr_family.layers.shapes import at_most
from detr_family.modeling.conditional_detr import focal_arguments
from detr_family.modeling.criterion import SetCriterion
from detr_family.modeling.deformable import (
    DeformableDecoderLayer,
    LevelProjections,
    Levels,
    decoder_layers_of,
    encoder_of,
    init_transformer,
    level_tokens,
)
from detr_family.modeling.heads import apply_per_layer, focal_heads, per_layer
from detr_family.modeling.postprocessing import best_pairs
from detr_family.modeling.set_detector import (
    CommonArguments,
    SetDetector,
    at_least_one,
    inverse_sigmoid_eps,
    sine_encoding,
)
from detr_family.modeling.structures import SetPrediction, Targets
from detr_family.modeling.transformer import TransformerArguments, depths_and_layer, transformer_arguments

EPS = 1e-5  # of inverse_sigmoid, in this paper's release


@dataclass
class TwoStagePrediction(SetPrediction):
    """What the decoder predicts, and what the encoder proposed.

    Attributes:
        proposals: (1, B, S, K + 1) logits, of which the last alone says that there is an object, and (1, B, S, 4)
            boxes: every token's.
    """

    proposals: SetPrediction


@META_ARCH_REGISTRY.register()
class DeformableDETR(SetDetector):
    """Backbone, transformer, prediction heads (figure 2).

    Args:
        transformer: see `DeformableTransformer`.
        class_embed: class heads, one name per decoder layer, and with two stages one more for the proposals.
        bbox_embed: box heads, as many.
        num_queries: Q.
        ignore_padding: see `LevelProjections`.
        **common: see `CommonArguments`.
    """

    @configurable
    def __init__(
        self,
        *,
        transformer: DeformableTransformer,
        class_embed: nn.ModuleList,
        bbox_embed: nn.ModuleList,
        num_queries: int,
        ignore_padding: bool,
        **common: Unpack[CommonArguments],
    ) -> None:
        super().__init__(select=best_pairs, **common)
        self.features = list(self.backbone.output_shape())
        self.transformer = transformer
        self.eps = transformer.decoder.eps
        self.class_embed = class_embed
        self.bbox_embed = bbox_embed
        self.num_queries = at_least_one(num_queries)
        self.input_proj = level_projections(self.backbone, transformer, ignore_padding=ignore_padding)
        # Position and content of the object queries; with two stages both come from the proposals.
        self.query_embed = None if transformer.two_stage else nn.Embedding(num_queries, 2 * transformer.dim)
        # A proposal's label is K whatever its class, and the others are never right.
        self.proposal_criterion = SetCriterion(
            class_loss=self.criterion.class_loss,
            background=self.num_classes + 1,
            weight_class=self.criterion.weight_class,
            weight_l1=self.criterion.weight_l1,
            weight_giou=self.criterion.weight_giou,
        )
        self.finish(DeformableDETR)

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        """The arguments of `__init__`, from Detectron2's configuration."""
        detr, deformable = cfg.MODEL.DETR, cfg.MODEL.DEFORMABLE
        arguments = deformable_arguments(cfg)
        class_embed, bbox_embed = prediction_heads(
            detr.HIDDEN_DIM,
            arguments["num_classes"],
            detr.DEC_LAYERS,
            refine=deformable.BOX_REFINEMENT,
            two_stage=deformable.TWO_STAGE,
        )
        transformer = DeformableTransformer(
            **transformer_arguments(cfg),
            **level_arguments(cfg),
            bbox_embed=bbox_embed if deformable.BOX_REFINEMENT else None,
            class_embed=class_embed if deformable.TWO_STAGE else None,
            eps=inverse_sigmoid_eps(cfg, EPS),
        )
        return {
            **arguments,
            "transformer": transformer,
            "class_embed": class_embed,
            "bbox_embed": bbox_embed,
            "num_queries": detr.NUM_QUERIES,
        }

    def predict(self, images: ImageList, targets: Targets | None = None) -> SetPrediction:
        """Predict a set of Q boxes per image and decoder layer.

        Returns:
            SetPrediction with `layer_logits` (N, B, Q, K) and `layer_boxes` (N, B, Q, 4); with two stages a
            TwoStagePrediction. An image with fewer tokens than Q has as many queries as tokens in the latter.
        """
        inputs = level_tokens(self, images)
        memory, levels = self.transformer.encoder(**inputs), inputs["levels"]  # B x S x D
        proposals = None
        if self.query_embed is None:
            content, query_position, reference, proposals = self.transformer.propose(memory, levels, self.num_queries)
        else:
            content, query_position, reference = self.transformer.start(self.query_embed.weight, memory.shape[0])
        decoded, start = self.transformer.decoder(
            content, memory, position=query_position, reference=reference, levels=levels
        )  # N x B x Q x D and N x B x Q x 4
        logits, boxes = predict_layers(self.class_embed, self.bbox_embed, decoded, start)
        if proposals is None:
            return SetPrediction(logits, boxes)
        return TwoStagePrediction(logits, boxes, proposals)

    def losses(self, prediction: SetPrediction, targets: Targets) -> dict[str, Tensor]:
        """Losses of matched sets, and with two stages those of the proposals: `loss_ce_enc` and so on."""
        losses = super().losses(prediction, targets)
        if isinstance(prediction, TwoStagePrediction):
            objects = replace(targets, labels=torch.full_like(targets.labels, self.num_classes))
            pairs = self.matcher(prediction.proposals, objects)
            losses |= self.proposal_criterion(prediction.proposals, objects, pairs, suffix="_enc")
        return losses


def deformable_arguments(cfg: CfgNode) -> dict[str, Any]:
    """What the three detectors of this project read alike from a configuration."""
    return {
        **focal_arguments(cfg),
        "position_encoding": sine_encoding(cfg, offset=-0.5),
        "ignore_padding": cfg.MODEL.DEFORMABLE.IGNORE_PADDING,
    }


def level_arguments(cfg: CfgNode) -> dict[str, int]:
    """The levels and points that this project's transformers have, from a configuration."""
    deformable = cfg.MODEL.DEFORMABLE
    return {
        "num_levels": deformable.NUM_LEVELS,
        "encoder_points": deformable.ENC_POINTS,
        "decoder_points": deformable.DEC_POINTS,
    }


def level_projections(backbone: Backbone, transformer: Any, *, ignore_padding: bool) -> LevelProjections:
    """From all of the backbone's feature maps to the transformer's levels and width."""
    channels = [shape.channels for shape in backbone.output_shape().values()]
    return LevelProjections(
        channels, transformer.dim, transformer.num_levels, ignore_padding=ignore_padding
    )


def prediction_heads(
    dim: int, num_classes: int, decoder_layers: int, *, refine: bool, two_stage: bool
) -> tuple[nn.ModuleList, nn.ModuleList]:
    """Class and box heads, one name per decoder layer as in the release.

    Args:
        dim: D.
        num_classes: K.
        decoder_layers: N.
        refine: every layer has heads of its own, which start alike; False: one module stands behind all names.
        two_stage: one more of each, for the encoder's proposals. The class head among them has K + 1 logits, and all
            proposals are trained for the last; the release uses its first, which is no category of COCO.

    Raises:
        ValueError: two stages without refinement.
    """
    if two_stage and not refine:
        raise ValueError("MODEL.DEFORMABLE.TWO_STAGE needs MODEL.DEFORMABLE.BOX_REFINEMENT")
    class_head, box_head = focal_heads(dim, num_classes)
    class_heads = per_layer(class_head, decoder_layers, share=not refine)
    box_heads = per_layer(box_head, decoder_layers, share=not refine)
    if two_stage:
        proposal_head, box_head = focal_heads(dim, num_classes + 1)[0], copy.deepcopy(box_head)
        with torch.no_grad():
            proposal_head.weight[:num_classes] = class_head.weight
        class_heads.append(proposal_head)
        box_heads.append(box_head)
    else:  # the first layer has a point to start from, and boxes begin small
        nn.init.constant_(box_head.layers[-1].get_parameter("bias")[2:], -2.0)
    return class_heads, box_heads


def predict_layers(
    class_embed: nn.ModuleList, bbox_embed: nn.ModuleList, decoded: Tensor, start: Tensor
) -> tuple[Tensor, Tensor]:
    """Logits and boxes of every decoder layer, through its own heads.

    Args:
        class_embed: at least N heads.
        bbox_embed: as many.
        decoded: (N, B, Q, D).
        start: (N, B, Q, 4), what the layers' boxes are relative to, before the sigmoid.

    Returns:
        (N, B, Q, K) and (N, B, Q, 4).
    """
    return apply_per_layer(class_embed, decoded), (apply_per_layer(bbox_embed, decoded).float() + start).sigmoid()


class DeformableTransformer(nn.Module):
    """Deformable encoder and decoder, and where the decoder starts from.

    Args:
        num_levels: L.
        encoder_points: points that a head samples on each level in the encoder.
        decoder_points: the same in the decoder.
        bbox_embed: box heads that refine the reference boxes after each layer; None keeps the reference points.
        class_embed: with two stages the class heads, of which the last is the proposals'; else None.
        eps: of the inverse sigmoid of the references, see `DeformableDecoder`.
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
        bbox_embed: nn.ModuleList | None,
        class_embed: nn.ModuleList | None,
        eps: float = EPS,
        **sizes: Unpack[TransformerArguments],
    ) -> None:
        super().__init__()
        encoder_layers, decoder_layers, layer = depths_and_layer(**sizes)
        check_levels(num_levels, encoder_points, decoder_points)
        dim = self.dim = layer["dim"]
        self.num_levels = num_levels
        self.two_stage = class_embed is not None
        self.level_embed = nn.Parameter(torch.empty(num_levels, dim))
        self.encoder = encoder_of(encoder_layers, num_levels=num_levels, num_points=encoder_points, **layer)
        self.decoder = DeformableDecoder(
            decoder_layers_of(decoder_layers, num_levels=num_levels, num_points=decoder_points, **layer), eps
        )
        if self.two_stage:
            self.enc_output = nn.Linear(dim, dim)
            self.enc_output_norm = nn.LayerNorm(dim)
            self.pos_trans = nn.Linear(2 * dim, 2 * dim)
            self.pos_trans_norm = nn.LayerNorm(2 * dim)
        else:
            self.reference_points = nn.Linear(dim, 2)
        init_transformer(self)
        nn.init.normal_(self.level_embed)
        if not self.two_stage:
            nn.init.zeros_(self.reference_points.bias)
        # The same modules as the detector's, which have starting values of their own: the release has both names.
        self.decoder.bbox_embed = bbox_embed
        self.decoder.class_embed = class_embed

    def start(self, queries: Tensor, batch: int) -> tuple[Tensor, Tensor, Tensor]:
        """Where the decoder starts from without proposals.

        Args:
            queries: (Q, 2 * D), position and content of the object queries.
            batch: B.

        Returns:
            (B, Q, D) content, (B, Q, D) position and (B, Q, 2) reference points x, y in [0, 1].
        """
        position, content = queries.expand(batch, -1, -1).chunk(2, -1)
        return content, position, self.reference_points(position).float().sigmoid()

    def propose(
        self, memory: Tensor, levels: Levels, num_queries: int
    ) -> tuple[Tensor, Tensor, Tensor, SetPrediction]:
        """Where the decoder starts from with proposals: the boxes that most likely hold an object (appendix A.4).

        What may not propose (padding, the image's very edge) counts no more than the least likely token that
        may, so it is chosen only where an image has too few tokens.

        Args:
            memory: (B, S, D).
            levels: how the tokens lie.
            num_queries: Q; where there are fewer tokens, all are taken.

        Returns:
            (B, Q, D) content, (B, Q, D) position, (B, Q, 4) reference boxes x, y, w, h in [0, 1], and the proposals
            of all tokens.
        """
        assert self.decoder.class_embed is not None and self.decoder.bbox_embed is not None
        anchors, usable = levels.proposals()
        features = self.enc_output_norm(self.enc_output(memory.masked_fill(~usable[..., None], 0.0)))
        logits = self.decoder.class_embed[-1](features)  # B x S x (K + 1)
        boxes = self.decoder.bbox_embed[-1](features).float() + anchors  # before the sigmoid

        scores = logits[..., -1].detach().float()
        least = scores.masked_fill(~usable, torch.inf).amin(1, keepdim=True)
        scores = torch.where(usable, scores, least)
        chosen = scores.topk(at_most(num_queries, scores.shape[1]), 1).indices
        reference = boxes.gather(1, chosen[..., None].expand(-1, -1, 4)).detach().sigmoid()
        # x, y, w, h: the function has y first.
        encoding = sine_of_coordinates(reference[..., [1, 0, 2, 3]], self.dim // 2, temperature=10000.0)
        position, content = self.pos_trans_norm(self.pos_trans(encoding.to(features.dtype))).chunk(2, -1)
        return content, position, reference, SetPrediction(logits[None], boxes.sigmoid()[None])


class DeformableDecoder(nn.Module):
    """A stack of `DeformableDecoderLayer` around reference points or boxes.

    Args:
        layers: the layers, first to last.
        eps: a reference's coordinate that is nearer to 0 or 1 counts as so near when its logit is taken.

    Attributes:
        bbox_embed: box heads that refine the references after each layer; None where nothing does.
        class_embed: class heads, which the transformer's proposals use; None without two stages.
    """

    def __init__(self, layers: Sequence[DeformableDecoderLayer], eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.layers = nn.ModuleList(layers)
        self.bbox_embed: nn.ModuleList | None = None
        self.class_embed: nn.ModuleList | None = None

    def forward(
        self, content: Tensor, memory: Tensor, *, position: Tensor, reference: Tensor, levels: Levels
    ) -> tuple[Tensor, Tensor]:
        """Decode.

        Args:
            content: (B, Q, D) initial decoder embeddings.
            memory: (B, S, D).
            position: (B, Q, D), added to queries and keys of the self-attention and to queries of the other.
            reference: (B, Q, 2) as x, y or (B, Q, 4) as x, y, w, h, in [0, 1].
            levels: how the memory's tokens lie.

        Returns:
            (N, B, Q, D), the output of every layer, and (N, B, Q, 4), what its boxes are relative to before the
            sigmoid: nothing for width and height where the reference is a point. A refined reference is detached.
        """
        outputs, starts = [], [before_sigmoid(reference, self.eps)]
        for i, layer in enumerate(self.layers):
            content = layer(
                content, memory, position=position, reference=levels.on_levels(reference), levels=levels, blocked=None
            )
            outputs.append(content)
            if i + 1 == len(self.layers):
                break
            if self.bbox_embed is not None:
                reference = (self.bbox_embed[i](content).float() + starts[-1]).sigmoid().detach()
            starts.append(before_sigmoid(reference, self.eps))
        return torch.stack(outputs), torch.stack(starts)


def before_sigmoid(reference: Tensor, eps: float) -> Tensor:
    """(B, Q, 2 or 4) in [0, 1] -> (B, Q, 4) before the sigmoid, zeros for the size that a point does not have."""
    return F.pad(inverse_sigmoid(reference, eps), (0, 4 - reference.shape[-1]))


def check_levels(num_levels: int, encoder_points: int, decoder_points: int) -> None:
    """Refuse counts below 1, with a ValueError that names the keys."""
    if min(num_levels, encoder_points, decoder_points) < 1:
        raise ValueError(
            f"MODEL.DEFORMABLE.NUM_LEVELS {num_levels}, ENC_POINTS {encoder_points} and DEC_POINTS {decoder_points} "
            "must be at least 1"
        )
