"""The keys of this project, beside detr_family's."""

from __future__ import annotations

from detectron2.config import CfgNode

from detr_family.config import project_config


@project_config
def add_deformable_config(cfg: CfgNode) -> None:
    """Add MODEL.DEFORMABLE to a configuration, in place; `add_detr_family_config` does it by itself."""
    cfg.MODEL.DEFORMABLE = CfgNode()
    # Feature levels. The coarsest maps of the backbone are taken, as many as there are; further levels are made from
    # the last one by strided convolutions (Deformable DETR, section 4.1 and appendix A.2).
    cfg.MODEL.DEFORMABLE.NUM_LEVELS = 4
    # Points that a head samples on each level (section 4.1: K).
    cfg.MODEL.DEFORMABLE.ENC_POINTS = 4
    cfg.MODEL.DEFORMABLE.DEC_POINTS = 4
    # DeformableDETR alone: each decoder layer refines the boxes of the one before, with heads of its own (section
    # 4.2, "iterative bounding box refinement"). The other two always do.
    cfg.MODEL.DEFORMABLE.BOX_REFINEMENT = False
    # DeformableDETR alone: the decoder starts from boxes that the encoder proposes (section 4.2); needs refinement.
    # (TwoStageDABDeformableDETR always does; it is detrex's, and a class of its own.)
    cfg.MODEL.DEFORMABLE.TWO_STAGE = False
    # Padding counts neither in the statistics of the group norm after the projection of feature maps nor in the
    # encoding of anchors: what is predicted for an image does not depend on what it is batched with. False, as in
    # the releases, it does.
    cfg.MODEL.DEFORMABLE.IGNORE_PADDING = False
