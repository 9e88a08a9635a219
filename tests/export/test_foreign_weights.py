"""A checkpoint of another origin is exported as one of this project's is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import foreign
import pytest
import torch
from detectron2.modeling import build_model
from exporting import NEEDED, agree, realistic
from test_foreign_use import DETREX_DINO, SHAPES, run

from detr_family.commands.export_model import command
from detr_family.export.exporting import SUFFIX
from detr_family.inference.exported import ExportedDetector


def slow(*values: Any) -> Any:
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    ("name", "write", "opts", "format"),
    [
        ("DETR", foreign.detrex_file, [], "torchscript"),
        ("DETR", foreign.transformers_folder, [], "torchscript"),
        slow("DETR", foreign.released_file, [], "onnx"),
        slow("DABDETR", foreign.transformers_safetensors, [], "onnx"),
        slow("ConditionalDETR", foreign.transformers_bin, [], "torch_export"),
        slow("DINO", foreign.detrex_file, DETREX_DINO, "onnx"),
        slow("DINO", foreign.released_file, [], "torch_export"),
    ],
)
def test_it_goes_through_the_command(name: str, write: Any, opts: list[Any], format: str, tmp_path: Path) -> None:
    for package in NEEDED.get(format, ()):
        pytest.importorskip(package)
    cfg = run(name, tmp_path, opts)
    model = realistic(build_model(cfg))
    weights = write(model, cfg, tmp_path, SHAPES)
    (tmp_path / "config.yaml").write_text(cfg.dump())
    output = tmp_path / f"model{SUFFIX[format]}"
    words = ["--config-file", str(tmp_path / "config.yaml"), "--weights", weights, "--format", format]
    words += ["--size", "64", "96", "--output", str(output)]
    assert command([*words, "--opts", "MODEL.DETR.NUM_CLASSES", "3"]) == 0  # which only transformers' file says
    with torch.no_grad():
        agree(model, output, [(64, 96)], [1, 2])  # what was written is not what was drawn at random
    assert "transformers" not in write.__name__ or ExportedDetector(output).class_names == SHAPES
