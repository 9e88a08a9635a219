"""Objects365 (Shao et al., ICCV 2019), the dataset that DINO's largest models are pre-trained on.

Below Detectron2's root (the environment variable DETECTRON2_DATASETS, by default ./datasets):

    Objects365/Obj365_v1/annotations/objects365_{train,val}.json    Objects365/Obj365_v1/{train,val}/*.jpg
    Objects365/Obj365_v2/annotations/zhiyuan_objv2_{train,val}.json Objects365/Obj365_v2/{train,val}/patch*/*.jpg

Images of the second version may also lie as they are packed, below {train,val}/images/v1 and images/v2. The names
are objects365_v1_train, objects365_v1_val and the same of v2; DINO's paper (appendix D.2) validates on the first
5000 images of v2's val (objects365_v2_minival) and trains on the others too (objects365_v2_valminusminival).

Class names, 365 of them, are the annotation file's own. Nothing is read before it is needed.
"""

from __future__ import annotations

import os
from functools import partial
from typing import Any

from detectron2.data import DatasetCatalog, MetadataCatalog

from detr_family.data.datasets.coco import CocoFormatMetadata
from detr_family.data.datasets.coco_json import read_coco_json

MINIVAL = 5000  # images of v2's val, by ascending id
# The second version's annotations name these, and its archives do not hold them.
MISSING = (
    "patch16/objects365_v2_00908726.jpg",
    "patch6/objects365_v1_00320532.jpg",
    "patch6/objects365_v1_00320534.jpg",
)

# name -> annotation file, folder of images, which of the images
SPLITS: dict[str, tuple[str, str, slice]] = {
    "objects365_v1_train": ("Obj365_v1/annotations/objects365_train.json", "Obj365_v1/train", slice(None)),
    "objects365_v1_val": ("Obj365_v1/annotations/objects365_val.json", "Obj365_v1/val", slice(None)),
    "objects365_v2_train": ("Obj365_v2/annotations/zhiyuan_objv2_train.json", "Obj365_v2/train", slice(None)),
    "objects365_v2_val": ("Obj365_v2/annotations/zhiyuan_objv2_val.json", "Obj365_v2/val", slice(None)),
    "objects365_v2_minival": ("Obj365_v2/annotations/zhiyuan_objv2_val.json", "Obj365_v2/val", slice(MINIVAL)),
    "objects365_v2_valminusminival": (
        "Obj365_v2/annotations/zhiyuan_objv2_val.json", "Obj365_v2/val", slice(MINIVAL, None)
    ),
}  # fmt: skip


class Objects365Metadata(CocoFormatMetadata):
    """Class names from the annotation file, and what to do where that is not here."""

    def __getattr__(self, key: str) -> Any:
        if key.startswith("thing_") and not os.path.isfile(self.__dict__.get("json_file", "")):
            raise ValueError(_missing(self.__dict__.get("json_file", "")))
        return super().__getattr__(key)


def load_objects365(json_file: str, image_root: str, part: slice) -> list[dict[str, Any]]:
    """Dataset dicts of Detectron2, by ascending image id.

    Args:
        json_file: the annotation file.
        image_root: the folder of images.
        part: which of the images.

    Raises:
        FileNotFoundError: the annotation file is not here.
        ValueError: it is at fault.
    """
    if not os.path.isfile(json_file):
        raise FileNotFoundError(_missing(json_file))
    records = []
    packed = os.path.isdir(os.path.join(image_root, "images"))
    for record in read_coco_json(json_file, image_root)[part]:
        patch, name = record["file_name"].split("/")[-2:]
        if f"{patch}/{name}" in MISSING:
            continue
        if patch.startswith("patch") and not packed:  # the second version says images/v1/patch0/name.jpg
            record["file_name"] = os.path.join(image_root, patch, name)
        records.append(record)
    return records


def register_objects365(root: str) -> None:
    """Makes the names above known to Detectron2.

    Args:
        root: the folder that holds Objects365.
    """
    for name, (json_file, image_root, part) in SPLITS.items():
        json_file, image_root = (os.path.join(root, "Objects365", path) for path in (json_file, image_root))
        DatasetCatalog.register(name, partial(load_objects365, json_file, image_root, part))
        MetadataCatalog[name] = Objects365Metadata(
            name=name, json_file=json_file, image_root=image_root, evaluator_type="coco"
        )


def _missing(json_file: str) -> str:
    return (
        f"{json_file} is not here: put Objects365 below the folder in the environment variable DETECTRON2_DATASETS as "
        "docs/objects365.md says"
    )


register_objects365(os.path.expanduser(os.getenv("DETECTRON2_DATASETS", "datasets")))
