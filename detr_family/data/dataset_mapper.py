"""From a dataset dict to what the detectors take in, with DETR's augmentation (arXiv 2005.12872, A.4).

Detectron2's DatasetMapper with one difference: in training, half of the images are first resized to a
shorter side of `INPUT.CROP.RESIZE` and cropped (`INPUT.CROP.TYPE`, `INPUT.CROP.SIZE`); all are then resized
to a shorter side of `INPUT.MIN_SIZE_TRAIN` and flipped half of the time. The official code flips first: the
same in distribution, as where the crop lies is as likely left as right.
"""

import copy
import sys
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetMapper, build_detection_test_loader, get_detection_dataset_dicts
from detectron2.data import transforms as T
from detectron2.data.detection_utils import SizeMismatchError
from PIL import Image
from torch.utils.data import DataLoader

from detr_family.config.types import check_input
from detr_family.data.augmentation import TorchvisionTransforms, scale_jitter
from detr_family.data.images import ImageError, check_depth, read_image, unreadable
from detr_family.data.reduced import check_draft, read_reduced, scaled
from detr_family.data.workers import outliving_sigterm

_CROP_PROBABILITY = 0.5
_REMEDY = (
    "Restore the file, or remove its entry from the annotation file; the image folder is given in "
    "DATASETS.COCO_FORMAT. tools/check_dataset.py lists all such images."
)
# The longer side before a crop, in units of the shorter: an image of 10000x20 must not become one of 200000x400.
_LONGEST_BEFORE_CROP = 16


class ResizeShortestEdge(T.ResizeShortestEdge):
    """Detectron2's, with the papers' rounding for choice, for images of any shape: no side becomes 0 pixels.

    Args:
        short_edge_length: sides to choose from, or the bounds of a range, pixels; 0 leaves an image as it is.
        max_size: the most that the longer side may have.
        sample_style: "choice" or "range".
        interp: PIL's interpolation.
        rounding: INPUT.RESIZE_ROUNDING, "detectron2" or "detr".

    Raises:
        ValueError: `rounding` is neither.
    """

    def __init__(
        self,
        short_edge_length: Sequence[int],
        max_size: int = sys.maxsize,
        sample_style: str = "range",
        interp: int = Image.Resampling.BILINEAR,
        *,
        rounding: str = "detectron2",
    ) -> None:
        super().__init__(short_edge_length, max_size, sample_style, interp)
        if rounding not in ("detectron2", "detr"):
            raise ValueError(f"INPUT.RESIZE_ROUNDING is {rounding!r}; it may be 'detectron2' or 'detr'")
        self.rounding = rounding
        self.size_of = released_shape if rounding == "detr" else self.get_output_shape

    def get_transform(self, image: np.ndarray) -> T.Transform:
        """The resizing of one image, (H, W) or (H, W, C)."""
        h, w = image.shape[:2]
        if self.is_range:
            size = int(np.random.randint(self.short_edge_length[0], self.short_edge_length[1] + 1))
        else:
            size = int(np.random.choice(self.short_edge_length))
        if size == 0:
            return T.NoOpTransform()
        new_h, new_w = self.size_of(h, w, size, self.max_size)
        return T.ResizeTransform(h, w, max(new_h, 1), max(new_w, 1), self.interp)


def released_shape(h: int, w: int, size: int, max_size: int) -> tuple[int, int]:
    """Height and width of a resized image as in the papers' releases, pixels.

    The shorter side becomes `size`; where the longer would then be above `max_size`, the shorter becomes what
    `max_size` allows, rounded. The longer side follows from the shorter, its fraction cut off, and so it may come out
    above `max_size` by the rounding of the shorter.
    """
    shorter, longer = min(h, w), max(h, w)
    if longer / shorter * size > max_size:
        size = round(max_size * shorter / longer)
    if shorter == size:
        return h, w
    return (int(size * h / w), size) if w < h else (size, int(size * w / h))


class DETRDatasetMapper(DatasetMapper):
    """Maps a Detectron2 dataset dict to the model's input.

    The result keeps file_name, height, width and image_id, and has

    * image: uint8 tensor (C, H, W) in `INPUT.FORMAT`, after augmentation,
    * instances (training only): with gt_boxes (absolute x1, y1, x2, y2 in the augmented image) and
      gt_classes. Crowd annotations and boxes that the crop left empty are gone; none left is a legal result.
    """

    @classmethod
    def from_config(cls, cfg: CfgNode, is_train: bool = True) -> dict[str, Any]:
        """Constructor arguments of Detectron2's DatasetMapper for a config.

        Args:
            cfg: reads INPUT.*, and MODEL.MASK_ON, KEYPOINT_ON and LOAD_PROPOSALS as Detectron2 does.
            is_train: training augmentation and instances, or only the resizing to MIN_SIZE_TEST.

        Raises:
            ValueError: INPUT.CROP.RESIZE is empty though INPUT.CROP.ENABLED, INPUT.RESIZE_ROUNDING is unknown, or sizes
                that cannot be; MODEL.KEYPOINT_ON without keypoints.
        """
        check_input(cfg, training=is_train)
        try:
            arguments: dict[str, Any] = super().from_config(cfg, is_train)
        except AttributeError as error:  # of the metadata
            if not cfg.MODEL.KEYPOINT_ON:
                raise
            raise ValueError(
                f"MODEL.KEYPOINT_ON is True, and the datasets have no keypoints ({error}): set it to False; the "
                "detectors find boxes alone"
            ) from error
        rounding = cfg.INPUT.RESIZE_ROUNDING
        arguments["augmentations"] = [
            ResizeShortestEdge(
                a.short_edge_length, a.max_size, "range" if a.is_range else "choice", a.interp, rounding=rounding
            )
            if type(a) is T.ResizeShortestEdge
            else a
            for a in arguments["augmentations"]
        ]
        if is_train and cfg.INPUT.SCALE_JITTER.ENABLED:
            others = [a for a in arguments["augmentations"] if not isinstance(a, (T.ResizeShortestEdge, T.RandomCrop))]
            arguments["augmentations"] = [*scale_jitter(cfg), *others]
        elif is_train and cfg.INPUT.CROP.ENABLED:
            if not cfg.INPUT.CROP.RESIZE:
                raise ValueError("INPUT.CROP.RESIZE is empty; give shorter sides in pixels, e.g. [400, 500, 600].")
            # Detectron2 puts its crop first and always applies it.
            crop = arguments["augmentations"][0]
            sides = list(cfg.INPUT.CROP.RESIZE)
            most = _LONGEST_BEFORE_CROP * max(sides)
            resize = ResizeShortestEdge(sides, most, sample_style="choice", rounding=rounding)
            arguments["augmentations"][0] = T.RandomApply(T.AugmentationList([resize, crop]), _CROP_PROBABILITY)
        return arguments

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Detectron2's arguments, or a configuration and is_train."""
        super().__init__(*args, **kwargs)
        cfg = args[0] if args else kwargs.get("cfg")
        steps = cfg.INPUT.TORCHVISION if isinstance(cfg, CfgNode) and self.is_train else []
        self.transforms = TorchvisionTransforms(steps, self.image_format) if steps else None
        self.draft = cfg if isinstance(cfg, CfgNode) and self.is_train and cfg.INPUT.DRAFT else None
        if self.draft is not None:
            check_draft(self.draft)

    def __call__(self, dataset_dict: dict[str, Any]) -> dict[str, Any]:
        """See class.

        Args:
            dataset_dict: one image in Detectron2's dataset format; left as it is.

        Raises:
            ImageError: the image is missing, damaged, of 16 or more bits a channel, or of another size than
                the dict says; with the file's name.
        """
        path = str(dataset_dict["file_name"])
        check_depth(path, _REMEDY)
        try:
            mapped: dict[str, Any] = (
                super().__call__(copy.copy(dataset_dict)) if self.draft is None else self._reduced(dataset_dict)
            )
        except SizeMismatchError as error:
            raise ImageError(
                f"{path}: {error} (Sizes are compared after turning the image by its EXIF orientation.)"
            ) from error
        except Exception as error:  # whatever a damaged file makes the decoder raise
            if isinstance(error, (OSError, MemoryError)):
                raise unreadable(path, error, _REMEDY) from error
            self._check_readable(path)
            raise ImageError(f"{path} can be read, but not prepared: {self._reason(error)}") from error
        return mapped if self.transforms is None else self.transforms(mapped)

    def _check_readable(self, path: str) -> None:
        try:
            read_image(path, self.image_format)
        except ImageError:
            raise
        except Exception as error:
            raise unreadable(path, error, _REMEDY) from error

    def _reason(self, error: Exception) -> str:
        wanted = {"MASK_ON": self.use_instance_mask, "KEYPOINT_ON": self.use_keypoint}
        keys = " and ".join(f"MODEL.{key}" for key, is_on in wanted.items() if is_on)
        what = f"{type(error).__name__}: {' '.join(str(error).split())}"
        if keys:
            return f"{keys} is on, which asks for more than boxes of every annotation: set it to False ({what})"
        return f"look to its annotations and to INPUT ({what})"

    def _reduced(self, dataset_dict: dict[str, Any]) -> dict[str, Any]:
        """What Detectron2's mapper does in training, with an image that INPUT.DRAFT may have decoded smaller."""
        assert self.draft is not None
        image, factors = read_reduced(dataset_dict, self.draft, self.image_format)
        given = T.AugInput(image)
        transforms = self.augmentations(given)
        mapped = {key: value for key, value in dataset_dict.items() if key != "annotations"}
        mapped["image"] = torch.from_numpy(np.ascontiguousarray(given.image.transpose(2, 0, 1)))
        if "annotations" in dataset_dict:
            mapped["annotations"] = scaled(dataset_dict["annotations"], factors)
            self._transform_annotations(mapped, transforms, given.image.shape[:2])
        return mapped


def build_test_loader(cfg: CfgNode, dataset_name: str) -> DataLoader:
    """Batches of a test set, each image on one process once.

    Only images of one size share a batch: then nothing is padded, and the results are those of one by one. (What is
    padding is masked, but the backbone's convolutions see it.)

    Args:
        cfg: reads INPUT.*, TEST.IMS_PER_BATCH (images together, on each process), DATALOADER.NUM_WORKERS, and
            TEST.AUG.ENABLED: images are then left in their own size.
        dataset_name: a registered name.

    Raises:
        ValueError: TEST.IMS_PER_BATCH is below 1.
    """
    count = cfg.TEST.IMS_PER_BATCH
    if count < 1:
        raise ValueError(f"TEST.IMS_PER_BATCH is {count}; it must be at least 1")
    mapper = DETRDatasetMapper(cfg, False)
    if cfg.TEST.AUG.ENABLED:  # `inference.augmentation` makes the views
        mapper.augmentations = T.AugmentationList([])
    if count == 1:
        alone: DataLoader = build_detection_test_loader(cfg, dataset_name, mapper=mapper)
        alone.worker_init_fn = outliving_sigterm()
        return alone
    dicts = get_detection_dataset_dicts([dataset_name], filter_empty=False)
    workers = cfg.DATALOADER.NUM_WORKERS
    loader: DataLoader = build_detection_test_loader(dicts, mapper=mapper, num_workers=workers)
    batches: Any = loader.batch_sampler
    groups: dict[object, list[int]] = defaultdict(list)
    for index in batches.sampler:  # those of this process
        record = dicts[index]
        groups[(record["height"], record["width"]) if "height" in record else index].append(index)
    parts = [group[i : i + count] for group in groups.values() for i in range(0, len(group), count)]
    return DataLoader(
        loader.dataset,
        batch_sampler=parts,
        num_workers=workers,
        collate_fn=loader.collate_fn,
        worker_init_fn=outliving_sigterm(),
    )
