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
from detr_family.modeling.deformable import level_tokens
from detr_family.modeling.denoising import DenoisingGroups, GroupNoise, split_prediction
from detr_family.modeling.dn_detr import beside_denoising, denoised_losses, group_noise
from detr_family.modeling.postprocessing import best_pairs
from detr_family.modeling.set_detector import CommonArguments, SetDetector, at_least_one
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
        noise: the denoising groups and their noise.
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
        noise: GroupNoise,
        ignore_padding: bool,
        **common: Unpack[CommonArguments],
    ) -> None:
        super().__init__(select=best_pairs, **common)
        self.features = list(self.backbone.output_shape())
        self.transformer = transformer
        self.class_embed = class_embed
        self.bbox_embed = transformer.decoder.bbox_embed  # the same modules: the release has both names
        self.input_proj = level_projections(self.backbone, transformer, ignore_padding=ignore_padding)
        self.tgt_embed = nn.Embedding(at_least_one(num_queries), transformer.dim - 1)
        self.refpoint_embed = nn.Embedding(num_queries, 4)  # anchors before the sigmoid
        # One row for each class; the release has one more, which nothing reads.
        self.label_enc = nn.Embedding(self.num_classes + 1, transformer.dim - 1)
        self.noise = noise
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
        return {
            **arguments,
            "transformer": transformer,
            "class_embed": class_embed,
            "num_queries": cfg.MODEL.DETR.NUM_QUERIES,
            "noise": group_noise(cfg),
        }

    def predict(self, images: ImageList, targets: Targets | None = None) -> SetPrediction:
        """Predict a set of Q boxes per image and decoder layer.

        Targets are to be denoised; they are looked at in training alone.

        Returns:
            SetPrediction with `layer_logits` (N, B, Q, K) and `layer_boxes` (N, B, Q, 4); where there is something
            to denoise, a DenoisingPrediction.
        """
        groups = self.make_groups(targets) if self.training and targets is not None else None
        content = F.pad(self.tgt_embed.weight, (0, 1))  # indicator 0
        content, anchors = beside_denoising(
            content, self.refpoint_embed.weight, self.label_enc, groups, batch=images.tensor.shape[0]
        )
        decoded, start = self.transformer(
            **level_tokens(self, images),
            content=content,
            anchors=anchors,
            blocked=None if groups is None else groups.blocked,
        )  # N x B x (R + Q) x D and N x B x (R + Q) x 4
        prediction = SetPrediction(*predict_layers(self.class_embed, self.bbox_embed, decoded, start))
        return split_prediction(prediction, groups)

    @torch.compiler.disable  # numbers drawn, sizes by the images' boxes
    def make_groups(self, targets: Targets) -> DenoisingGroups | None:
        """The ground truth with noise; None where MODEL.DN.GROUPS is 0."""
        num_queries = self.refpoint_embed.num_embeddings
        return self.noise.groups(
            targets, num_classes=self.num_classes, num_queries=num_queries, eps=EPS, generator=self.generator
        )

    def losses(self, prediction: SetPrediction, targets: Targets) -> dict[str, Tensor]:
        """Losses of matched sets, and with denoising those of `detr_family.modeling.dn_detr.denoised_losses`."""
        denoised = denoised_losses(self.criterion, prediction, targets, aux_loss=self.aux_loss)
        return super().losses(prediction, targets) | denoised
