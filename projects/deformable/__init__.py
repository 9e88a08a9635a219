"""Deformable DETR, and DAB-DETR and DN-DETR on its transformer, made from detr_family's parts.

Importing this registers the meta-architectures `DeformableDETR`, `DABDeformableDETR`, `DNDeformableDETR` and
`TwoStageDABDeformableDETR`, and has `detr_family.add_detr_family_config` add the keys MODEL.DEFORMABLE.
Its config files are then found by name.
"""

from pathlib import Path

from detr_family.config import add_config_folder
from projects.deformable.config import add_deformable_config
from projects.deformable.dab_deformable_detr import DABDeformableDETR
from projects.deformable.dab_deformable_two_stage import TwoStageDABDeformableDETR
from projects.deformable.deformable_detr import DeformableDETR
from projects.deformable.dn_deformable_detr import DNDeformableDETR

__all__ = [
    "DABDeformableDETR",
    "DNDeformableDETR",
    "DeformableDETR",
    "TwoStageDABDeformableDETR",
    "add_deformable_config",
]

add_config_folder(Path(__file__).resolve().parent / "configs")
