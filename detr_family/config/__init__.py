"""The configuration: its keys, how it is read, and what follows from it."""

from detr_family.config.batch import images_per_forward, parts_of_step
from detr_family.config.defaults import add_detr_family_config
from detr_family.config.files import add_config_folder, config_names, find_config
from detr_family.config.loading import (
    check_class_count,
    check_registered,
    class_names,
    departures,
    load_config,
    num_classes,
)
from detr_family.config.projects import project_config

__all__ = [
    "add_config_folder",
    "add_detr_family_config",
    "check_class_count",
    "check_registered",
    "class_names",
    "config_names",
    "departures",
    "find_config",
    "images_per_forward",
    "load_config",
    "num_classes",
    "parts_of_step",
    "project_config",
]
