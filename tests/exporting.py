"""Detectors whose weights are like trained ones, and their exported files."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import golden_recipe
import hub
import pytest
import tiny
import torch
from detectron2.modeling import build_model

from detr_family.export import export_model, exporting
from detr_family.export.exporting import SUFFIX
from detr_family.export.parity import compare, sample_batches
from detr_family.inference.exported import ExportedDetector
from detr_family.modeling.set_detector import SetDetector

SIZE = (96, 112)
NAMES = ["apple", "pear", "plum"]
NEEDED = {"onnx": ("onnx", "onnxscript", "onnxruntime"), "openvino": ("onnxscript", "openvino")}

# A single token at the coarsest level, an extreme shape, fewer tokens than queries, no multiple of the stride; a padded
# image that ends where a token of DINO's second level begins, 4 of 5 tokens of 30 pixels.
SIZES = [(64, 80), (16, 400), (16, 16), (37, 53), (16, 150)]


def realistic(model: SetDetector) -> SetDetector:
    """The golden outputs' weights, by name and shape: sharp attention, scores from near 0 to some 0.5."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.as_tensor(golden_recipe.fill(name, parameter.shape)))
            if "class_embed" in name and name.endswith("bias"):
                parameter.add_(3.0)  # a few classes and queries; there are 80 and hundreds otherwise
    return model.eval()


def spread(model: SetDetector) -> SetDetector:
    """The starting values with larger class heads: scores that differ, and nothing sharp that rounding would move."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "class_embed" in name and name.endswith("weight"):
                parameter.mul_(8)
    return model.eval()


def build(name: str, *, resnet: bool = False) -> SetDetector:
    """The named tiny detector with such weights; `resnet`: on a narrow ResNet-50, which takes an image of a pixel."""
    cfg = tiny.cfg_of(name)
    if resnet:
        hub.narrow(cfg)
        if "DINO" in name or "Deformable" in name:
            cfg.MODEL.RESNETS.OUT_FEATURES = ["res4", "res5"]
    torch.manual_seed(11)
    return realistic(build_model(cfg))


def exported(name: str, format: str, folder: Path, *, resnet: bool = False, **keys: Any) -> tuple[SetDetector, Path]:
    """The named tiny detector and its file, compared while it was written."""
    for package in NEEDED.get(format, ()):
        pytest.importorskip(package)
    model = build(name, resnet=resnet)
    path = folder / f"model{SUFFIX[format]}"
    difference = export_model(model, format, path, **{"size": SIZE, "class_names": NAMES, "batch": 2, **keys})
    assert difference is not None and difference.within() and difference.compared > 20
    return model, path


def in_all_formats(
    model: Any, folder: Path, monkeypatch: pytest.MonkeyPatch, *, least: int = 20, **keys: Any
) -> Iterator[tuple[str, Path]]:
    """A detector in each format whose packages are installed, compared while it was written: over `least` detections.

    torch's part of the exports, nearly all of their time, is done once.
    """
    monkeypatch.setattr(exporting, "export_program", _once(exporting.export_program))
    monkeypatch.setattr(torch.onnx, "export", _once(torch.onnx.export))
    missing: list[str] = []
    for format in ("torch_export", "onnx", "openvino"):
        lacking = [package for package in NEEDED.get(format, ()) if not importlib.util.find_spec(package)]
        missing += lacking
        if lacking:
            continue
        path = folder / f"model{SUFFIX[format]}"
        difference = export_model(model, format, path, **{"size": SIZE, "batch": 2, "native": False, **keys})
        assert difference is not None and difference.within() and difference.compared > least
        yield format, path
    if missing:
        pytest.skip(f"{', '.join(dict.fromkeys(missing))} not installed: not all formats were tried")


def _once(function: Any) -> Any:
    """A function that gives for all arguments what it gave for the first."""
    results: list[Any] = []

    def call(*args: Any, **keys: Any) -> Any:
        if not results:
            results.append(function(*args, **keys))
        return results[0]

    return call


def agree(model: SetDetector, path: Path, sizes: list[tuple[int, int]], counts: list[int]) -> None:
    """The file finds what the detector finds, on images of each size, alone and in padded batches."""
    detector = ExportedDetector(path)
    detector.train().eval()  # as an evaluation does with any model
    result = compare(model, detector, sample_batches(sizes, counts, seed=3))
    assert result.within(), result
