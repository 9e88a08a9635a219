"""COCO's figures, and scores of single images."""

from detr_family.evaluation.evaluator import build_evaluator

__all__ = ["build_evaluator"]
