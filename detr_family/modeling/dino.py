"""DINO: DETR with Improved DeNoising Anchor Boxes for End-to-End Object Detection (arXiv 2203.03605).

What differs from DN-DETR:

- Deformable attention over several feature levels, in encoder and decoder (`detr_family.modeling.deformable`).
- Contrastive denoising: each noised box also comes as a negative, from farther away, that is to be rejected (section
  3.3). See `detr_family.modeling.denoising`.
- Mixed query selection: the decoder's anchors are boxes that the encoder proposes, its content is learned (section
  3.4).
- Look forward twice: a layer's box is predicted from the anchor that the layer before moved, with its gradient
  (section 3.5).

Parameter names are the release's. Shapes: B images, Q queries, R denoising queries, D channels, L feature levels,
S tokens of all levels, N decoder layers, K classes.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
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
from detr_family.modeling.conditional_detr import focal_arguments
from detr_family.modeling.criterion import mean_num_boxes
from detr_family.modeling.dab_detr import EPS
from detr_family.modeling.deformable import (
    DeformableDecoderLayer,
    LevelProjections,
    Levels,
    best_tokens,
    decoder_layers_of,
    encoder_of,
    init_transformer,
    level_tokens,
    take_tokens,
)
from detr_family.modeling.denoising import DenoisingGroups, contrastive_groups, denoising_groups
from detr_family.modeling.heads import apply_per_layer, draw_apart, focal_heads, per_layer
from detr_family.modeling.postprocessing import best_pairs
from detr_family.modeling.set_detector import CommonArguments, SetDetector, at_least_one
from detr_family.modeling.structures import SetPrediction, Targets
from detr_family.modeling.transformer import TransformerArguments, depths_and_layer, transformer_arguments

QUERY_SELECTIONS = ("none", "pure", "mixed")
DENOISINGS = ("none", "dn", "contrastive")


@dataclass
class DINOPrediction(SetPrediction):
    """What the matching queries predict, and what else is trained.

    Attributes:
        proposals: the boxes and logits that the encoder proposed, (1, B, Q, ...); None without query selection.
        denoised: what became of the denoising queries, (N, B, R, ...); None where there are none.
        groups: the denoising queries themselves.
    """

    proposals: SetPrediction | None
    denoised: SetPrediction | None
    groups: DenoisingGroups | None


@META_ARCH_REGISTRY.register()
class DINO(SetDetector):
    """The detector of figure 2: backbone, transformer, prediction heads, denoising.

    Args:
        transformer: see `DINOTransformer`; it holds the heads.
        denoising: "contrastive", "dn" (DN-DETR's, without negatives) or "none".
        denoising_pairs: pairs of a positive and a negative ("dn": positives) that an image gets, spread over as
            many groups as the batch's most crowded image allows, at least one.
        max_denoising_queries: the most denoising queries of an image, whatever it holds; at least 2.
        label_noise: a label is flipped with half this probability, as in the release.
        box_noise: lambda_2 of section 3.3, in half widths and heights; negatives lie up to twice as far.
        drop_inverted: leave out negatives whose noise has turned width or height negative.
        **common: see `CommonArguments`.

    Attributes:
        generator: the random numbers of the noise, on the model's device; None takes torch's global ones.
    """

    @configurable
    def __init__(
        self,
        *,
        transformer: DINOTransformer,
        denoising: str,
        denoising_pairs: int,
        max_denoising_queries: int,
        label_noise: float,
        box_noise: float,
        drop_inverted: bool,
        **common: Unpack[CommonArguments],
    ) -> None:
        super().__init__(select=best_pairs, **common)
        if denoising not in DENOISINGS:
            raise ValueError(f"MODEL.DINO.DENOISING is {denoising!r}; it may be one of {', '.join(DENOISINGS)}")
        if denoising_pairs < 1 or max_denoising_queries < 2:
            raise ValueError(
                f"MODEL.DINO.DN_PAIRS is {denoising_pairs} and must be at least 1, DN_MAX_QUERIES is "
                f"{max_denoising_queries} and must be at least 2; MODEL.DINO.DENOISING none switches denoising off"
            )
        if not 0 <= label_noise <= 2 or box_noise < 0:
            raise ValueError(
                f"MODEL.DINO.LABEL_NOISE is {label_noise} and must be from 0 to 2 (half of it is a probability), "
                f"BOX_NOISE is {box_noise} and must be at least 0"
            )
        shapes = self.backbone.output_shape()
        self.features = sorted(shapes, key=lambda name: shapes[name].stride)  # finest first
        self.transformer = transformer
        self.input_proj = LevelProjections(
            [shapes[name].channels for name in self.features],
            transformer.dim,
            len(transformer.level_embed),
            ignore_padding=transformer.ignore_padding,
        )
        # The same modules as the transformer's: the release has both names.
        self.class_embed = transformer.decoder.class_embed
        self.bbox_embed = transformer.decoder.bbox_embed
        # One row for each class; the release has one more, which nothing reads.
        self.label_enc = None if denoising == "none" else nn.Embedding(self.num_classes + 1, transformer.dim)
        self.denoising = denoising
        self.denoising_pairs = denoising_pairs
        self.max_denoising_queries = max_denoising_queries
        self.label_noise = label_noise
        self.box_noise = box_noise
        self.drop_inverted = drop_inverted
        self.generator: torch.Generator | None = None
        self.finish(DINO)

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        """The arguments of `__init__`, from Detectron2's configuration."""
        detr, dino = cfg.MODEL.DETR, cfg.MODEL.DINO
        arguments = focal_arguments(cfg)
        return {
            **arguments,
            "transformer": DINOTransformer(
                **transformer_arguments(cfg),
                num_levels=dino.NUM_LEVELS,
                encoder_points=dino.ENC_POINTS,
                decoder_points=dino.DEC_POINTS,
                num_queries=detr.NUM_QUERIES,
                num_classes=arguments["num_classes"],
                query_selection=dino.QUERY_SELECTION,
                look_forward_twice=dino.LOOK_FORWARD_TWICE,
                share_heads=dino.SHARE_HEADS,
                ignore_padding=dino.IGNORE_PADDING,
                independent_heads=dino.INDEPENDENT_HEADS,
            ),
            "denoising": dino.DENOISING,
            "denoising_pairs": dino.DN_PAIRS,
            "max_denoising_queries": dino.DN_MAX_QUERIES,
            "label_noise": dino.LABEL_NOISE,
            "box_noise": dino.BOX_NOISE,
            "drop_inverted": dino.DN_DROP_INVERTED,
        }

    def predict(self, images: ImageList, targets: Targets | None = None) -> DINOPrediction:
        """Predict a set of Q boxes per image and decoder layer.

        Targets, in training, are the boxes to be noised; None leaves denoising out.

        Returns:
            DINOPrediction with `layer_logits` (N, B, Q, K) and `layer_boxes` (N, B, Q, 4).
        """
        groups = self.make_groups(targets) if self.training and targets is not None else None
        decoded, anchors, proposals = self.transformer(
            **level_tokens(self, images),
            denoising=None if groups is None else (self.content(groups), groups.anchors),
            blocked=None if groups is None else groups.blocked,
        )  # N x B x (R + Q) x D and N x B x (R + Q) x 4
        logits = apply_per_layer(self.class_embed, decoded)
        boxes = (apply_per_layer(self.bbox_embed, decoded).float() + inverse_sigmoid(anchors, EPS)).sigmoid()
        count = 0 if groups is None else len(groups)
        return DINOPrediction(
            layer_logits=logits[:, :, count:],
            layer_boxes=boxes[:, :, count:],
            proposals=proposals,
            denoised=None if groups is None else SetPrediction(logits[:, :, :count], boxes[:, :, :count]),
            groups=groups,
        )

    @torch.compiler.disable  # numbers drawn, sizes by the images' boxes
    def make_groups(self, targets: Targets) -> DenoisingGroups | None:
        """The ground truth with noise (section 3.3); None where denoising is "none"."""
        if self.denoising == "none":
            return None
        contrastive = self.denoising == "contrastive"
        pairs = min(self.denoising_pairs, self.max_denoising_queries // (2 if contrastive else 1))
        arguments: dict[str, Any] = {
            "num_classes": self.num_classes,
            "num_queries": self.transformer.num_queries,
            "num_groups": max(pairs // max(1, *targets.counts), 1),
            "max_queries": self.max_denoising_queries,
            "label_noise": self.label_noise / 2,
            "box_noise": self.box_noise,
            "eps": EPS,
            "generator": self.generator,
        }
        if contrastive:
            return contrastive_groups(targets, drop_inverted=self.drop_inverted, **arguments)
        return denoising_groups(targets, **arguments)

    def content(self, groups: DenoisingGroups) -> Tensor:
        """(B, R, D): embeddings of the noised labels; zeros where there is no box."""
        assert self.label_enc is not None
        return self.label_enc(groups.labels).masked_fill(groups.padding[..., None], 0.0)

    def losses(self, prediction: SetPrediction, targets: Targets) -> dict[str, Tensor]:
        """Losses of matched sets, of denoised boxes (`_dn`) and of the encoder's proposals (`_interm`).

        Decoder layers and proposals are matched in one go. All denoising queries without a box of their own,
        negatives and padding, are background to the class loss; denoising losses are divided by the number of boxes
        times that of groups, as in the release.
        """
        assert isinstance(prediction, DINOPrediction)
        first = 0 if self.aux_loss else -1
        sets, denoised, proposals = prediction.layers(first), prediction.denoised, prediction.proposals
        together = (
            sets
            if proposals is None
            else SetPrediction(
                torch.cat([sets.layer_logits, proposals.layer_logits]),
                torch.cat([sets.layer_boxes, proposals.layer_boxes]),
            )
        )
        matched = self.matcher(together, targets)
        count = len(sets.layer_logits)
        losses = self.criterion(sets, targets, matched.layers(0, count))
        if denoised is not None:
            assert prediction.groups is not None
            denoised, groups = denoised.layers(first), prediction.groups
            known = groups.known.expand(count)
            per_box = known.query.shape[1] / len(targets) if len(targets) else 1.0  # G, unless boxes were left out
            num_boxes = per_box * mean_num_boxes(targets)
            losses |= self.criterion(denoised, targets, known, num_boxes=num_boxes, suffix="_dn")
        if proposals is not None:
            losses |= self.criterion(proposals, targets, matched.layers(count), suffix="_interm")
        return losses


class DINOTransformer(nn.Module):
    """Encoder, query selection, decoder.

    Args:
        num_levels: L, feature levels, at least 1.
        encoder_points: points that a head of the encoder samples on each level.
        decoder_points: the same for the decoder.
        num_queries: Q.
        num_classes: K.
        query_selection: "mixed" (anchors from the encoder, learned content), "pure" (content from the encoder too)
            or "none" (both learned): section 3.4, figure 5.
        look_forward_twice: a layer's box loss also reaches the layer before (section 3.5, figure 6).
        share_heads: one class and one box head for all decoder layers, else one of each per layer.
        ignore_padding: what is predicted for an image does not depend on what it is batched with; see
            `LevelProjections`, `best_tokens` and `DINODecoder`. The release: False.
        independent_heads: heads start from values of their own; see `draw_apart`. The release: False.
        **sizes: see `TransformerArguments`.

    Raises:
        ValueError: widths, depths or counts that cannot be, or a query selection that is none of the three.
    """

    def __init__(
        self,
        *,
        num_levels: int,
        encoder_points: int,
        decoder_points: int,
        num_queries: int,
        num_classes: int,
        query_selection: str,
        look_forward_twice: bool,
        share_heads: bool,
        ignore_padding: bool,
        independent_heads: bool = False,
        **sizes: Unpack[TransformerArguments],
    ) -> None:
        super().__init__()
        encoder_layers, decoder_layers, layer = depths_and_layer(**sizes)
        if min(num_levels, encoder_points, decoder_points) < 1:
            raise ValueError(
                f"MODEL.DINO.NUM_LEVELS {num_levels}, ENC_POINTS {encoder_points} and DEC_POINTS {decoder_points} must "
                "be at least 1"
            )
        if query_selection not in QUERY_SELECTIONS:
            raise ValueError(
                f"MODEL.DINO.QUERY_SELECTION is {query_selection!r}; it may be one of {', '.join(QUERY_SELECTIONS)}"
            )
        dim = self.dim = layer["dim"]
        self.num_queries = at_least_one(num_queries)
        self.query_selection = query_selection
        self.ignore_padding = ignore_padding
        self.level_embed = nn.Parameter(torch.empty(num_levels, dim))
        self.encoder = encoder_of(encoder_layers, num_levels=num_levels, num_points=encoder_points, **layer)
        self.decoder = DINODecoder(
            decoder_layers_of(decoder_layers, num_levels=num_levels, num_points=decoder_points, **layer),
            dim,
            look_forward_twice=look_forward_twice,
            ignore_padding=ignore_padding,
        )
        self.tgt_embed = None if query_selection == "pure" else nn.Embedding(num_queries, dim)
        self.refpoint_embed = nn.Embedding(num_queries, 4) if query_selection == "none" else None
        if query_selection != "none":
            self.enc_output = nn.Linear(dim, dim)
            self.enc_output_norm = nn.LayerNorm(dim)
        # Learned queries are matrices, too, and so start small, from Xavier's values.
        init_transformer(self)
        nn.init.normal_(self.level_embed)
        class_head, box_head = focal_heads(dim, num_classes)
        self.decoder.class_embed = per_layer(class_head, decoder_layers, share=share_heads)
        self.decoder.bbox_embed = per_layer(box_head, decoder_layers, share=share_heads)
        if query_selection != "none":  # heads of their own, which start alike
            self.enc_out_class_embed = copy.deepcopy(class_head)
            self.enc_out_bbox_embed = copy.deepcopy(box_head)
        if independent_heads:
            draw_apart(self.decoder.class_embed, self.decoder.bbox_embed)
            if query_selection != "none":
                draw_apart([self.enc_out_class_embed], [self.enc_out_bbox_embed])

    def forward(
        self,
        tokens: Tensor,
        *,
        position: Tensor,
        levels: Levels,
        denoising: tuple[Tensor, Tensor] | None,
        blocked: Tensor | None,
    ) -> tuple[Tensor, Tensor, SetPrediction | None]:
        """Encode the tokens, choose queries among them, decode.

        Args:
            tokens: (B, S, D).
            position: (B, S, D) encoding of place and level of the tokens.
            levels: how the tokens lie.
            denoising: (B, R, D) contents and (B, R, 4) anchors before the sigmoid of the denoising queries, which
                come first; None where there are none.
            blocked: (R + Q, R + Q) bool, True = this query does not see that one.

        Returns:
            (N, B, R + Q, D), the output of every decoder layer; (N, B, R + Q, 4), the anchors in [0, 1] that each
            layer's box is predicted from; and the encoder's proposals, None without query selection.
        """
        memory = self.encoder(tokens, position=position, levels=levels)
        proposals = None
        if self.query_selection == "none":
            content, anchors = self.learned(self.tgt_embed, memory), self.learned(self.refpoint_embed, memory)
        else:
            features, proposed = self.select(memory, levels)
            anchors = proposed.detach()
            content = features.detach() if self.tgt_embed is None else self.learned(self.tgt_embed, memory)
            proposals = SetPrediction(self.enc_out_class_embed(features)[None], proposed.sigmoid()[None])
        if denoising is not None:
            content = torch.cat([denoising[0], content], 1)
            anchors = torch.cat([denoising[1], anchors], 1)
        decoded, started_from = self.decoder(content, memory, anchors=anchors, levels=levels, blocked=blocked)
        return decoded, started_from, proposals

    @staticmethod
    def learned(embedding: nn.Embedding | None, memory: Tensor) -> Tensor:
        """The same vectors for every image, (B, Q, ...)."""
        assert embedding is not None
        return embedding.weight.expand(memory.shape[0], -1, -1)

    def select(self, memory: Tensor, levels: Levels) -> tuple[Tensor, Tensor]:
        """Query selection (section 3.4): the tokens whose best class logit is highest; see `best_tokens`.

        Args:
            memory: (B, S, D).
            levels: how the tokens lie.

        Returns:
            (B, Q, D) features of the chosen tokens, and (B, Q, 4) boxes before the sigmoid that they propose.
        """
        boxes, usable = levels.proposals()
        with casts_apart(memory.device.type), torch.no_grad():  # what is not chosen has no gradient
            features = self.token_features(memory.masked_fill(~usable[..., None], 0.0))
            scores = self.enc_out_class_embed(features).amax(-1)
            index, found = best_tokens(scores, usable, self.num_queries, ignore_padding=self.ignore_padding)
        features = self.token_features(take_tokens(memory, index, found, 0.0))
        offsets = self.enc_out_bbox_embed(features).float()
        return features, offsets + take_tokens(boxes, index, found, torch.inf)

    def token_features(self, memory: Tensor) -> Tensor:
        """(..., D) memory -> (..., D) what class and box are proposed from."""
        return self.enc_output_norm(self.enc_output(memory))


def casts_apart(device: str) -> AbstractContextManager[Any]:
    """Autocast as it is, but for keeping the weights' casts.

    What follows runs without gradients, and its weights once more with them. torch 2.10 takes a kept cast for the
    second run though it was made without gradients, and the weights' gradients are lost.

    Args:
        device: its type, "cpu" or "cuda".
    """
    if not (torch.is_grad_enabled() and torch.is_autocast_enabled(device)):
        return nullcontext()
    return torch.autocast(device, dtype=torch.get_autocast_dtype(device), cache_enabled=False)


class DINODecoder(nn.Module):
    """Deformable decoder layers around anchors that move from layer to layer (figure 6).

    Args:
        layers: the layers, first to last.
        dim: D.
        look_forward_twice: see `DINOTransformer`.
        ignore_padding: encode an anchor by its place in the image. False: by its place in the finest level with
            the level's padding, as in the release.

    Attributes:
        class_embed: a class head for each layer, which the transformer sets.
        bbox_embed: a box head for each layer, likewise.
    """

    class_embed: nn.ModuleList
    bbox_embed: nn.ModuleList

    def __init__(
        self,
        layers: Sequence[DeformableDecoderLayer],
        dim: int,
        *,
        look_forward_twice: bool,
        ignore_padding: bool,
    ) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.norm = nn.LayerNorm(dim)
        self.ref_point_head = MLP(2 * dim, dim, dim, num_layers=2)
        self.look_forward_twice = look_forward_twice
        self.ignore_padding = ignore_padding

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
            (N, B, Q, D) normalised outputs, and (N, B, Q, 4) the anchors that each layer's box starts from. A
            layer works on a detached anchor; its box is predicted from the one that still has its gradient, unless
            the decoder looks forward once.
        """
        dim = memory.shape[-1]
        anchor = anchors.float().sigmoid()
        outputs, started_from = [], [anchor]
        for i, layer in enumerate(self.layers):
            reference = levels.on_levels(anchor)  # B x Q x L x 4
            place = anchor if self.ignore_padding else reference[:, :, 0]
            encoding = sine_of_coordinates(place, dim // 2, temperature=10000.0)  # B x Q x 2D: y, x, w, h
            content = layer(
                content,
                memory,
                position=self.ref_point_head(encoding.to(self.norm.weight.dtype)),
                reference=reference,
                levels=levels,
                blocked=blocked,
            )
            outputs.append(self.norm(content))
            if i + 1 < len(self.layers):
                # The release moves anchors by the output before its norm, and predicts boxes from that after it.
                moved = (self.bbox_embed[i](content).float() + inverse_sigmoid(anchor, EPS)).sigmoid()
                anchor = moved.detach()
                started_from.append(moved if self.look_forward_twice else anchor)
        return torch.stack(outputs), torch.stack(started_from)
