"""DETR, Conditional DETR, DAB-DETR, DN-DETR and DINO as meta-architectures of Detectron2.

Importing the package registers them; `add_detr_family_config(cfg)` adds their keys to a configuration.
"""

try:
    import detectron2  # noqa: F401
except ImportError as error:
    raise ImportError(
        "detr_family needs Detectron2, which is not here: in a checkout python tools/install_detectron2.py (see "
        "docs/install.md), else pip install --no-build-isolation git+https://github.com/facebookresearch/detectron2"
    ) from error

from detr_family import model_zoo, modeling  # the latter registers the detectors and backbones
from detr_family.config import add_detr_family_config

__all__ = ["add_detr_family_config", "model_zoo", "modeling"]
