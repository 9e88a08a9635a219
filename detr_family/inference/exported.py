"""Exported detectors run like any other: a file in the place of a model.

A file that `detr_family.export.export_model` wrote takes `images` (B, 3, H, W) uint8 in RGB and, unless its size is
fixed, `sizes` (B, 2) int64, the height and width that each image fills (0: all of it); it gives `boxes` (B, k, 4) as
x1, y1, x2, y2 in pixels of the input, `scores` (B, k) and `labels` (B, k), best first. What it says about itself:

- detector: the meta-architecture.
- class_names: a list by class number, or nothing.
- min_size, max_size, resize_rounding: how images are resized, as INPUT.MIN_SIZE_TEST, MAX_SIZE_TEST, RESIZE_ROUNDING.
- batch, size: of a fixed one; null where they are open.
- least_size: height and width that an image must have at least.
"""

from __future__ import annotations

import json
import logging
import os
import threading
import time
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.modeling.postprocessing import detector_postprocess
from detectron2.structures import Boxes, Instances
from torch import Tensor, nn
from torch.nn import functional as F

from detr_family.data.images import ImageError
from detr_family.errors import UserError, require

ABOUT = "detr_family"  # the key, or file, under which a format keeps what the file says about itself
SUFFIXES = (".onnx", ".pt2", ".xml", ".ts")
_PASSES = 3  # that are timed

_logger = logging.getLogger(__name__)

# (B, 3, H, W) uint8, and (B, 2) int64 unless the size is fixed -> boxes, scores, labels
Run = Callable[..., Sequence[Tensor]]


def is_exported(path: str | os.PathLike[str] | None) -> bool:
    """Whether a path is that of an exported detector, by its suffix."""
    return path is not None and Path(path).suffix.lower() in SUFFIXES


class ExportedDetector(nn.Module):
    """An exported detector with Detectron2's contract: a list of dicts in, `Instances` out.

    Args:
        path: an ONNX file (.onnx), a program or package of torch.export or AOTInductor (.pt2), OpenVINO's IR (.xml)
            or TorchScript (.ts).
        input_format: the channel order of the images that it is given, "RGB" or "BGR".
        threads: threads of the runtime; None leaves it to the runtime. (.pt2 and .ts: torch.set_num_threads.)
        stretch: a file of fixed size gets images of another one stretched to it, which changes what is found a
            little. False: it refuses them.

    Attributes:
        about: what the file says about itself, see the module.
        class_names: by class number; None where the file does not say.

    Raises:
        FileNotFoundError: there is no such file.
        UserError: the runtime is not installed, or the file was not written by `export_model`.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        input_format: str = "RGB",
        threads: int | None = None,
        stretch: bool = False,
    ) -> None:
        super().__init__()
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"there is no exported detector {str(path)!r}")
        self.path = path
        self.stretch = stretch
        self.flip = input_format == "BGR"
        self.opened_in = os.getpid()
        self.run, self.about = _open(path, threads)
        self.class_names: list[str] | None = self.about.get("class_names")
        self.num_classes: int = self.about["num_classes"]

    @torch.no_grad()
    def forward(self, batched_inputs: Sequence[dict[str, Any]]) -> list[dict[str, Instances]]:
        """As a detector in evaluation mode.

        Args:
            batched_inputs: one dict per image with `image`, (3, H, W) of values in [0, 255], and optionally `height`
                and `width` of the result.

        Raises:
            ImageError: an image that is smaller than the file can take, or without `stretch` of another size than the
                fixed one.
            UserError: the file was opened before a fork.
        """
        if self.opened_in != os.getpid() and self.path.suffix.lower() in (".onnx", ".xml"):
            raise UserError(
                f"{self.path.name} was opened in process {self.opened_in}; this one, {os.getpid()}, was forked from it "
                "without the runtime's threads: open the file in each process, after the fork"
            )
        fixed: tuple[int, int] | None = self.about["size"] and tuple(self.about["size"])
        images = [self._image(x, fixed) for x in batched_inputs]
        seen: list[tuple[int, int]] = [(image.shape[1], image.shape[2]) for image in images]
        size = fixed or (max(h for h, _ in seen), max(w for _, w in seen))
        least = self.about["least_size"]
        if size[0] < least[0] or size[1] < least[1]:
            raise ImageError(
                f"an image of {size[0]}x{size[1]} is smaller than {self.path.name} takes, {least[0]}x{least[1]}: "
                "resize it, or use the checkpoint"
            )
        batch = torch.stack([F.pad(x, (0, size[1] - x.shape[2], 0, size[0] - x.shape[1])) for x in images])
        count = self.about["batch"] or len(images)
        outputs = [self._run(part, seen[i : i + count]) for i, part in _parts(batch, count)]
        boxes, scores, labels = (torch.cat(x) for x in zip(*outputs, strict=True))
        results = []
        for i, x in enumerate(batched_inputs):
            found = Instances(seen[i], pred_boxes=Boxes(boxes[i].clone()), scores=scores[i], pred_classes=labels[i])
            height, width = x.get("height", x["image"].shape[1]), x.get("width", x["image"].shape[2])
            results.append({"instances": detector_postprocess(found, height, width)})
        return results

    def _image(self, x: dict[str, Any], fixed: tuple[int, int] | None) -> Tensor:
        image: Tensor = x["image"]
        if image.dim() != 3 or image.shape[0] != 3 or 0 in image.shape:
            raise ValueError(
                f"{x.get('file_name', 'an image')} has shape {tuple(image.shape)}; (3, height, width) with at least "
                "one pixel is needed"
            )
        if fixed is not None and tuple(image.shape[1:]) != fixed:
            if not self.stretch:
                raise ImageError(
                    f"an image of {image.shape[1]}x{image.shape[2]} is not of the only size that {self.path.name} "
                    f"takes, {fixed[0]}x{fixed[1]}: resize it, pass stretch=True, or export without --fixed"
                )
            image = F.interpolate(image[None].float(), fixed, mode="bilinear", antialias=True)[0]
        if image.is_floating_point():
            image = image.round().clamp(0, 255).byte()
        return image.flip(0).cpu() if self.flip else image.cpu()

    def _run(self, images: Tensor, seen: Sequence[tuple[int, int]]) -> tuple[Tensor, ...]:
        """Of as many images as a file of fixed batch size takes, or fewer."""
        count = self.about["batch"]
        missing = 0 if count is None else count - len(images)
        given = F.pad(images, (0, 0) * 3 + (0, missing)) if missing else images
        inputs = (given,) if self.about["size"] else (given, torch.tensor(seen, dtype=torch.int64))
        return tuple(x[: len(images)] for x in self.run(*inputs))


def fastest(
    paths: Sequence[str | os.PathLike[str]], *, threads: int | None = None, stretch: bool = False
) -> ExportedDetector:
    """The file of one detector that takes least time here, of those whose runtime is installed; the log says which.

    One image of the size that the files resize to goes through each of them, once to warm up and then in turn.

    Args:
        paths: files of one detector in several formats.
        threads, stretch: see `ExportedDetector`.

    Raises:
        FileNotFoundError: there is no such file.
        UserError: no file can be opened, or they are of several detectors.
    """
    opened: list[ExportedDetector] = []
    reasons: list[str] = []
    for path in paths:
        try:
            opened.append(ExportedDetector(path, threads=threads, stretch=stretch))
        except UserError as error:
            reasons.append(str(error) if os.fspath(path) in str(error) else f"{path}: {error}")
    if not opened:
        raise UserError("; ".join(reasons) or "no exported file was given")
    for other in opened[1:]:
        differing = [key for key in _OF_THE_DETECTOR if other.about.get(key) != opened[0].about.get(key)]
        if differing:
            raise UserError(f"{opened[0].path} and {other.path} are no forms of one detector: {differing[0]} differs")
    for reason in reasons:
        _logger.warning("Left out: %s", reason)
    if len(opened) == 1:
        return opened[0]
    seconds = _seconds([(detector, _image_for(detector)) for detector in opened])
    best = min(range(len(opened)), key=seconds.__getitem__)
    told = ", ".join(f"{detector.path.name} {s:.3f} s" for detector, s in zip(opened, seconds, strict=True))
    _logger.info("An image takes %s: %s is used", told, opened[best].path.name)
    return opened[best]


_OF_THE_DETECTOR = ("detector", "num_classes", "class_names", "min_size", "max_size", "resize_rounding")


def _image_for(detector: ExportedDetector) -> Tensor:
    """Noise of the file's own size, or of the 4:3 that it resizes to."""
    short = detector.about["min_size"] or 480
    size = detector.about["size"] or (short, min(short * 4 // 3, max(detector.about["max_size"], short)))
    return torch.randint(256, (3, *size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def _seconds(cases: Sequence[tuple[ExportedDetector, Tensor]]) -> list[float]:
    """The least time of a pass of each, measured in turn."""
    times: list[list[float]] = [[] for _ in cases]
    for number in range(1 + _PASSES):
        for (detector, image), taken in zip(cases, times, strict=True):
            begin = time.perf_counter()
            detector([{"image": image}])
            if number:
                taken.append(time.perf_counter() - begin)
    return [min(taken) for taken in times]


def _parts(batch: Tensor, count: int) -> list[tuple[int, Tensor]]:
    return [(i, batch[i : i + count]) for i in range(0, len(batch), count)]


def _open(path: Path, threads: int | None) -> tuple[Run, dict[str, Any]]:
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        raise UserError(f"{path} is no exported detector by its suffix: {', '.join(SUFFIXES)} are known")
    opened = {".onnx": _open_onnx, ".xml": _open_openvino, ".ts": _open_torchscript, ".pt2": _open_pt2}[suffix]
    try:
        run, text = opened(path, threads)
    except UserError:
        raise
    except Exception as error:  # whatever a damaged file makes a runtime raise
        raise UserError(f"{path} cannot be opened ({type(error).__name__}: {str(error).strip()[:300]})") from error
    if not text:
        raise UserError(f"{path} says nothing about itself: it was not written by detr_family.export.export_model")
    return run, json.loads(text)


def _open_onnx(path: Path, threads: int | None) -> tuple[Run, str | None]:
    onnxruntime = require("onnxruntime", "onnx")
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    if threads is not None:
        options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(str(path), options, providers=onnxruntime.get_available_providers())
    about = session.get_modelmeta().custom_metadata_map.get(ABOUT)

    def run(*inputs: Tensor) -> list[Tensor]:
        named = dict(zip(("images", "sizes"), (x.numpy() for x in inputs), strict=False))
        return [torch.from_numpy(x) for x in session.run(["boxes", "scores", "labels"], named)]

    return run, about


def _open_openvino(path: Path, threads: int | None) -> tuple[Run, str | None]:
    openvino = require("openvino", "openvino")
    core = openvino.Core()
    model = core.read_model(str(path))
    about = model.get_rt_info([ABOUT]).astype(str) if model.has_rt_info([ABOUT]) else None
    # float32 also where the processor could do with less: what was exported is what runs.
    settings: dict[str, Any] = {"INFERENCE_PRECISION_HINT": "f32"}
    if threads is not None:
        settings["INFERENCE_NUM_THREADS"] = threads
    compiled = core.compile_model(model, "CPU", settings)
    one_at_a_time = threading.Lock()  # a compiled model has one request, which its calls share

    def run(*inputs: Tensor) -> list[Tensor]:
        with one_at_a_time:
            outputs = compiled([x.numpy() for x in inputs])
            return [torch.from_numpy(np.array(outputs[i])) for i in range(3)]

    return run, about


def _open_torchscript(path: Path, threads: int | None) -> tuple[Run, str | None]:
    files = {ABOUT: ""}
    module = torch.jit.load(str(path), map_location="cpu", _extra_files=files)
    text: Any = files[ABOUT]
    return lambda *inputs: module(*inputs), text.decode() if isinstance(text, bytes) else text


def _open_pt2(path: Path, threads: int | None) -> tuple[Run, str | None]:
    import detr_family.layers.deformable_attention  # noqa: F401  (the program may hold its operator)

    with zipfile.ZipFile(path) as archive:
        compiled = any("aotinductor" in name for name in archive.namelist())
    if compiled:
        package = torch._inductor.aoti_load_package(str(path))
        about = package.get_metadata()
        on_cuda = about.get("AOTI_DEVICE_KEY") == "cuda"
        if on_cuda and not torch.cuda.is_available():
            raise UserError(f"{path} was compiled for CUDA, and there is no CUDA device here")
        device = torch.device("cuda" if on_cuda else "cpu")

        def run(*inputs: Tensor) -> list[Tensor]:
            return [x.cpu() for x in package(*(x.to(device) for x in inputs))]

        return run, about.get(ABOUT)
    files = {ABOUT: ""}
    program = torch.export.load(path, extra_files=files)
    # Guards compare sizes with those of the example, as one image with two; what the graph cannot take it asserts.
    module = program.module(check_guards=False)
    return lambda *inputs: module(*inputs), files[ABOUT]  # not a part: such a module refuses train()
