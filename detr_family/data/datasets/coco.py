"""A user's own COCO-format datasets: registration from the config, and the training set, checked.

`DATASETS.COCO_FORMAT` lists [name, annotation file, image folder] triples; the names then work wherever
Detectron2 takes a dataset's name. Built-in names (coco_2017_train ...) keep working beside them.
"""

import logging
import os
from collections.abc import Sequence
from typing import Any

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog, get_detection_dataset_dicts
from detectron2.data.build import filter_images_with_only_crowd_annotations
from detectron2.data.catalog import Metadata
from detectron2.utils import comm
from detectron2.utils.file_io import PathManager

from detr_family.config.types import check_types
from detr_family.data.check import DatasetPart, annotation_findings, read_part
from detr_family.data.datasets.coco_json import CONFIG_KEY, printable, read_categories, read_coco_json
from detr_family.data.datasets.folder import apply_folder
from detr_family.data.datasets.registered import check_records
from detr_family.data.datasets.tree import plain

_CHECKED_IMAGES = 20000
_NAMED_EXAMPLES = 5
_logger = logging.getLogger(__name__)


class CocoFormatMetadata(Metadata):
    """Metadata whose class names are read from the annotation file when they are first asked for.

    So registering costs nothing, and a dataset that a run does not use need not be there.
    """

    def __getattr__(self, key: str) -> Any:
        if key in ("thing_classes", "thing_dataset_id_to_contiguous_id") and "json_file" in self.__dict__:
            names = read_categories(self.json_file)
            self.__dict__["thing_classes"] = list(names.values())
            self.__dict__["thing_dataset_id_to_contiguous_id"] = {
                identifier: number for number, identifier in enumerate(names)
            }
            return self.__dict__[key]
        return super().__getattr__(key)


def register_coco_format(name: str, json_file: str, image_root: str) -> None:
    """Makes a COCO-format dataset known to Detectron2 under a name.

    The metadata has thing_classes, thing_dataset_id_to_contiguous_id (class numbers by ascending id),
    json_file, image_root and evaluator_type "coco". Files are read when first needed, not here. Registering
    the same thing twice is fine.

    Args:
        name: the name to use in DATASETS.TRAIN and DATASETS.TEST.
        json_file: path of the annotation file; "~" is expanded.
        image_root: folder that the file names in it start from; "~" is expanded.

    Raises:
        ValueError: the name already stands for something else.
    """
    json_file, image_root = os.path.expanduser(json_file), os.path.expanduser(image_root)
    if name in DatasetCatalog:
        known = MetadataCatalog.get(name)
        if isinstance(known, CocoFormatMetadata) and (known.json_file, known.image_root) == (
            json_file,
            image_root,
        ):
            return
        owner = known.json_file if isinstance(known, CocoFormatMetadata) else "another dataset of Detectron2"
        raise ValueError(
            f"The name {name!r} in {CONFIG_KEY} is already taken by {owner}. Choose another name for {json_file}."
        )
    DatasetCatalog.register(name, lambda: read_coco_json(json_file, image_root))
    settings = {"json_file": json_file, "image_root": image_root, "evaluator_type": "coco"}
    MetadataCatalog[name] = CocoFormatMetadata(name=name, **settings)


def register_datasets(cfg: CfgNode) -> None:
    """Registers every entry of `cfg.DATASETS.COCO_FORMAT`, a list of [name, json_file, image_root].

    Before that, `cfg.DATASETS.FOLDER` is read into it, see `apply_folder`.

    Raises:
        FileNotFoundError: DATASETS.FOLDER is not there.
        ValueError: an entry is not three strings, its name is taken, or DATASETS.FOLDER is at fault.
    """
    apply_folder(cfg)
    for entry in cfg.DATASETS.COCO_FORMAT:
        if not (
            isinstance(entry, (list, tuple))
            and len(entry) == 3
            and all(isinstance(part, str) and part for part in entry)
        ):
            raise ValueError(
                f"{CONFIG_KEY} has the entry {entry!r}; each must be [name, annotation file, image "
                f"folder], and the whole a list of such: [['cells_train', 'train.json', 'images']]."
            )
        register_coco_format(*entry)


def check_dataset_names(cfg: CfgNode) -> None:
    """Whether DATASETS.TRAIN, TEST and FINAL_TEST are lists of names.

    Raises:
        ValueError: one is something else, as a single text, whose letters would be taken for names.
    """
    check_types(cfg, "DATASETS.TRAIN", "DATASETS.TEST", "DATASETS.FINAL_TEST")
    for key in ("TRAIN", "TEST", "FINAL_TEST"):
        value = cfg.DATASETS[key]
        if not all(isinstance(name, str) for name in value):
            raise ValueError(f"DATASETS.{key} is {value!r}; it must be a tuple of names of datasets")


def check_test_sets(cfg: CfgNode, *, own_evaluator: bool = False) -> None:
    """Whether every dataset of DATASETS.TEST and FINAL_TEST can be read, before hours of training end in an evaluation.

    Opens no image; datasets in COCO's format and those registered in Python are read, of others it is seen that file
    and folder are there.

    Args:
        cfg: a configuration whose own datasets are registered.
        own_evaluator: what COCO's evaluation alone needs is not asked for.

    Raises:
        ValueError: one is not registered, or its annotation file or images are not there or at fault.
    """
    check_dataset_names(cfg)
    for key in ("DATASETS.TEST", "DATASETS.FINAL_TEST"):
        for name in cfg.DATASETS[key.partition(".")[2]]:
            _check_registered(name, key)
            try:
                _check_test_set(name, own_evaluator)
            except ValueError as error:
                raise ValueError(
                    f"{name!r} in {key} cannot be evaluated on: {error} A training without this evaluation has "
                    f'{key} "()".'
                ) from error


def _check_test_set(name: str, own_evaluator: bool) -> None:
    metadata = MetadataCatalog.get(name)
    json_file, root = (metadata.__dict__.get(key) for key in ("json_file", "image_root"))
    if isinstance(metadata, CocoFormatMetadata):
        check_images(read_part(name, training=False).records, root)
        return
    for kind, path, known in (("annotation file", json_file, PathManager.isfile), ("folder", root, PathManager.isdir)):
        if path and not known(path):
            raise ValueError(
                f"its {kind} {path} is not there (Detectron2's built-in datasets are looked for below the folder in "
                "the environment variable DETECTRON2_DATASETS)."
            )
    kind = metadata.get("evaluator_type")
    if json_file and kind == "coco":
        read_categories(PathManager.get_local_path(json_file))
    elif kind in (None, "coco") and not root:  # in Python
        _check_registered_records(name, DatasetCatalog.get(name), evaluated=not json_file and not own_evaluator)


def _check_registered_records(name: str, records: Any, evaluated: bool) -> None:
    check_records(name, records, len(MetadataCatalog.get(name).get("thing_classes", ())), evaluated=evaluated)


def check_images(dicts: Sequence[dict[str, Any]], image_root: str | None = None) -> None:
    """Checks that the image files exist, without opening them.

    Of more than 20000 images, 20000 spread evenly over the list are looked at, and the log says so.

    Args:
        dicts: Detectron2 dataset dicts.
        image_root: the image folder to name in the error; by default the first missing image's.

    Raises:
        ValueError: images are missing; with their number and the first few.
    """
    names = [str(record["file_name"]) for record in dicts if "file_name" in record]
    if len(names) > _CHECKED_IMAGES:
        _logger.info("Looking for %d of %d images, spread evenly.", _CHECKED_IMAGES, len(names))
        names = [names[i * len(names) // _CHECKED_IMAGES] for i in range(_CHECKED_IMAGES)]
    missing = [printable(name) for name in names if not os.path.isfile(name)]
    if missing:
        remedy = f"{_instead(missing[0], image_root or os.path.dirname(missing[0]))} the folder"
        examples = ", ".join(missing[:_NAMED_EXAMPLES]) + (", ..." if len(missing) > _NAMED_EXAMPLES else "")
        raise ValueError(
            f"{len(missing)} of {len(names)} images looked for are missing from the image folder "
            f"{image_root or os.path.dirname(missing[0])}: {examples}. {remedy} in {CONFIG_KEY} "
            "(for Detectron2's built-in datasets: the environment variable DETECTRON2_DATASETS)."
        )


def _instead(path: str, root: str) -> str:
    """What is there in the place of a missing image, and so the cause; the beginning of a remedy."""
    name = path.removeprefix(os.path.join(root, ""))
    last = name.replace("\\", "/").rpartition("/")[2]
    write = "write file_name into the annotation file as it stands below the folder, or correct"
    windows = "File names have backslashes, as Windows writes them; " if "\\" in name else ""
    if not os.path.isdir(root):
        return "That folder is not there: correct"
    if "://" in name:
        return "File names are addresses of the network: fetch the images, " + write
    for folder in dict.fromkeys((root, os.path.dirname(path))):
        entries = os.listdir(folder) if os.path.isdir(folder) else []
        for found, how in (
            ([x for x in entries if x == last], "in the folder itself, without what file_name has before it"),
            ([x for x in entries if x.lower() == last.lower()], "with other capitals"),
            ([x for x in entries if plain(x).strip() == plain(last).strip()], "with other spaces or composed letters"),
            ([x for x in entries if os.path.splitext(x)[0] == os.path.splitext(last)[0]], "with another ending"),
        ):
            if found:
                return f"{windows}{printable(found[0])} is there, {how}: {write}"
    below = [x.name for x in os.scandir(root) if x.is_dir() and os.path.isfile(os.path.join(x.path, last))]
    if below:
        return f"{windows}{printable(os.path.join(below[0], last))} is there: {write}"
    if windows:
        return f'{windows}with "/" in their place they are not there either: {write}'
    return "Restore them or correct"


def training_dicts(cfg: CfgNode) -> list[dict[str, Any]]:
    """Dataset dicts of `cfg.DATASETS.TRAIN`, checked before the first step.

    Like Detectron2's get_detection_dataset_dicts, images without objects are dropped only where
    `DATALOADER.FILTER_EMPTY_ANNOTATIONS` says so.

    Raises:
        ValueError: no or unknown names, an annotation file at fault, one without annotations, no usable box
            in all sets together, missing images, or class names that differ between the sets of
            DATASETS.TRAIN, or between them and a set of DATASETS.TEST, so that results would be mislabelled.
    """
    if not cfg.DATASETS.TRAIN:
        raise ValueError(
            f"DATASETS.TRAIN is empty. Name there what {CONFIG_KEY} or Detectron2 declares; a folder (DATASETS.FOLDER, "
            "--data) needs a split for training."
        )
    dicts: list[dict[str, Any]] = []
    parts: list[DatasetPart] = []
    for name in cfg.DATASETS.TRAIN:
        _check_registered(name, "DATASETS.TRAIN")
        try:
            part = get_detection_dataset_dicts(name, filter_empty=False)
        except FileNotFoundError as error:  # of a built-in dataset; ours is a ValueError that says more
            raise ValueError(
                f"The dataset {name!r} in DATASETS.TRAIN is not here ({error}). Detectron2's built-in data "
                "sets are looked for below the folder in the environment variable DETECTRON2_DATASETS."
            ) from error
        except (AssertionError, KeyError, TypeError):  # Detectron2 looks at some of what is checked
            _check_registered_records(name, DatasetCatalog.get(name), evaluated=False)
            raise
        if not MetadataCatalog.get(name).get("json_file"):
            _check_registered_records(name, part, evaluated=False)
        if any("annotations" not in record for record in part):
            raise ValueError(
                f"The dataset {name!r} in DATASETS.TRAIN has no annotations "
                f"({MetadataCatalog.get(name).get('json_file', 'registered elsewhere')}): it can be "
                "predicted on (DATASETS.TEST) but not trained on."
            )
        check_images(part, MetadataCatalog.get(name).get("image_root"))
        dicts.extend(part)
        parts.append(DatasetPart(name, True, part, list(MetadataCatalog.get(name).get("thing_classes", [])), []))
    check_class_names(cfg)  # after loading: Detectron2's own loader only then knows the names
    if not any(not annotation.get("iscrowd", 0) for record in dicts for annotation in record["annotations"]):
        raise ValueError(
            f"DATASETS.TRAIN {tuple(cfg.DATASETS.TRAIN)} has {len(dicts)} images but not one usable box: "
            f"there is nothing to train on. Check the annotation files in {CONFIG_KEY}."
        )
    if comm.is_main_process():
        log_findings(cfg, parts)
    if cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS:
        dicts = filter_images_with_only_crowd_annotations(dicts)
    return dicts


def log_findings(cfg: CfgNode, parts: list[DatasetPart]) -> None:
    """Logs what is odd about the training sets, and what they share with the test sets; opens no image.

    Args:
        cfg: reads DATASETS.TEST and MODEL.DETR.NUM_QUERIES.
        parts: the training sets as read.
    """
    tests = []
    for name in cfg.DATASETS.TEST:
        # Detectron2's built-in sets are known to be disjoint, and large.
        if name in DatasetCatalog and isinstance(MetadataCatalog.get(name), CocoFormatMetadata):
            try:
                tests.append(read_part(name, training=False))
            except ValueError:
                continue  # told by check_class_names
            try:
                check_images(tests[-1].records, MetadataCatalog.get(name).image_root)
            except ValueError as error:
                _logger.warning("Evaluation on %r will fail: %s", name, error)
    for finding in annotation_findings([*parts, *tests], cfg.MODEL.DETR.NUM_QUERIES):
        if finding.level != "note" and finding.kind != "bad_boxes":  # those are logged where they are read
            _logger.warning("%s", finding)


def check_class_names(cfg: CfgNode) -> None:
    """Checks that one class number means one name in all sets of DATASETS.TRAIN and DATASETS.TEST.

    A test set may have more classes at the end than the training sets. A set that names no classes is not
    compared. A test set whose names cannot be had (not registered, or its file is not here) is told in a
    warning: training does not need it.

    Raises:
        ValueError: a training set is not registered, or the names differ; with both lists.
    """
    first, reference = "", None
    for name in cfg.DATASETS.TRAIN:
        names = _class_names(name, "DATASETS.TRAIN")
        if reference is None:
            first, reference = name, names
        elif names is not None and names != reference:
            raise _mislabelled(first, reference, name, names, "DATASETS.TRAIN")
    for name in cfg.DATASETS.TEST:
        try:
            names = _class_names(name, "DATASETS.TEST")
        except ValueError as error:
            _logger.warning("Evaluation on %r will fail: %s", name, error)
            continue
        if reference is not None and names is not None and names[: len(reference)] != reference:
            raise _mislabelled(first, reference, name, names, "DATASETS.TEST")


def _check_registered(name: str, key: str) -> None:
    if name not in DatasetCatalog:
        raise ValueError(
            f"{key} names {name!r}, which is no registered dataset. Add [{name!r}, annotation file, image "
            f"folder] to {CONFIG_KEY}, or correct the name."
        )


def _class_names(name: str, key: str) -> list[str] | None:
    _check_registered(name, key)
    names = MetadataCatalog.get(name).get("thing_classes")
    return None if names is None else list(names)


def _mislabelled(first: str, reference: list[str], name: str, names: list[str], key: str) -> ValueError:
    return ValueError(
        f"Class names differ, so results would be mislabelled: {first!r} in DATASETS.TRAIN has {reference}, "
        f"{name!r} in {key} has {names} (in the order of their category ids). Give both the same categories."
    )
