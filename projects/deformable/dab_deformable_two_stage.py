"""DAB-Deformable-DETR with two stages, as detrex has it (github.com/IDEA-Research/detrex); the authors have none.

What differs from DAB-Deformable-DETR: the anchors are boxes that the encoder proposes, for the tokens whose best class
is likeliest, and the content is what the encoder made of those tokens; nothing of a query is learned.

What differs from two-stage Deformable DETR: proposals are scored for every class, by DINO's rule, and a query's
position comes from its anchor.

Parameter names are detrex's where the release has none. Letters as in `projects.deformable.deformable_detr`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from detectron2.config import CfgNode, configurable
from detectron2.modeling import META_ARCH_REGISTRY
from detectron2.structures import ImageList
from torch import Tensor, nn
from typing_extensions import Unpack

from detr_family.modeling.deformable import Levels, best_tokens, level_tokens, take_tokens
from detr_family.modeling.dino import casts_apart
from detr_family.modeling.heads import focal_heads, per_layer
from detr_family.modeling.postprocessing import best_pairs
from detr_family.modeling.set_detector import CommonArguments, SetDetector
from detr_family.modeling.structures import SetPrediction, Targets
from detr_family.modeling.transformer import transformer_arguments
from projects.deformable.dab_deformable_detr import DABDeformableTransformer
from projects.deformable.deformable_detr import (
    deformable_arguments,
    level_arguments,
    level_projections,
    predict_layers,
)


@dataclass
class ProposedPrediction(SetPrediction):
    """What the decoder predicts, and the proposals that it started from.

    Attributes:
        proposals: (1, B, Q, K) logits and (1, B, Q, 4) boxes, of the chosen tokens.
    """

    proposals: SetPrediction


@META_ARCH_REGISTRY.register()
class TwoStageDABDeformableDETR(SetDetector):
    """Backbone, transformer, prediction heads.

    Args:
        transformer: see `TwoStageDABDeformableTransformer`; its decoder holds the heads.
        ignore_padding: see `LevelProjections`.
        **common: see `CommonArguments`.
    """

    @configurable
    def __init__(
        self,
        *,
        transformer: TwoStageDABDeformableTransformer,
        ignore_padding: bool,
        **common: Unpack[CommonArguments],
    ) -> None:
        super().__init__(select=best_pairs, **common)
        self.features = list(self.backbone.output_shape())
        self.transformer = transformer
        # The same modules as the decoder's, under both names: one for each layer, and one more for the proposals.
        self.class_embed = transformer.decoder.class_embed
        self.bbox_embed = transformer.decoder.bbox_embed
        self.input_proj = level_projections(self.backbone, transformer, ignore_padding=ignore_padding)
        self.finish(TwoStageDABDeformableDETR)

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        """The arguments of `__init__`, from Detectron2's configuration."""
        for key, off in (("FIX_CENTRES", False), ("ANCHOR_SIZE", 0.0), ("NUM_PATTERNS", 0)):
            if cfg.MODEL.DAB[key]:
                raise ValueError(f"MODEL.DAB.{key} is nothing that {cls.__name__} has: set it to {off}")
        detr, arguments = cfg.MODEL.DETR, deformable_arguments(cfg)
        class_head, box_head = focal_heads(detr.HIDDEN_DIM, arguments["num_classes"])
        transformer = TwoStageDABDeformableTransformer(
            num_queries=detr.NUM_QUERIES,
            class_embed=per_layer(class_head, detr.DEC_LAYERS + 1, share=False),
            bbox_embed=per_layer(box_head, detr.DEC_LAYERS + 1, share=False),
            ignore_padding=cfg.MODEL.DEFORMABLE.IGNORE_PADDING,
            **transformer_arguments(cfg),
            **level_arguments(cfg),
        )
        return {**arguments, "transformer": transformer}

    def predict(self, images: ImageList, targets: Targets | None = None) -> ProposedPrediction:
        """Predict a set of Q boxes per image and decoder layer.

        Returns:
            ProposedPrediction with `layer_logits` (N, B, Q, K) and `layer_boxes` (N, B, Q, 4).
        """
        decoded, start, proposals = self.transformer.decode_proposals(**level_tokens(self, images))
        return ProposedPrediction(
            *predict_layers(self.class_embed, self.bbox_embed, decoded, start), proposals=proposals
        )

    def losses(self, prediction: SetPrediction, targets: Targets) -> dict[str, Tensor]:
        """Losses of matched sets, and of the proposals: `loss_ce_enc` and so on."""
        losses = super().losses(prediction, targets)
        assert isinstance(prediction, ProposedPrediction)
        proposals = prediction.proposals
        return losses | self.criterion(proposals, targets, self.matcher(proposals, targets), suffix="_enc")


class TwoStageDABDeformableTransformer(DABDeformableTransformer):
    """DAB-Deformable-DETR's transformer, whose decoder starts from what the encoder proposes.

    Args:
        num_queries: Q.
        class_embed: N + 1 class heads, of which the last is the proposals'.
        **rest: see `DABDeformableTransformer`; there are N + 1 box heads, too.

    Raises:
        ValueError: widths, depths or counts that cannot be.
    """

    def __init__(self, *, num_queries: int, class_embed: nn.ModuleList, **rest: Any) -> None:
        super().__init__(**rest)
        self.decoder: Any
        if num_queries < 1:
            raise ValueError(f"a detector needs at least one query, got {num_queries} (MODEL.DETR.NUM_QUERIES)")
        self.num_queries = num_queries
        self.decoder.class_embed = class_embed
        self.enc_output = nn.Linear(self.dim, self.dim)
        self.enc_output_norm = nn.LayerNorm(self.dim)
        nn.init.xavier_uniform_(self.enc_output.weight)

    def decode_proposals(
        self, tokens: Tensor, *, position: Tensor, levels: Levels
    ) -> tuple[Tensor, Tensor, SetPrediction]:
        """Encode the tokens, propose boxes, decode these.

        Args:
            tokens: (B, S, D).
            position: (B, S, D) encoding of place and level of the tokens.
            levels: how the tokens lie.

        Returns:
            as `DABDeformableDecoder`, and the proposals.
        """
        memory = self.encoder(tokens, position=position, levels=levels)
        features, anchors = self.propose(memory, levels)
        proposals = SetPrediction(self.decoder.class_embed[-1](features)[None], anchors.sigmoid()[None])
        decoded, start = self.decoder(
            features.detach(), memory, anchors=anchors.detach(), levels=levels, blocked=None
        )
        return decoded, start, proposals

    def propose(self, memory: Tensor, levels: Levels) -> tuple[Tensor, Tensor]:
        """The tokens whose best class is likeliest; see `detr_family.modeling.deformable.best_tokens`.

        Args:
            memory: (B, S, D).
            levels: how the tokens lie.

        Returns:
            (B, Q, D) features of the chosen tokens, and (B, Q, 4) boxes before the sigmoid that they propose.
        """
        boxes, usable = levels.proposals()
        with casts_apart(memory.device.type), torch.no_grad():  # what is not chosen has no gradient
            scores = self.decoder.class_embed[-1](self.token_features(memory.masked_fill(~usable[..., None], 0.0)))
            index, found = best_tokens(
                scores.amax(-1), usable, self.num_queries, ignore_padding=self.decoder.ignore_padding
            )
        features = self.token_features(take_tokens(memory, index, found, 0.0))
        offsets = self.decoder.bbox_embed[-1](features).float()
        return features, offsets + take_tokens(boxes, index, found, torch.inf)

    def token_features(self, memory: Tensor) -> Tensor:
        """(..., D) memory -> (..., D) what class and box are proposed from."""
        return self.enc_output_norm(self.enc_output(memory))
