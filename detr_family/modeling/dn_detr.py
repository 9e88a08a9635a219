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
from detr_family.modeling.conditional_detr import focal_arguments
from detr_family.modeling.criterion import SetCriterion, mean_num_boxes
from detr_family.modeling.dab_detr import EPS, DABTransformer, anchors_of, drawn_centres, learned_anchors
from detr_family.modeling.denoising import DenoisingGroups, DenoisingPrediction, GroupNoise, split_prediction
from detr_family.modeling.detr import coarsest_map, map_tokens
from detr_family.modeling.heads import focal_heads
from detr_family.modeling.postprocessing import best_pairs
from detr_family.modeling.set_detector import CommonArguments, SetDetector
from detr_family.modeling.structures import SetPrediction, Targets
from detr_family.modeling.transformer import transformer_arguments


@META_ARCH_REGISTRY.register()
class DNDETR(SetDetector):
    """Backbone, transformer, prediction heads, and the denoising part of the training.

    Args:
        transformer: see `DABTransformer`; its decoder is given the box head.
        num_queries: anchors; with P patterns the predicted set has P times as many boxes.
        fix_centres: as in `detr_family.modeling.dab_detr.DABDETR`.
        anchor_size: as there.
        noise: the denoising groups and their noise.
        **common: see `CommonArguments`.

    Attributes:
        generator: the random numbers of the noise, on the model's device; None takes torch's global ones.
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
        noise: GroupNoise,
        **common: Unpack[CommonArguments],
    ) -> None:
        super().__init__(select=best_pairs, **common)
        self.transformer = transformer
        self.feature, self.input_proj = coarsest_map(self.backbone, transformer.dim)
        self.refpoint_embed = learned_anchors(num_queries, anchor_size)  # before the sigmoid
        # A buffer: weight decay would move a parameter that has no gradient.
        self.register_buffer("fixed_centres", drawn_centres(num_queries) if fix_centres else None)
        self.label_enc = nn.Embedding(self.num_classes + 1, transformer.dim - 1)  # the last row is "unknown"
        self.class_embed, self.bbox_embed = focal_heads(transformer.dim, self.num_classes)
        transformer.decoder.bbox_embed = self.bbox_embed  # the same module: the release has both names
        self.noise = noise
        self.generator: torch.Generator | None = None
        self.finish(DNDETR)

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        """The arguments of `__init__`, from Detectron2's configuration."""
        dab = cfg.MODEL.DAB
        return {
            **focal_arguments(cfg),
            "transformer": DABTransformer(
                **transformer_arguments(cfg), num_patterns=dab.NUM_PATTERNS, modulate=dab.MODULATE
            ),
            "num_queries": cfg.MODEL.DETR.NUM_QUERIES,
            "fix_centres": dab.FIX_CENTRES,
            "anchor_size": dab.ANCHOR_SIZE,
            "noise": group_noise(cfg),
        }

    def anchors(self) -> Tensor:
        """(Q, 4) anchors before the sigmoid, see `anchors_of`."""
        return anchors_of(self.refpoint_embed, self.fixed_centres)

    def predict(self, images: ImageList, targets: Targets | None = None) -> SetPrediction:
        """Predict a set of boxes per image and decoder layer, one for every anchor and pattern.

        Targets are to be denoised; they are looked at in training alone.

        Returns:
            SetPrediction with `layer_logits` (N, B, P * Q, K) and `layer_boxes` (N, B, P * Q, 4); where there is
            something to denoise, a DenoisingPrediction.
        """
        groups = self.make_groups(targets) if self.training and targets is not None else None
        unknown = F.pad(self.label_enc.weight[-1], (0, 1))  # indicator 0
        content, anchors = self.transformer.queries(unknown, self.anchors())
        content, anchors = beside_denoising(content, anchors, self.label_enc, groups, batch=images.tensor.shape[0])
        decoded, anchors = self.transformer(
            **map_tokens(self, images),
            content=content,
            anchors=anchors,
            blocked=None if groups is None else groups.blocked,
        )  # N x B x (R + PQ) x D and N x B x (R + PQ) x 4
        boxes = self.bbox_embed(decoded).float() + inverse_sigmoid(anchors, EPS)
        prediction = SetPrediction(layer_logits=self.class_embed(decoded), layer_boxes=boxes.sigmoid())
        return split_prediction(prediction, groups)

    @torch.compiler.disable  # numbers drawn, sizes by the images' boxes
    def make_groups(self, targets: Targets) -> DenoisingGroups | None:
        """The ground truth with noise; None where MODEL.DN.GROUPS is 0."""
        patterns = self.transformer.patterns
        num_queries = self.refpoint_embed.num_embeddings * (1 if patterns is None else patterns.num_embeddings)
        return self.noise.groups(
            targets, num_classes=self.num_classes, num_queries=num_queries, eps=EPS, generator=self.generator
        )

    def losses(self, prediction: SetPrediction, targets: Targets) -> dict[str, Tensor]:
        """Losses of matched sets, and with denoising those of `denoised_losses`."""
        denoised = denoised_losses(self.criterion, prediction, targets, aux_loss=self.aux_loss)
        return super().losses(prediction, targets) | denoised


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


def beside_denoising(
    content: Tensor, anchors: Tensor, label_enc: nn.Embedding, groups: DenoisingGroups | None, *, batch: int
) -> tuple[Tensor, Tensor]:
    """Denoising queries, where there are, before the matching ones of every image.

    Args:
        content: (Q, D) of the matching queries.
        anchors: (Q, 4) before the sigmoid.
        label_enc: see `denoising_content`.
        groups: the denoising queries.
        batch: B.

    Returns:
        (B, R + Q, D) and (B, R + Q, 4).
    """
    content, anchors = content.expand(batch, -1, -1), anchors.expand(batch, -1, -1)
    if groups is None:
        return content, anchors
    return torch.cat([denoising_content(label_enc, groups), content], 1), torch.cat([groups.anchors, anchors], 1)


def group_noise(cfg: CfgNode) -> GroupNoise:
    """`GroupNoise` as MODEL.DN says."""
    dn = cfg.MODEL.DN
    return GroupNoise(dn.GROUPS, dn.MAX_QUERIES, dn.LABEL_NOISE, dn.BOX_NOISE)


def denoised_losses(
    criterion: SetCriterion, prediction: SetPrediction, targets: Targets, *, aux_loss: bool
) -> dict[str, Tensor]:
    """Losses of the denoised boxes, each against its own ground truth (section 4.2), with `_dn` in their names.

    They are divided by the number of noised boxes, averaged over all processes like that of boxes: so they do not
    depend on how a batch is split. With one process it is the release's.

    Args:
        criterion: that of the matched sets.
        prediction: with the denoising queries'; of one without there are none.
        targets: that the groups were made from.
        aux_loss: of the earlier decoder layers too.
    """
    if not isinstance(prediction, DenoisingPrediction):
        return {}
    denoised = prediction.denoised if aux_loss else prediction.denoised.layers(-1)
    denoised, truth, known = prediction.groups.known_alone(denoised, targets)
    per_box = len(truth) / len(targets) if len(targets) else 1.0  # G, unless boxes were left out
    return criterion(denoised, truth, known, num_boxes=per_box * mean_num_boxes(targets), suffix="_dn")
