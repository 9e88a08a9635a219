"""DN-Deformable-DETR: DN-DETR's denoising (arXiv 2203.01305) in DAB-Deformable-DETR.

What differs from DAB-Deformable-DETR:

- In training the decoder also gets groups of ground-truth boxes with noise and learns to restore them
  (`detr_family.modeling.denoising`).
- One channel of the content is an indicator, 1 for denoising and 0 for matching queries.

What differs from DN-DETR: a matching query has a learned content of its own, not that of an unknown label.
Parameter names are the release's. Letters as in `projects.deformable.dab_deformable_detr`; R denoising queries.
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

from detr_family.modeling.dab_detr import EPS
from detr_family.modeling.deformable import Levels, flatten_levels, level_position
from detr_family.modeling.denoising import DenoisingGroups, DenoisingPrediction, denoising_groups, split_prediction
from detr_family.modeling.dn_detr import denoised_losses, denoising_content
from detr_family.modeling.postprocessing import best_pairs
from detr_family.modeling.set_detector import CommonArguments, SetDetector
from detr_family.modeling.structures import SetPrediction, Targets
from projects.deformable.dab_deformable_detr import DABDeformableTransformer, dab_arguments
from projects.deformable.deformable_detr import level_projections, predict_layers


@META_ARCH_REGISTRY.register()
class DNDeformableDETR(SetDetector):
    """Backbone, transformer, prediction heads, and the denoising part of the training.

    Args:
        transformer: see `DABDeformableTransformer`; its decoder refines anchors by the box heads.
        class_embed: class heads, one per decoder layer.
        num_queries: Q, anchors.
        num_groups: denoising groups, each with every box of an image; 0 trains without denoising.
        max_denoising_queries: the most denoising queries of an image, at least one per group.
        label_noise: probability that a label is flipped.
        box_noise: lambda of the box noise, the largest shift in half boxes and the largest change of size.
        ignore_padding: see `LevelProjections`.
        **common: see `CommonArguments`.

    Attributes:
        generator: the random numbers of the noise, on the model's device; None takes torch's global ones.
    """

    @configurable
    def __init__(
        self,
        *,
        transformer: DABDeformableTransformer,
        class_embed: nn.ModuleList,
        num_queries: int,
        num_groups: int,
        max_denoising_queries: int,
        label_noise: float,
        box_noise: float,
        ignore_padding: bool,
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
        self.features = list(self.backbone.output_shape())
        self.transformer = transformer
        self.class_embed = class_embed
        self.bbox_embed = transformer.decoder.bbox_embed  # the same modules: the release has both names
        self.input_proj = level_projections(self.backbone, transformer, ignore_padding=ignore_padding)
        self.tgt_embed = nn.Embedding(num_queries, transformer.dim - 1)
        self.refpoint_embed = nn.Embedding(num_queries, 4)  # anchors before the sigmoid
        # One row for each class; the release has one more, which nothing reads.
        self.label_enc = nn.Embedding(self.num_classes + 1, transformer.dim - 1)
        self.num_groups = num_groups
        self.max_denoising_queries = max_denoising_queries
        self.label_noise = label_noise
        self.box_noise = box_noise
        self.generator: torch.Generator | None = None
        self.finish(DNDeformableDETR)

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        """The arguments of `__init__`, from Detectron2's configuration."""
        if cfg.MODEL.DAB.NUM_PATTERNS:
            raise ValueError(
                f"MODEL.DAB.NUM_PATTERNS is {cfg.MODEL.DAB.NUM_PATTERNS}; DNDeformableDETR has no patterns: set it to 0"
            )
        transformer, class_embed, arguments = dab_arguments(cfg)
        dn = cfg.MODEL.DN
        return {
            **arguments,
            "transformer": transformer,
            "class_embed": class_embed,
            "num_queries": cfg.MODEL.DETR.NUM_QUERIES,
            "num_groups": dn.GROUPS,
            "max_denoising_queries": dn.MAX_QUERIES,
            "label_noise": dn.LABEL_NOISE,
            "box_noise": dn.BOX_NOISE,
        }

    def predict(self, images: ImageList, targets: Targets | None = None) -> SetPrediction:
        """Predict a set of Q boxes per image and decoder layer.

        Args:
            images: from `preprocess_image`.
            targets: ground truth to denoise; it is looked at in training alone.

        Returns:
            SetPrediction with `layer_logits` (N, B, Q, K) and `layer_boxes` (N, B, Q, 4); where there is something
            to denoise, a DenoisingPrediction.
        """
        features = self.backbone(images.tensor)
        padded = self.has_padding(images)
        maps, masks = self.input_proj(
            [features[name] for name in self.features], self.padding_mask(images), padded=padded
        )
        groups = self.make_groups(targets) if self.training and targets is not None else None
        batch = len(images.tensor)
        content = F.pad(self.tgt_embed.weight, (0, 1)).expand(batch, -1, -1)  # indicator 0
        anchors = self.refpoint_embed.weight.expand(batch, -1, -1)
        if groups is not None:
            content = torch.cat([denoising_content(self.label_enc, groups), content], 1)
            anchors = torch.cat([groups.anchors, anchors], 1)
        decoded, start = self.transformer(
            flatten_levels(maps),  # B x S x D
            position=level_position([self.position_encoding(x) for x in masks], self.transformer.level_embed),
            levels=Levels.from_masks(masks, padded=padded),
            content=content,
            anchors=anchors,
            blocked=None if groups is None else groups.blocked,
        )  # N x B x (R + Q) x D and N x B x (R + Q) x 4
        prediction = SetPrediction(*predict_layers(self.class_embed, self.bbox_embed, decoded, start))
        return split_prediction(prediction, groups)

    def make_groups(self, targets: Targets) -> DenoisingGroups | None:
        """The ground truth with noise; None where MODEL.DN.GROUPS is 0."""
        if self.num_groups == 0:
            return None
        return denoising_groups(
            targets,
            num_classes=self.num_classes,
            num_queries=self.refpoint_embed.num_embeddings,
            num_groups=self.num_groups,
            max_queries=self.max_denoising_queries,
            label_noise=self.label_noise,
            box_noise=self.box_noise,
            eps=EPS,
            generator=self.generator,
        )

    def losses(self, prediction: SetPrediction, targets: Targets) -> dict[str, Tensor]:
        """Losses of matched sets, and with denoising those of `detr_family.modeling.dn_detr.denoised_losses`."""
        losses = super().losses(prediction, targets)
        if isinstance(prediction, DenoisingPrediction):
            losses |= denoised_losses(self.criterion, prediction, targets, aux_loss=self.aux_loss)
        return losses
