"""A checkpoint of another origin is exported as one of this project's is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from detectron2.modeling import build_model
from exporting import agree, realistic
from test_foreign_use import SHAPES, as_detrex, as_transformers, run

from detr_family.commands.export_model import command
from detr_family.inference.exported import ExportedDetector


@pytest.mark.parametrize("write", [as_detrex, as_transformers])
def test_it_goes_through_the_command(write: Any, tmp_path: Path) -> None:
    cfg = run(tmp_path)
    model = realistic(build_model(cfg))
    weights = write(model, cfg, tmp_path, SHAPES)
    (tmp_path / "config.yaml").write_text(cfg.dump())
    output = tmp_path / "model.ts"
    words = ["--config-file", str(tmp_path / "config.yaml"), "--weights", weights, "--format", "torchscript"]
    words += ["--size", "64", "96", "--output", str(output)]
    assert command([*words, "--opts", "MODEL.DETR.NUM_CLASSES", "3"]) == 0  # which detrex's file does not say
    with torch.no_grad():
        agree(model, output, [(64, 96)], [1, 2])  # what was written is not what was drawn at random
    assert write is as_detrex or ExportedDetector(output).class_names == SHAPES
