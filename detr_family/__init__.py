"""DETR, Conditional DETR, DAB-DETR, DN-DETR and DINO as meta-architectures of Detectron2.

Importing the package registers them; `add_detr_family_config(cfg)` adds their keys to a configuration. Where torch is
not loaded yet, it also lets torch's threads sleep while they wait for each other, see `detr_family.threads`.
"""

from detr_family.threads import sleep_while_waiting

sleep_while_waiting()  # before anything loads torch

try:
    import detectron2  # noqa: F401
except ImportError as error:
    raise ImportError(
        "detr_family needs Detectron2, which is not here: in a checkout python tools/install_detectron2.py (see "
        "docs/install.md), else pip install --no-build-isolation git+https://github.com/facebookresearch/detectron2"
    ) from error

from detr_family import model_zoo, modeling  # noqa: E402  (the latter registers)
from detr_family.config import add_detr_family_config  # noqa: E402

__all__ = ["add_detr_family_config", "model_zoo", "modeling"]
