"""DN-DETR: Accelerate DETR Training by Introducing Query DeNoising (arXiv 2203.01305).

What differs from DAB-DETR:

- In training the decoder also gets groups of ground-truth boxes with noise and learns to restore them (section 4.2,
  equation 2): box regression learns without waiting for a stable matching. See `detr_family.modeling.denoising`.
- Content queries are label embeddings with one channel spent on an indicator, 1 for denoising and 0 for matching
  queries (section 4.4); a matching query's label is "unknown", the embedding's last row.
- A mask keeps groups from seeing each other, and the matching part from seeing any of them (section 4.3).

At inference it is DAB-DETR, with "unknown" in place of a content of zeros. Encoder, decoder and their parameter names
are DAB-DETR's. Letters as in `detr_family.modeling.dab_detr`; R denoising queries.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from detectron2.config import CfgNode, configurable
from detectron2.modeling import META_ARCH_REGISTRY
from detectron2.structures import ImageList
from torch import Tensor, nn
from typing_extensions import Unpack

from detr_family.layers.boxes import inverse_sigmoid
from detr_family.modeling.conditional_detr import PRIOR_BIAS, focal_arguments
from detr_family.modeling.criterion import SetCriterion, mean_num_boxes
from detr_family.modeling.dab_detr import EPS, DABDecoder, DABEncoder, learned_anchors
from detr_family.modeling.denoising import DenoisingGroups, DenoisingPrediction, denoising_groups, split_prediction
from detr_family.modeling.postprocessing import best_pairs
from detr_family.modeling.set_detector import CommonArguments, SetDetector
from detr_family.modeling.structures import SetPrediction, Targets


@META_ARCH_REGISTRY.register()
class DNDETR(SetDetector):
    """Backbone, transformer, prediction heads, and the denoising part of the training.

    Args:
        transformer: see `DNTransformer`; its decoder holds the box head.
        num_queries: anchors; with P patterns the predicted set has P times as many boxes.
        fix_centres: as in `detr_family.modeling.dab_detr.DABDETR`.
        anchor_size: as there.
        num_groups: denoising groups, each with every box of an image; 0 trains without denoising.
        max_denoising_queries: the most denoising queries of an image, at least one per group.
        label_noise: probability that a label is flipped.
        box_noise: lambda of the box noise, the largest shift in half boxes and the largest change of size.
        **common: see `CommonArguments`.

    Attributes:
        generator: the random numbers of the noise, on the model's device; None takes torch's global ones.
    """

    fixed_centres: Tensor | None

    @configurable
    def __init__(
        self,
        *,
        transformer: DNTransformer,
        num_queries: int,
        fix_centres: bool,
        anchor_size: float = 0.0,
        num_groups: int,
        max_denoising_queries: int,
        label_noise: float,
        box_noise: float,
        **common: Unpack[CommonArguments],
    ) -> None:
        super().__init__(select=best_pairs, **common)
        if num_queries < 1:
            raise ValueError(f"a detector needs at least one query, got {num_queries} (MODEL.DETR.NUM_QUERIES)")
        if num_groups < 0 or max_denoising_queries < num_groups:
            raise ValueError(
                f"MODEL.DN.GROUPS {num_groups} must be at least 0 and MODEL.DN.MAX_QUERIES {max_denoising_queries} "
                "at least as large"
            )
        if not 0 <= label_noise <= 1 or box_noise < 0:
            raise ValueError(
                f"MODEL.DN.LABEL_NOISE {label_noise} must be in [0, 1], MODEL.DN.BOX_NOISE {box_noise} at least 0"
            )
        dim = transformer.dim
        self.feature = list(self.backbone.output_shape())[-1]
        self.transformer = transformer
        self.input_proj = nn.Conv2d(self.backbone.output_shape()[self.feature].channels, dim, kernel_size=1)
        self.refpoint_embed = learned_anchors(num_queries, anchor_size)  # before the sigmoid
        self.label_enc = nn.Embedding(self.num_classes + 1, dim - 1)  # the last row is "unknown"
        self.class_embed = nn.Linear(dim, self.num_classes)
        nn.init.constant_(self.class_embed.bias, PRIOR_BIAS)
        self.bbox_embed = transformer.decoder.bbox_embed  # the same module: the release has both names
        # A buffer: weight decay would move a parameter that has no gradient.
        centres = inverse_sigmoid(torch.rand(num_queries, 2), EPS) if fix_centres else None
        self.register_buffer("fixed_centres", centres)
        self.num_groups = num_groups
        self.max_denoising_queries = max_denoising_queries
        self.label_noise = label_noise
        self.box_noise = box_noise
        self.generator: torch.Generator | None = None
        self.finish(DNDETR)

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        """The arguments of `__init__`, from Detectron2's configuration."""
        detr, dab, dn = cfg.MODEL.DETR, cfg.MODEL.DAB, cfg.MODEL.DN
        return {
            **focal_arguments(cfg),
            "transformer": DNTransformer(
                dim=detr.HIDDEN_DIM,
                num_heads=detr.NUM_HEADS,
                encoder_layers=detr.ENC_LAYERS,
                decoder_layers=detr.DEC_LAYERS,
                feedforward_dim=detr.FEEDFORWARD_DIM,
                dropout=detr.DROPOUT,
                num_patterns=dab.NUM_PATTERNS,
                modulate=dab.MODULATE,
            ),
            "num_queries": detr.NUM_QUERIES,
            "fix_centres": dab.FIX_CENTRES,
            "anchor_size": dab.ANCHOR_SIZE,
            "num_groups": dn.GROUPS,
            "max_denoising_queries": dn.MAX_QUERIES,
            "label_noise": dn.LABEL_NOISE,
            "box_noise": dn.BOX_NOISE,
        }

    def predict(self, images: ImageList, targets: Targets | None = None) -> SetPrediction:
        """Predict a set of boxes per image and decoder layer, one for every anchor and pattern.

        Args:
            images: from `preprocess_image`.
            targets: ground truth to denoise; it is looked at in training alone.

        Returns:
            SetPrediction with `layer_logits` (N, B, P * Q, K) and `layer_boxes` (N, B, P * Q, 4); where there is
            something to denoise, a DenoisingPrediction.
        """
        feature = self.backbone(images.tensor)[self.feature]  # B x C x H x W
        mask = self.level_mask(self.padding_mask(images), feature)  # B x H x W
        groups = self.make_groups(targets) if self.training and targets is not None else None
        decoded, anchors = self.transformer(
            self.input_proj(feature).flatten(2).transpose(1, 2),  # B x S x D
            position=self.position_encoding(mask).flatten(1, 2),  # B x S x D
            padding=mask.flatten(1) if self.has_padding(images) else None,
            anchors=self.anchors(),
            unknown=F.pad(self.label_enc.weight[-1], (0, 1)),  # indicator 0
            denoising=None if groups is None else (denoising_content(self.label_enc, groups), groups.anchors),
            blocked=None if groups is None else groups.blocked,
        )  # N x B x (R + PQ) x D and N x B x (R + PQ) x 4
        boxes = self.bbox_embed(decoded).float() + inverse_sigmoid(anchors, EPS)
        prediction = SetPrediction(layer_logits=self.class_embed(decoded), layer_boxes=boxes.sigmoid())
        return split_prediction(prediction, groups)

    def anchors(self) -> Tensor:
        """(Q, 4) anchors before the sigmoid: x, y, w, h. Fixed centres take the place of the learned ones."""
        anchors = self.refpoint_embed.weight
        if self.fixed_centres is None:
            return anchors
        return torch.cat([self.fixed_centres, anchors[:, 2:]], dim=1)

    def make_groups(self, targets: Targets) -> DenoisingGroups | None:
        """The ground truth with noise; None where MODEL.DN.GROUPS is 0."""
        if self.num_groups == 0:
            return None
        return denoising_groups(
            targets,
            num_classes=self.num_classes,
            num_queries=self.refpoint_embed.num_embeddings * max(self.transformer.num_patterns, 1),
            num_groups=self.num_groups,
            max_queries=self.max_denoising_queries,
            label_noise=self.label_noise,
            box_noise=self.box_noise,
            eps=EPS,
            generator=self.generator,
        )

    def losses(self, prediction: SetPrediction, targets: Targets) -> dict[str, Tensor]:
        """Losses of matched sets, and with denoising those of `denoised_losses`."""
        losses = super().losses(prediction, targets)
        if isinstance(prediction, DenoisingPrediction):
            losses |= denoised_losses(self.criterion, prediction, targets, aux_loss=self.aux_loss)
        return losses


def denoising_content(label_enc: nn.Embedding, groups: DenoisingGroups) -> Tensor:
    """Content of the denoising queries (section 4.4): the noised label's embedding and an indicator of 1.

    Args:
        label_enc: K + 1 embeddings of D - 1 channels.
        groups: the queries.

    Returns:
        (B, R, D); zeros where there is no box.
    """
    content = F.pad(label_enc(groups.labels), (0, 1), value=1.0)
    return content.masked_fill(groups.padding[..., None], 0.0)


def denoised_losses(
    criterion: SetCriterion, prediction: DenoisingPrediction, targets: Targets, *, aux_loss: bool
) -> dict[str, Tensor]:
    """Losses of the denoised boxes, each against its own ground truth (section 4.2), with `_dn` in their names.

    They are divided by the number of noised boxes, averaged over all processes like that of boxes: so they do not
    depend on how a batch is split. With one process it is the release's.

    Args:
        criterion: that of the matched sets.
        prediction: with the denoising queries'.
        targets: that the groups were made from.
        aux_loss: of the earlier decoder layers too.
    """
    denoised = prediction.denoised if aux_loss else prediction.denoised.layers(-1)
    denoised, truth, known = prediction.groups.known_alone(denoised, targets)
    per_box = len(truth) / len(targets) if len(targets) else 1.0  # G, unless boxes were left out
    return criterion(denoised, truth, known, num_boxes=per_box * mean_num_boxes(targets), suffix="_dn")


class DNTransformer(nn.Module):
    """DAB-DETR's encoder and decoder, whose content queries are given (figure 4).

    Args:
        dim: D, the model's width, a multiple of 4.
        num_heads: a divisor of `dim`.
        encoder_layers: layers of the encoder, possibly 0.
        decoder_layers: N, at least 1.
        feedforward_dim: width of the feed-forward networks' hidden layer.
        dropout: probability in every sublayer and in the attention weights.
        num_patterns: P, learned vectors, each added to the content of all matching queries in turn; 0 for none.
        modulate: modulate positional attention by width and height.

    Raises:
        ValueError: widths, depths or counts that cannot be.
    """

    def __init__(
        self,
        *,
        dim: int,
        num_heads: int,
        encoder_layers: int,
        decoder_layers: int,
        feedforward_dim: int,
        dropout: float,
        num_patterns: int,
        modulate: bool,
    ) -> None:
        super().__init__()
        if num_patterns < 0:
            raise ValueError(f"MODEL.DAB.NUM_PATTERNS {num_patterns} must be at least 0")
        self.dim = dim
        self.num_patterns = num_patterns
        self.encoder = DABEncoder(encoder_layers, dim, num_heads, feedforward_dim, dropout)
        self.decoder = DABDecoder(decoder_layers, dim, num_heads, feedforward_dim, dropout, modulate=modulate)
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.xavier_uniform_(parameter)
        self.decoder.bbox_embed.zero_last_layer()
        self.patterns = nn.Embedding(num_patterns, dim) if num_patterns else None

    def forward(
        self,
        tokens: Tensor,
        *,
        position: Tensor,
        padding: Tensor | None,
        anchors: Tensor,
        unknown: Tensor,
        denoising: tuple[Tensor, Tensor] | None,
        blocked: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """Decode denoising queries and anchors.

        Args:
            tokens: (B, S, D).
            position: (B, S, D) spatial encoding of the tokens.
            padding: (B, S) bool, True = padding; None where nothing is padded.
            anchors: (Q, 4) before the sigmoid.
            unknown: (D,) content of a matching query.
            denoising: (B, R, D) contents and (B, R, 4) anchors before the sigmoid of the denoising queries, which
                come first; None where there are none.
            blocked: (R + P * Q, R + P * Q) bool, True = this query does not see that one.

        Returns:
            (N, B, R + P * Q, D), the output of every decoder layer, and (N, B, R + P * Q, 4), the anchors in
            [0, 1] that each layer's box is predicted from. P counts as 1 where there are no patterns.
        """
        batch, num_queries = len(tokens), len(anchors)
        memory = self.encoder(tokens, position=position, padding=padding)
        if self.patterns is None:
            content = unknown.expand(batch, num_queries, -1)
        else:  # the anchors one after another with the first pattern, then with the second, ...
            content = (unknown + self.patterns.weight).repeat_interleave(num_queries, 0).expand(batch, -1, -1)
            anchors = anchors.repeat(self.num_patterns, 1)
        anchors = anchors.expand(batch, -1, -1)
        if denoising is not None:
            content = torch.cat([denoising[0], content], 1)
            anchors = torch.cat([denoising[1], anchors], 1)
        return self.decoder(
            content, memory, anchors=anchors, memory_position=position, padding=padding, blocked=blocked
        )
