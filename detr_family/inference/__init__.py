"""Using a trained detector."""

from detr_family.inference.predictor import Prediction, Predictor

__all__ = ["Prediction", "Predictor"]
