"""Detectors in other programs: images in, Detectron2's `Instances` out, many at a time.

```python
predictor = Predictor.from_config("output/cells/config.yaml", "output/cells/model_final.pth", batch_size=4)
instances = predictor("image.jpg")
print(predictor.names(instances), instances.scores, instances.pred_boxes)
```
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.data import transforms as T
from detectron2.modeling import build_model
from detectron2.structures import Instances
from torch import nn

from detr_family.checkpoint import DETRCheckpointer, read_class_names
from detr_family.config import load_config
from detr_family.config.ignored import warn_of_ignored
from detr_family.config.types import check_input
from detr_family.data.dataset_mapper import ResizeShortestEdge
from detr_family.data.datasets.coco import register_datasets
from detr_family.data.images import to_format
from detr_family.data.tiling import tiles
from detr_family.inference.augmentation import AugmentedDetector, augmented
from detr_family.inference.exported import ExportedDetector, fastest, is_exported
from detr_family.inference.forking import before_computing
from detr_family.inference.image_source import Given, ImageSource, is_one, read
from detr_family.inference.preparing import optimize as prepare
from detr_family.inference.tiling import merge_tiles


@dataclass(frozen=True)
class Prediction:
    """What was found in one image.

    Attributes:
        source: what was given: a path, an array ...
        image: (H, W, 3) uint8, RGB, turned by its EXIF orientation.
        instances: on the CPU, with pred_boxes (x1, y1, x2, y2 in pixels of `image`), scores in descending
            order and pred_classes.
    """

    source: ImageSource
    image: np.ndarray
    instances: Instances


class Predictor:
    """Reads, resizes and batches images as an evaluation does, and runs a detector on them.

    Only images of one size that follow each other share a batch: then nothing is padded, and the results are those
    of one by one. (What is padding is masked, but the backbone's convolutions see it.)

    Args:
        model: a detector with Detectron2's contract; it is put into evaluation mode.
        class_names: by class number; None where they are not known.
        input_format: what the model was trained with (INPUT.FORMAT): "RGB", "BGR", "L" or another of Detectron2's.
        min_size: the shorter side that images are resized to, pixels (INPUT.MIN_SIZE_TEST); 0 leaves them.
        max_size: the most that the longer side may then have (INPUT.MAX_SIZE_TEST).
        resize_rounding: how sides become whole pixels (INPUT.RESIZE_ROUNDING), "detr" or "detectron2".
        batch_size: images that go through the model together, at most.
        compile: through torch.compile; the first images take a minute, see docs/deploy.md.
        tile: larger images are also looked at in tiles of this side, pixels (see `inference.tiling`); 0: never.
        overlap: share of a tile that its neighbour has, too.
        detections: the most that are returned of an image in tiles.

    Raises:
        ValueError: a batch size below 1, a channel order or rounding that is neither, or tiles that cannot be.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        class_names: Sequence[str] | None = None,
        input_format: str = "RGB",
        min_size: int = 800,
        max_size: int = 1333,
        resize_rounding: str = "detr",
        batch_size: int = 1,
        compile: bool = False,
        tile: int = 0,
        overlap: float = 0.2,
        detections: int = 300,
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}; it must be at least 1")
        to_format(np.zeros((1, 1, 3), np.uint8), input_format)  # whether there is such a format
        before_computing()  # whoever made the model may have used threads
        self.model = model.eval()
        self.class_names = None if class_names is None else list(class_names)
        self.input_format = input_format
        self.min_size, self.max_size, self.resize_rounding = min_size, max_size, resize_rounding
        self.resize = ResizeShortestEdge([min_size, min_size], max_size, rounding=resize_rounding)
        self.batch_size = batch_size
        if compile:
            inner = model.model if isinstance(model, AugmentedDetector) else model
            inner.compile(fullgraph=True, dynamic=True)
        if tile:
            tiles(1, 1, tile, overlap)
        self.tile, self.overlap, self.detections = tile, overlap, detections

    @classmethod
    def from_config(
        cls,
        config: CfgNode | str | os.PathLike[str],
        weights: str | os.PathLike[str] | None = None,
        *,
        opts: Sequence[str] = (),
        batch_size: int = 1,
        optimize: bool | str = True,
        compile: bool = False,
        tile: int = 0,
        overlap: float = 0.2,
    ) -> Predictor:
        """Builds the detector of a configuration and loads its weights.

        The checkpoint says the class names, and with them the number of classes; the datasets need not be here.
        Where it holds none, they are those of the datasets in the configuration.

        Args:
            config: a configuration, or a YAML file: one of configs/, or the config.yaml of a training.
            weights: the checkpoint; by default MODEL.WEIGHTS of the configuration. A file that was exported knows all
                that is needed, see `from_exported`.
            opts: KEY, VALUE, KEY, VALUE ..., where `config` is a file.
            batch_size: images that go through the model together.
            optimize: prepare a detector on the CPU for inference, see `detr_family.inference.optimize`: the same
                results to rounding in less time, but `model` can be neither trained, saved, exported nor moved then.
                "bfloat16": faster still, less precise. False: run it as it is. On other devices it is in any case.
            compile: see class; it is then not prepared.
            tile, overlap: see class.

        Raises:
            FileNotFoundError: there is no such checkpoint.
            ValueError: no such configuration, a key that does not exist, or a checkpoint that is none, is not safe to
                load or does not fit; `compile` with "bfloat16".
        """
        if compile and isinstance(optimize, str):
            raise ValueError(f"optimize={optimize!r} and compile both replace what runs: ask for one of them")
        if weights is not None and is_exported(weights):
            return cls.from_exported(weights, batch_size=batch_size, tile=tile, overlap=overlap)
        if isinstance(config, CfgNode):
            cfg = config.clone()
            cfg.defrost()
        else:
            cfg = load_config(os.fspath(config), opts)
        if weights is not None:
            cfg.MODEL.WEIGHTS = os.fspath(weights)
        check_input(cfg, training=False)
        warn_of_ignored(cfg, but=["SOLVER"])
        cfg.MODEL.TIMM.PRETRAINED = False  # a whole detector's weights follow
        if is_exported(cfg.MODEL.WEIGHTS):
            return cls.from_exported(cfg.MODEL.WEIGHTS, batch_size=batch_size, tile=tile, overlap=overlap)
        names = read_class_names(cfg.MODEL.WEIGHTS) if cfg.MODEL.WEIGHTS else None
        if names is not None:
            cfg.MODEL.DETR.NUM_CLASSES = len(names)
        elif cfg.MODEL.DETR.NUM_CLASSES == -1:
            register_datasets(cfg)
        model = build_model(cfg)
        DETRCheckpointer(model, whole=True, averaged=cfg.TEST.EMA).load(cfg.MODEL.WEIGHTS)
        if optimize and not compile and (model.device.type == "cpu" or optimize is not True):
            prepare(model, precision="float32" if optimize is True else optimize)
        own_size = cfg.TEST.AUG.ENABLED  # the views are made of the image as it is
        return cls(
            augmented(cfg, model),
            class_names=names or names_of_datasets(cfg, model.num_classes),
            input_format=cfg.INPUT.FORMAT,
            min_size=0 if own_size else cfg.INPUT.MIN_SIZE_TEST,
            max_size=cfg.INPUT.MAX_SIZE_TEST,
            resize_rounding=cfg.INPUT.RESIZE_ROUNDING,
            batch_size=batch_size,
            compile=compile,
            tile=tile,
            overlap=overlap,
            detections=cfg.TEST.DETECTIONS_PER_IMAGE,
        )

    @classmethod
    def from_exported(
        cls,
        path: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
        *,
        batch_size: int = 1,
        threads: int | None = None,
        tile: int = 0,
        overlap: float = 0.2,
    ) -> Predictor:
        """Runs a file of `detr_family.export.export_model` in the place of a detector and its checkpoint.

        Class names and the size that images are resized to are in the file; where that size is fixed, images are
        stretched to it.

        Args:
            path: .onnx (onnxruntime), .xml (OpenVINO), .pt2 (torch) or .ts (TorchScript); of several files of one
                detector the fastest that can run here is taken, which is measured and told in the log.
            batch_size: images that go through the file together.
            threads: of the runtime; None leaves it to the runtime.
            tile, overlap: see class.

        Raises:
            FileNotFoundError: there is no such file.
            UserError: the runtime is not installed, or the file was not written by `export_model`.
        """
        if isinstance(path, (str, os.PathLike)):
            model = ExportedDetector(path, threads=threads, stretch=True)
        else:
            model = fastest(path, threads=threads, stretch=True)
        about = model.about
        return cls(
            model,
            class_names=model.class_names,
            min_size=0 if about["size"] else about["min_size"],
            max_size=about["max_size"],
            resize_rounding=about["resize_rounding"],
            batch_size=batch_size,
            tile=tile,
            overlap=overlap,
        )

    def __call__(self, images: ImageSource | Iterable[ImageSource], array_format: str = "BGR") -> Any:
        """Instances of one image, or a list of them for several.

        Args:
            images: a path, an address, an array (H, W, 3), a tensor (3, H, W), an image of Pillow, bytes, an opened
                file or a dict of Detectron2's, see `detr_family.inference.image_source.read`; or a list, an iterator
                or a batch (an array or tensor of four dimensions) of such.
            array_format: channel order of the arrays: "BGR", as cv2 and Detectron2's DefaultPredictor have
                it, or "RGB". Tensors are RGB.

        Returns:
            `Instances` on the CPU with pred_boxes (x1, y1, x2, y2 in pixels of the image as it was given),
            scores and pred_classes; see `names` for the classes' names.

        Raises:
            ValueError: what is no image, or one that cannot be read.
        """
        if is_one(images):
            return next(self.stream([images], array_format)).instances
        return [prediction.instances for prediction in self.stream(images, array_format)]

    def stream(
        self,
        images: Iterable[ImageSource],
        array_format: str = "BGR",
        on_error: Callable[[ImageSource, ValueError], None] | None = None,
    ) -> Iterator[Prediction]:
        """Predictions one after the other, for more images than memory holds.

        Args:
            images: of any of the kinds that a call takes, mixed or not; read as they are needed.
            array_format: channel order of the arrays.
            on_error: called with an image that cannot be read, or that the detector refuses, and why; the rest goes
                on. By default the error is raised.
        """
        if array_format not in ("RGB", "BGR"):
            raise ValueError(f"array_format is {array_format!r}; it may be 'RGB' or 'BGR'")
        batch: list[Given] = []
        for source in images:
            try:
                given = read(source, array_format, self.input_format)
            except ValueError as error:
                if on_error is None:
                    raise
                on_error(source, error)
                continue
            if batch and given.key != batch[0].key:
                yield from self._predict(batch, on_error)
                batch = []
            batch.append(given)
            if len(batch) == self.batch_size:
                yield from self._predict(batch, on_error)
                batch = []
        if batch:
            yield from self._predict(batch, on_error)

    def names(self, instances: Instances) -> list[str]:
        """The class name of each instance; "class 3" where the names are not known."""
        numbers = instances.pred_classes.tolist()
        return [f"class {i}" if self.class_names is None else self.class_names[i] for i in numbers]

    def _predict(
        self, batch: Sequence[Given], on_error: Callable[[ImageSource, ValueError], None] | None
    ) -> Iterator[Prediction]:
        entries = [given.entry for given in batch if given.entry is not None]
        try:
            # The detector's own inputs, as all of a batch then are, go through as they are.
            found = self._run(entries) if entries else self.detect([given.pixels for given in batch])
        except ValueError as error:
            if on_error is None:
                raise
            if len(batch) == 1:
                on_error(batch[0].source, error)
            else:  # one by one: the others are not to blame
                for given in batch:
                    yield from self._predict([given], on_error)
            return
        for given, instances in zip(batch, found, strict=True):
            yield Prediction(given.source, np.ascontiguousarray(given.pixels), instances)

    def detect(self, images: Sequence[np.ndarray]) -> list[Instances]:
        """What is found in images (H, W, 3) uint8, RGB, of one size: they share a batch."""
        if self.tile and max(images[0].shape[:2]) > self.tile:
            return [self._in_tiles(image) for image in images]
        return self._detect(images)

    def find(self, inputs: Sequence[tuple[np.ndarray, tuple[int, int]]]) -> list[Instances]:
        """What is found in images that `resized` made, of one size: they share a batch.

        Args:
            inputs: of each image the pixels (C, h, w), and the height and width that the boxes are for.
        """
        return self._run([{"image": torch.as_tensor(x), "height": size[0], "width": size[1]} for x, size in inputs])

    def _run(self, inputs: list[dict[str, Any]]) -> list[Instances]:
        before_computing()
        with torch.no_grad():
            outputs = self.model(inputs)
        return [output["instances"].to("cpu") for output in outputs]

    def _in_tiles(self, image: np.ndarray) -> Instances:
        height, width = image.shape[:2]
        places = [(0, 0, width, height)]
        found = self._detect([image])
        parts = tiles(height, width, self.tile, self.overlap)
        for i in range(0, len(parts), self.batch_size):
            some = parts[i : i + self.batch_size]
            found += self._detect([image[y1:y2, x1:x2] for x1, y1, x2, y2 in some])
            places += some
        return merge_tiles(found, places, height, width, self.detections)

    def _detect(self, images: Sequence[np.ndarray]) -> list[Instances]:
        """What the model finds in images of one size, RGB, looked at as a whole."""
        return self.find([(resized(x, self.resize, self.input_format), x.shape[:2]) for x in images])


def resized(image: np.ndarray, resize: ResizeShortestEdge, input_format: str) -> np.ndarray:
    """An RGB image (H, W, 3) uint8 as a detector takes it: (C, h, w) uint8."""
    seen = T.AugInput(np.ascontiguousarray(to_format(image, input_format)))
    resize(seen)
    return np.ascontiguousarray(seen.image.transpose(2, 0, 1))


def names_of_datasets(cfg: CfgNode, count: int) -> list[str] | None:
    """Class names of the first dataset of a configuration that is here and has `count` of them."""
    for name in (*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST):
        try:
            names = MetadataCatalog.get(name).get("thing_classes")
        except ValueError:  # its file is not here
            continue
        if names is not None and len(names) == count:
            return list(names)
    return None
