"""Data sets: users' own in COCO format, Objects365, and a generated one to try things on."""

from detr_family.data.datasets import objects365  # noqa: F401  (registered by being imported)
from detr_family.data.datasets.coco import check_pictures, register_coco_format, register_datasets, training_dicts

__all__ = ["check_pictures", "register_coco_format", "register_datasets", "training_dicts"]
