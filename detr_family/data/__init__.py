"""From image files and annotations to what a detector is given."""

from detr_family.data.dataset_mapper import DETRDatasetMapper, build_test_loader

__all__ = ["DETRDatasetMapper", "build_test_loader"]
