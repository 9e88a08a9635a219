"""Using a trained detector."""

from detr_family.inference.predictor import Prediction, Predictor
from detr_family.inference.preparing import optimize

__all__ = ["Prediction", "Predictor", "optimize"]
