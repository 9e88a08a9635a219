"""From image files and annotations to what a detector is given. Importing it registers Objects365."""

from detr_family.data.dataset_mapper import DETRDatasetMapper, build_test_loader
from detr_family.data.datasets import objects365  # noqa: F401  (registered by being imported)
from detr_family.data.datasets.coco import check_images, register_coco_format, register_datasets, training_dicts

__all__ = [
    "DETRDatasetMapper",
    "build_test_loader",
    "check_images",
    "register_coco_format",
    "register_datasets",
    "training_dicts",
]
