"""Parts that several of the detectors are made of; nothing here knows a detector."""

from detr_family.layers.deformable_attention import MSDeformAttn, ms_deform_attn

__all__ = ["MSDeformAttn", "ms_deform_attn"]
