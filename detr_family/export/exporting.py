"""From a detector to a file that others run, checked against the detector before anyone relies on it."""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode
from torch import Tensor

from detr_family.errors import UserError, require
from detr_family.export.formats import (
    export_program,
    write_aoti,
    write_onnx,
    write_openvino,
    write_torch_export,
    write_torchscript,
)
from detr_family.export.graph import TENSORRT_PLUGIN, DetectionGraph
from detr_family.export.parity import BOX_BOUND, SCORE_BOUND, Difference, compare, sample_batches
from detr_family.inference.exported import ExportedDetector
from detr_family.inference.predictor import Predictor, resized
from detr_family.layers import deformable_attention_ops
from detr_family.layers.prepared import Prepared
from detr_family.modeling.set_detector import SetDetector

SUFFIX = {"onnx": ".onnx", "torch_export": ".pt2", "openvino": ".xml", "torchscript": ".ts", "aoti": ".pt2"}
PRECISIONS = ("float32", "float16", "int8")

_logger = logging.getLogger(__name__)


def export_model(
    model: SetDetector | Predictor | CfgNode | str | os.PathLike[str],
    format: str,
    output: str | os.PathLike[str],
    *,
    size: tuple[int, int] = (800, 1333),
    batch: int = 1,
    dynamic: bool = True,
    precision: str = "float32",
    weights: str | os.PathLike[str] | None = None,
    opts: Sequence[str] = (),
    input_format: str | None = None,
    class_names: Sequence[str] | None = None,
    device: str = "cpu",
    native: bool | None = None,
    tensorrt_plugin: bool = False,
    images: Sequence[Tensor] = (),
    calibration: Sequence[Tensor] = (),
    check: bool = True,
) -> Difference | None:
    """Write a detector as a file that runs without it, and compare the two.

    What goes in and out is the same in every format: see `detr_family.inference.exported`.

    Args:
        model: a detector; a `Predictor`; or a configuration, a config file or a name of one, with its weights.
        format: "onnx", "torch_export", "openvino", "torchscript" or "aoti".
        output: the file: .onnx, .pt2, .xml (with the weights in a .bin beside it), .ts, .pt2.
        size: height and width that it is tried with; with `dynamic=False` the only one that it takes.
        batch: images that it is tried with; with `dynamic=False` the only number that it takes.
        dynamic: leave number and size of the images open. False: everything that follows from them is constant, the
            file has no input `sizes`, and an image has to fill it.
        precision: "float32", or for openvino "float16", of the weights in the file, or "int8", of weights and
            activations. With "int8" differences are told and not bounded: only an evaluation shows what it costs.
        weights: where `model` is a configuration: the checkpoint, by default its MODEL.WEIGHTS.
        opts: where it is a file or name: KEY, VALUE, KEY, VALUE ...
        input_format: where it is a detector: the channel order that it was trained with; "RGB" by default.
        class_names: where it is a detector: names by class number.
        device: "cpu", or "cuda" for aoti, whose code is for one of the two.
        native: for torch_export and aoti: keep deformable attention as this package's operator, which is faster, and
            which whoever loads the file has to import. None: where it is built here. The others never hold it.
        tensorrt_plugin: for onnx: deformable attention as the node MultiscaleDeformableAttnPlugin_TRT, which TensorRT
            brings a plugin for and nothing else runs; there is then no comparison.
        images: (3, H, W) uint8, RGB, to compare on; by default some are drawn.
        calibration: (3, H, W) uint8, RGB, for int8: some hundred images like those that it will see.
        check: compare.

    Returns:
        the largest differences; None without a comparison.

    Raises:
        UserError: a format, precision, size or device that cannot be; a package that is missing; what the file finds
            differs from what the detector finds, by more than `SCORE_BOUND` or `BOX_BOUND` among the detections that
            score 0.1 or more. The file is then removed.
    """
    path = Path(output)
    _check_request(format, path, size, batch, precision, device, len(calibration))
    if tensorrt_plugin and format != "onnx":
        raise UserError(f"TensorRT's plugin is a node of an ONNX file; format is {format!r}")
    predictor = _predictor(model, weights, opts, input_format, class_names)
    detector: Any = predictor.model
    if native is None:
        # Compiled code needs no guards for an operator that is missing elsewhere, and is tied to this machine anyway.
        native = deformable_attention_ops.library_file(device) is not None
    native = native and format in ("torch_export", "aoti")
    graph = DetectionGraph(detector, input_format=predictor.input_format, device=torch.device(device))
    inputs = _example(size, max(batch, 2) if dynamic else batch, dynamic, device)
    about = _about(predictor, size, batch, dynamic)
    path.parent.mkdir(parents=True, exist_ok=True)
    if format == "torchscript":
        write_torchscript(graph, inputs, path, about)
    else:
        program = export_program(graph, inputs, native=native, plugin=tensorrt_plugin)
        if tensorrt_plugin and not any(TENSORRT_PLUGIN in str(node.args) for node in program.graph.nodes):
            raise UserError(f"a {about['detector']} has no deformable attention: leave out the plugin")
        about["least_size"] = _least_size(program, size, dynamic)
        if format == "onnx":
            write_onnx(program, path, about)
        elif format == "openvino":
            with tempfile.TemporaryDirectory() as folder:
                onnx_file = Path(folder) / "model.onnx"
                write_onnx(program, onnx_file, about, optional_sizes=False)
                ranges = _calibration(predictor, calibration, about) if precision == "int8" else []
                write_openvino(onnx_file, path, about, half=precision == "float16", calibration=ranges)
        elif format == "torch_export":
            write_torch_export(program, path, about)
        else:
            write_aoti(program, path, about)
    if not check or tensorrt_plugin:
        return None
    return check_exported(predictor, path, size=size, batch=batch, dynamic=dynamic, precision=precision, images=images)


def check_exported(
    predictor: Predictor,
    path: Path,
    *,
    size: tuple[int, int],
    batch: int,
    dynamic: bool,
    precision: str = "float32",
    images: Sequence[Tensor] = (),
) -> Difference:
    """Compare a file with the detector that it was written from, at two sizes and two batch sizes where these are open.

    Raises:
        UserError: see `export_model`.
    """
    height, width = size
    sizes = [size, (width - width // 4, height)] if dynamic else [size]
    counts = sorted({1, max(batch, 2)}) if dynamic else [batch]
    batches = sample_batches(sizes, counts, images)
    if not dynamic:  # an image has to fill it
        batches = [[{**x, "image": batches[0][0]["image"].roll(7 * i, 1)} for i, x in enumerate(batches[0])]]
        batches = [[{"image": x["image"]} for x in batch] for batch in batches]
    flip = predictor.input_format == "BGR"
    exported = ExportedDetector(path, input_format=predictor.input_format)
    if flip:
        batches = [[{**x, "image": x["image"].flip(0)} for x in batch] for batch in batches]
    result = compare(predictor.model, exported, batches)
    if precision == "int8" and result.compared:
        return result
    # Rounding the weights to 16 bits is what was asked for; the differences are told, and gross ones refused.
    looser = 50.0 if precision == "float16" else 1.0
    if not result.within(looser * SCORE_BOUND, looser * BOX_BOUND):
        path.unlink()
        raise UserError(
            f"{path} was removed: it differs from the detector by {result.score:.2g} of score and {result.box:.2g} "
            f"pixels, and lacks {result.missing} of {result.compared + result.missing} detections (allowed: "
            f"{looser * SCORE_BOUND:g}, {looser * BOX_BOUND:g} and none)"
        )
    return result


def _check_request(
    format: str, path: Path, size: tuple[int, int], batch: int, precision: str, device: str, calibration: int
) -> None:
    if format not in SUFFIX:
        raise UserError(f"there is no export to {format!r}; there is one to {', '.join(SUFFIX)}")
    if path.suffix != SUFFIX[format]:
        raise UserError(f"{path} must end in {SUFFIX[format]}, which tells what it is when it is opened")
    if min(size) < 1 or batch < 1:
        raise UserError(f"size {size[0]}x{size[1]} and batch {batch} must be at least 1")
    if precision not in PRECISIONS or (precision != "float32" and format != "openvino"):
        raise UserError(f"precision is {precision!r}; it may be 'float32', or for openvino 'float16' or 'int8'")
    if precision == "int8":
        if not calibration:
            raise UserError("int8 needs images like those that it will see, to calibrate on: --data DIR")
        require("nncf", "int8")
    if device not in ("cpu", "cuda") or (device == "cuda" and format != "aoti"):
        raise UserError(f"device is {device!r}; it may be 'cpu', or for aoti 'cuda': the other files run on any")
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("there is no CUDA device here, and code for one is compiled on one: export with device cpu")
    if format in ("onnx", "openvino"):
        for name in ("onnx", "onnxscript", "onnxruntime") if format == "onnx" else ("onnx", "onnxscript", "openvino"):
            require(name, format)


def _predictor(
    model: SetDetector | Predictor | CfgNode | str | os.PathLike[str],
    weights: str | os.PathLike[str] | None,
    opts: Sequence[str],
    input_format: str | None,
    class_names: Sequence[str] | None,
) -> Predictor:
    if isinstance(model, Predictor):
        predictor = model
    elif isinstance(model, SetDetector):
        predictor = Predictor(model, class_names=class_names, input_format=input_format or "RGB")
    else:
        predictor = Predictor.from_config(model, weights, opts=opts, optimize=False)
    if not isinstance(predictor.model, SetDetector):
        raise UserError(f"a {type(predictor.model).__name__} cannot be exported: a detector of this package is needed")
    if any(isinstance(layer, Prepared) for layer in predictor.model.modules()):
        raise UserError(
            "this detector was prepared for inference on the CPU and cannot be exported: give export_model the "
            "configuration, or Predictor.from_config(..., optimize=False)"
        )
    if predictor.input_format not in ("RGB", "BGR"):
        raise UserError(f"a detector for images of INPUT.FORMAT {predictor.input_format!r} cannot be exported yet")
    return predictor


def _example(size: tuple[int, int], batch: int, dynamic: bool, device: str) -> tuple[Tensor, ...]:
    images = torch.zeros(batch, 3, *size, dtype=torch.uint8, device=device)
    if not dynamic:
        return (images,)
    return images, torch.tensor([size], device=device).repeat(batch, 1)


def _about(predictor: Predictor, size: tuple[int, int], batch: int, dynamic: bool) -> dict[str, Any]:
    model: Any = predictor.model
    return {
        "detector": type(model).__name__,
        "num_classes": model.num_classes,
        "class_names": predictor.class_names,
        "min_size": predictor.min_size,
        "max_size": predictor.max_size,
        "resize_rounding": predictor.resize_rounding,
        "size": None if dynamic else list(size),
        "batch": None if dynamic else batch,
        "least_size": [1, 1],
        "torch": torch.__version__,
    }


def _calibration(predictor: Predictor, images: Sequence[Tensor], about: dict[str, Any]) -> list[dict[str, Any]]:
    """Images (3, H, W) uint8, RGB, as the file's inputs by name, resized as the predictor does."""
    inputs = []
    for image in images:
        pixels = resized(image.permute(1, 2, 0).numpy(), predictor.resize, "RGB")
        if about["size"]:
            stretched = torch.nn.functional.interpolate(
                torch.from_numpy(pixels)[None].float(), about["size"], mode="bilinear", antialias=True
            )
            pixels = stretched[0].round().byte().numpy()
        entry = {"images": pixels[None].repeat(about["batch"] or 1, 0)}
        if not about["size"]:
            entry["sizes"] = np.array([pixels.shape[1:]])
        inputs.append(entry)
    return inputs


def _least_size(program: Any, size: tuple[int, int], dynamic: bool) -> list[int]:
    """Height and width that the program's own ranges allow."""
    if not dynamic:
        return list(size)
    images = next(node for node in program.graph.nodes if node.name == "images")
    ranges = program.range_constraints
    return [max(1, int(ranges[images.meta["val"].shape[i].node.expr].lower)) for i in (2, 3)]
