"""One function per file format: a `DetectionGraph` in, a file out.

Every file has the same inputs and outputs in the same order, and a text about itself (`about`) where its format keeps
such: see `detr_family.inference.exported`.
"""

from __future__ import annotations

import importlib
import json
import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.export import Dim, ExportedProgram

from detr_family.errors import require
from detr_family.export.graph import DetectionGraph, traceable
from detr_family.inference.exported import ABOUT

OPSET = 20  # of ONNX's own operators, the first with GridSample for any number of dimensions
OUTPUTS = ("boxes", "scores", "labels")


def export_program(
    graph: DetectionGraph, inputs: tuple[Tensor, ...], *, native: bool, plugin: bool = False
) -> ExportedProgram:
    """torch.export of a graph.

    Args:
        graph: the detector.
        inputs: images (B, 3, H, W) and sizes (B, 2), of which B, H and W stay open; images alone fixes all three.
        native: keep deformable attention as one operator of ours.
        plugin: as TensorRT's node, for an ONNX file.
    """
    symbolic_shapes: Any = importlib.import_module("torch.fx.experimental._config")
    shapes: Any = None
    if len(inputs) == 2:
        shapes = ({0: Dim.DYNAMIC, 2: Dim.DYNAMIC, 3: Dim.DYNAMIC}, {0: Dim.DYNAMIC})
    # Oblivious: a size of 1 (one image, one row of tokens) is no special case that the program then refuses.
    with traceable(native=native, plugin=plugin), symbolic_shapes.patch(backed_size_oblivious=True), _quiet():
        return torch.export.export(graph, inputs, dynamic_shapes=shapes, strict=False)


def write_torch_export(program: ExportedProgram, path: Path, about: dict[str, Any]) -> None:
    """A .pt2 program: `torch.export.load(path).module(check_guards=False)`."""
    with _quiet():
        torch.export.save(program, path, extra_files={ABOUT: json.dumps(about)})


def write_onnx(program: ExportedProgram, path: Path, about: dict[str, Any], *, optional_sizes: bool = True) -> None:
    """An ONNX file of opset `OPSET` without operators of ours; weights beyond 2 GB would lie in a file beside it.

    Args:
        program: of plain operators.
        path: of the file.
        about: goes into the metadata, each value as text.
        optional_sizes: give `sizes` a default, zeros, so that a session may be run with images alone. Not every
            other runtime knows such inputs.
    """
    onnx = require("onnx", "onnx")
    require("onnxscript", "onnx")
    names = ["images", "sizes"][: len(program.graph_signature.user_inputs)]
    with _quiet():
        exported = torch.onnx.export(
            program, dynamo=True, opset_version=OPSET, input_names=names, output_names=list(OUTPUTS), verbose=False
        )
    assert exported is not None
    model = exported.model_proto
    _name_dimensions(model, program)
    if optional_sizes and len(names) == 2:
        _give_default(onnx, model)
    names_of_classes = json.dumps(about["class_names"])  # also by itself, for other programs
    for key, value in ((ABOUT, json.dumps(about)), ("class_names", names_of_classes)):
        entry = model.metadata_props.add()
        entry.key, entry.value = key, value
    onnx.checker.check_model(model)
    onnx.save_model(model, str(path))


def _name_dimensions(model: Any, program: ExportedProgram) -> None:
    """The open dimensions by names that say something, in place of the exporter's symbols."""
    if len(model.graph.input) < 2:
        return
    images = model.graph.input[0].type.tensor_type.shape.dim
    names = {images[i].dim_param: name for i, name in ((0, "batch"), (2, "height"), (3, "width"))}
    for value in (*model.graph.input, *model.graph.output, *model.graph.value_info):
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param in names:
                dim.dim_param = names[dim.dim_param]


def _give_default(onnx: Any, model: Any) -> None:
    """`sizes` gets an initializer of one row of zeros, which is spread over the batch."""
    import numpy as np

    graph = model.graph
    for node in graph.node:
        for i, name in enumerate(node.input):
            if name == "sizes":
                node.input[i] = "sizes_of_batch"
    graph.input[1].type.tensor_type.shape.dim[0].dim_param = "batch_or_1"
    graph.initializer.append(onnx.numpy_helper.from_array(np.zeros((1, 2), np.int64), "sizes"))
    graph.initializer.append(onnx.numpy_helper.from_array(np.array([2], np.int64), "sizes_columns"))
    make = onnx.helper.make_node
    first = [
        make("Shape", ["images"], ["sizes_rows"], start=0, end=1),
        make("Concat", ["sizes_rows", "sizes_columns"], ["sizes_shape"], axis=0),
        make("Expand", ["sizes", "sizes_shape"], ["sizes_of_batch"]),
    ]
    rest = list(graph.node)
    del graph.node[:]
    graph.node.extend([*first, *rest])


def write_openvino(
    onnx_file: Path, path: Path, about: dict[str, Any], *, half: bool, calibration: Sequence[dict[str, Any]] = ()
) -> None:
    """OpenVINO's IR: `path` (.xml) and the weights beside it (.bin).

    Args:
        onnx_file: from `write_onnx`, without optional inputs.
        path: of the .xml file.
        about: goes into the file's runtime information.
        half: keep the weights in float16; what is computed with is the device's choice.
        calibration: inputs by name. Where there are any, weights and activations of convolutions and products become
            8 bits, by NNCF; the activations' ranges are those of these inputs.
    """
    openvino = require("openvino", "openvino")
    model = openvino.convert_model(str(onnx_file))
    if calibration:
        nncf = require("nncf", "int8")
        with _quiet():
            model = nncf.quantize(
                model,
                nncf.Dataset(calibration),
                model_type=nncf.ModelType.TRANSFORMER,  # softmax and layer norms stay as they are
                preset=nncf.QuantizationPreset.MIXED,  # activations after ReLU from 0 on
                subset_size=len(calibration),
            )
    model.set_rt_info(json.dumps(about), [ABOUT])
    openvino.save_model(model, str(path), compress_to_fp16=half)


def write_torchscript(graph: DetectionGraph, inputs: tuple[Tensor, ...], path: Path, about: dict[str, Any]) -> None:
    """A traced TorchScript file, through Detectron2's TracingAdapter."""
    from detectron2.export import TracingAdapter

    with traceable(native=False), _quiet():
        adapter = TracingAdapter(graph, inputs)
        traced = torch.jit.trace(adapter, adapter.flattened_inputs, check_trace=False)
        torch.jit.save(traced, str(path), _extra_files={ABOUT: json.dumps(about)})


def write_aoti(program: ExportedProgram, path: Path, about: dict[str, Any]) -> None:
    """A package of AOTInductor (.pt2): code compiled for this machine's kind of processor or GPU, and the weights."""
    from torch._inductor import aoti_compile_and_package

    with _quiet():
        aoti_compile_and_package(
            program,
            package_path=str(path),
            inductor_configs={"aot_inductor.metadata": {ABOUT: json.dumps(about)}},
        )


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what exporters say about themselves."""
    loggers = [logging.getLogger(name) for name in ("onnxscript", "onnx_ir", "torch.onnx", "torch.export")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
