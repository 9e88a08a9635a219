"""Configurations and published weights by name: `python -m detr_family.model_zoo` lists them."""

from detr_family.model_zoo.model_zoo import get, get_checkpoint_url, get_config, get_config_file

__all__ = ["get", "get_checkpoint_url", "get_config", "get_config_file"]
