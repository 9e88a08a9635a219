"""The five papers, one file each, and what they share. Importing it registers them with Detectron2."""

from detr_family.modeling import backbone  # noqa: F401  (registered on import)
from detr_family.modeling.conditional_detr import ConditionalDETR
from detr_family.modeling.dab_detr import DABDETR
from detr_family.modeling.detr import DETR
from detr_family.modeling.dino import DINO
from detr_family.modeling.dn_detr import DNDETR

__all__ = ["DABDETR", "DETR", "DINO", "DNDETR", "ConditionalDETR"]
