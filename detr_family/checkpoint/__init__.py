"""Reading and writing checkpoints: our own, the papers' releases, torchvision's and Swin's."""

from detr_family.checkpoint.checkpointer import DETRCheckpointer, read_class_names

__all__ = ["DETRCheckpointer", "read_class_names"]
