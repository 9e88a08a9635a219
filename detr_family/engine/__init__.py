"""Training and evaluation on Detectron2's trainer."""

from detr_family.engine.trainer import Trainer

__all__ = ["Trainer"]
