"""From config file and command line to a checked configuration, and what follows from one."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from detectron2.config import CfgNode, get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog
from yaml import YAMLError

from detr_family.config.batch import images_per_forward
from detr_family.config.defaults import add_detr_family_config
from detr_family.config.files import find_config, similar
from detr_family.config.types import check_given
from detr_family.contents import told_by_head

# What yacs says of a text in the place of a tuple or list.
_MISMATCH = re.compile(
    r"Type mismatch \(<class '(tuple|list)'> vs\. <class 'str'>\) with values "
    r"\(.* vs\. (?P<value>.*)\) for config key: (?P<key>\S+)",
    re.DOTALL,
)


def load_config(config_file: str, opts: Sequence[str] = ()) -> CfgNode:
    """Detectron2's defaults and detr_family's, a config file over them, and KEY VALUE pairs over that.

    Where MODEL.DEVICE asks for CUDA and there is none it becomes "cpu", with a warning.

    Args:
        config_file: a YAML file, or the name of one that comes with the package (`dn_detr_r50`, see
            `detr_family.config.files`); empty for the defaults alone.
        opts: keys and values in turn, as on a command line. A whole number is taken where a key is a float.

    Raises:
        FileNotFoundError: there is no such file or name; similar ones are named.
        ValueError: a file that is no YAML, a key that does not exist (similar ones are named), a value of the wrong
            type, a key without a value, a detector or backbone that is not registered.
    """
    cfg = get_cfg()
    add_detr_family_config(cfg)
    try:
        if config_file:
            _merge_file(cfg, find_config(config_file))
        if len(opts) % 2:
            raise ValueError(f"{opts[-1]!r} on the command line has no value: give KEY VALUE pairs")
        for key, value in zip(opts[::2], opts[1::2], strict=True):
            cfg.merge_from_list([key, _as_wanted(cfg, key, value)])
    except (KeyError, AssertionError) as error:  # yacs says which key, and asserts on those of opts
        text = str(error.args[0]) if error.args else str(error)
        wrong = text.rsplit(": ", 1)[-1] if "key" in text.lower() else text
        raise ValueError(f"{text}{similar(wrong, _keys(cfg))}") from error
    except YAMLError as error:
        raise ValueError(f"the config file {config_file} is no YAML: {' '.join(str(error).split())}") from error
    except ValueError as error:
        single = _MISMATCH.search(str(error))
        if single is None:
            raise ValueError(" ".join(str(error).split())) from error
        value = single["value"] if len(single["value"]) < 200 else f"{single['value'][:200]} ..."
        if value[:1] in ("(", "["):
            names = ", ".join(repr(name.strip(" '\"")) for name in value.strip("()[] ").split(",") if name.strip())
            raise ValueError(
                f"{single['key']} is {value!r}, which is read as one text: names stand between quotation marks, and on "
                f'a command line the whole between others: "({names},)"'
            ) from error
        raise ValueError(
            f"{single['key']} is {value!r}, one text, and must be a tuple, which for one of it needs a comma: "
            f"('{value}',)"
        ) from error
    check_given(cfg)
    for node, key in ((cfg, "OUTPUT_DIR"), (cfg.MODEL, "WEIGHTS"), (cfg.DATASETS, "FOLDER")):
        node[key] = os.path.expanduser(node[key])  # "~", which shells replace in some places alone
    check_registered(cfg)
    if cfg.MODEL.DEVICE.startswith("cuda") and not torch.cuda.is_available():
        logging.getLogger(__name__).warning("No CUDA device is to be had: MODEL.DEVICE is cpu.")
        cfg.MODEL.DEVICE = "cpu"
    return cfg


def _merge_file(cfg: CfgNode, path: str) -> None:
    """Merge a YAML file, and those that its _BASE_ names, into a configuration.

    Raises:
        ValueError: one holds something else than keys and values, or is a base of itself.
        FileNotFoundError: a base is not there.
    """
    if path.endswith(".py"):
        raise ValueError(f"the config file {path} is Python (of detrex, or Detectron2's LazyConfig?): YAML is needed")
    try:
        cfg.merge_from_file(path)
    except (AttributeError, TypeError) as error:  # Detectron2 takes for granted that it is a dict
        raise ValueError(f"the config file {path}, or its _BASE_, is empty or holds no KEY: VALUE pairs") from error
    except RecursionError as error:
        raise ValueError(f"the config file {path} is, by its _BASE_, based on itself") from error
    except FileNotFoundError as error:
        raise FileNotFoundError(f"the _BASE_ of the config file {path} is not there: {error.filename}") from error
    except UnicodeDecodeError as error:
        told = told_by_head(path, "the config file (.yaml)")
        what = f"it is {told[0]}. {told[1]}" if told else f"it is not in UTF-8 ({error}): save it so"
        raise ValueError(f"the config file {path} cannot be read: {what}") from error


def check_registered(cfg: CfgNode) -> None:
    """Whether detector and backbone are registered.

    Raises:
        ValueError: one is not; similar names are given.
    """
    from detectron2.modeling import BACKBONE_REGISTRY, META_ARCH_REGISTRY  # takes seconds to load

    for key, registry in (("MODEL.META_ARCHITECTURE", META_ARCH_REGISTRY), ("MODEL.BACKBONE.NAME", BACKBONE_REGISTRY)):
        name, known = _value(cfg, key), [name for name, _ in registry]
        if name not in known:
            raise ValueError(f"{key} is {name!r}, which is not registered{similar(str(name), known)}")


def _keys(cfg: CfgNode, prefix: str = "") -> Iterator[str]:
    for key, value in cfg.items():
        if isinstance(value, CfgNode):
            yield from _keys(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}"


def _as_wanted(cfg: CfgNode, key: str, value: str) -> str:
    """`value` as yacs takes it: with a decimal point where the key is a float, true and false in Python's writing."""
    node = cfg
    for part in key.split("."):
        node = node.get(part) if isinstance(node, CfgNode) else None
    if isinstance(node, CfgNode):
        raise ValueError(f"{key} is a group and takes no value ({value!r}); its keys: {', '.join(sorted(node))}")
    if isinstance(node, bool) and value.lower() in ("true", "false"):  # as files have them
        return value.capitalize()
    return f"{value}.0" if isinstance(node, float) and value.lstrip("+-").isdigit() else value


def class_names(cfg: CfgNode) -> list[str] | None:
    """Names of the classes, as the metadata of the first training set says, else that of the first test set.

    Returns:
        The names in contiguous order, or None where there is no dataset or it has no names.

    Raises:
        ValueError: no dataset can be asked: none is registered, or their annotation files cannot be read.
    """
    errors = []
    asked = (*cfg.DATASETS.TRAIN[:1], *cfg.DATASETS.TEST[:1])
    for name in asked:
        if name not in DatasetCatalog.list():
            errors.append(
                ValueError(
                    f"dataset {name!r} is not registered: name it in DATASETS.COCO_FORMAT with its annotation file "
                    "and image folder, or correct DATASETS.TRAIN / DATASETS.TEST. (A trained detector without its "
                    "datasets: detr_family.inference.Predictor.from_config)"
                )
            )
            continue
        try:
            if not hasattr(MetadataCatalog.get(name), "thing_classes"):
                DatasetCatalog.get(name)  # Detectron2's own COCO loader sets the names while loading
            names = MetadataCatalog.get(name).get("thing_classes", None)
        except ValueError as error:  # evaluation alone does not need the training set's file
            errors.append(error)
            continue
        if names is not None:
            return list(names)
    if errors and len(errors) == len(asked):
        raise errors[0]
    return None


def num_classes(cfg: CfgNode) -> int:
    """MODEL.DETR.NUM_CLASSES, or where that is -1 the number of classes that the dataset's metadata names.

    Raises:
        ValueError: neither the key nor a dataset tells, or the key is 0 or below -1.
    """
    if cfg.MODEL.DETR.NUM_CLASSES != -1:
        if cfg.MODEL.DETR.NUM_CLASSES < 1:
            raise ValueError(f"MODEL.DETR.NUM_CLASSES is {cfg.MODEL.DETR.NUM_CLASSES}; it must be positive, or -1")
        return cfg.MODEL.DETR.NUM_CLASSES
    names = class_names(cfg)
    if names is None:
        raise ValueError(
            "MODEL.DETR.NUM_CLASSES is -1 and no dataset in DATASETS.TRAIN or DATASETS.TEST names its classes: "
            "set one of the two"
        )
    return len(names)


def check_class_count(cfg: CfgNode) -> None:
    """Compare MODEL.DETR.NUM_CLASSES with the dataset's metadata.

    Raises:
        ValueError: they disagree; the message has the dataset's contiguous ids and names.
    """
    names = class_names(cfg)
    count = num_classes(cfg)
    if names is not None and len(names) != count:
        listing = ", ".join(f"{i}: {name}" for i, name in enumerate(names))
        raise ValueError(
            f"MODEL.DETR.NUM_CLASSES is {count}, but {(cfg.DATASETS.TRAIN or cfg.DATASETS.TEST)[0]} has "
            f"{len(names)} classes ({listing}): set it to {len(names)}, or to -1"
        )


def departures(cfg: CfgNode, config_file: str, processes: int = 1) -> list[str]:
    """Where a configuration's SOLVER is not that of its config file, the recipe: "KEY is ... (recipe: ...)" each.

    What a recipe leaves open is no departure: how its batch is split, as long as one forward sees as many images as the
    recipe says (IMAGES_PER_FORWARD), averaging, precision, and what to do with checkpoints.

    Args:
        cfg: of the run.
        config_file: the recipe; empty where there is none.
        processes: of the whole run.
    """
    recipe = load_config(config_file) if config_file else None
    if recipe is None:
        return []
    free = (
        *("SOLVER.ACCUMULATION_STEPS", "SOLVER.IMAGES_PER_FORWARD"),
        *("SOLVER.EMA", "SOLVER.AMP", "SOLVER.CHECKPOINT", "SOLVER.NONFINITE"),
    )
    found = []
    for key in _keys(cfg):
        if key.startswith("SOLVER.") and not key.startswith(free):
            ours, theirs = (_value(node, key) for node in (cfg, recipe))
            if ours != theirs:
                found.append(f"{key} is {ours} (recipe: {theirs})")
    most = recipe.SOLVER.IMAGES_PER_FORWARD
    try:
        images = images_per_forward(cfg, processes)
    except ValueError:  # told where the training is prepared
        return found
    if most and images != most:
        found.append(f"images in one forward of a process are {images} (recipe: {most})")
    return found


def _value(cfg: CfgNode, key: str) -> object:
    node: Any = cfg
    for part in key.split("."):
        node = node[part]
    return node
