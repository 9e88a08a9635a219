"""This project's detectors as files that run without them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import foreign
import pytest
import tiny
import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from exporting import NAMES, SIZES, agree, build, exported, in_all_formats, realistic
from test_deformable_checkpoints import narrow_cfg
from test_deformable_detectors import DETECTORS, deformable, known_to_the_suite  # noqa: F401  (a fixture)

from detr_family.commands.export_model import command
from detr_family.export.exporting import SUFFIX
from detr_family.inference.exported import ExportedDetector


def two_stage_dab(cfg: CfgNode) -> None:
    deformable(cfg)
    cfg.MODEL.META_ARCHITECTURE = "TwoStageDABDeformableDETR"


FORMS = {**DETECTORS, "TwoStageDABDeformableDETR": two_stage_dab}


@pytest.fixture(scope="module", autouse=True)
def one_more_known() -> Iterator[None]:
    tiny.DETECTORS["TwoStageDABDeformableDETR"] = two_stage_dab
    yield
    del tiny.DETECTORS["TwoStageDABDeformableDETR"]


def test_the_command_knows_the_project(tmp_path: Path) -> None:
    name = "DeformableDETR two-stage"
    model = build(name)
    torch.save({"model": model.state_dict()}, tmp_path / "weights.pth")
    (tmp_path / "config.yaml").write_text(tiny.cfg_of(name).dump())
    output = tmp_path / "model.ts"
    words = ["--import", "projects.deformable", "--config-file", str(tmp_path / "config.yaml")]
    words += ["--weights", str(tmp_path / "weights.pth"), "--format", "torchscript", "--output", str(output)]
    assert command([*words, "--size", "96", "112"]) == 0
    assert ExportedDetector(output).about["detector"] == "DeformableDETR"
    agree(model, output, SIZES, [1, 3])


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in FORMS if name != "DeformableDETR two-stage"])  # see above
def test_torchscript(name: str, tmp_path: Path) -> None:
    model, path = exported(name, "torchscript", tmp_path)
    agree(model, path, SIZES, [1, 3])


@pytest.mark.slow
@pytest.mark.parametrize("name", FORMS)
def test_all_formats(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(name)
    for _, path in in_all_formats(model, tmp_path, monkeypatch):
        agree(model, path, SIZES, [1, 3])


@pytest.mark.slow
def test_weights_of_detrex(tmp_path: Path) -> None:
    cfg = narrow_cfg(refine=True, two_stage=True)
    cfg.MODEL.DETR.INVERSE_SIGMOID_EPS = 1e-3
    model = realistic(build_model(cfg))
    weights = foreign.detrex_file(model, cfg, tmp_path, NAMES)
    (tmp_path / "config.yaml").write_text(cfg.dump())
    output = tmp_path / f"model{SUFFIX['torch_export']}"
    words = ["--import", "projects.deformable", "--config-file", str(tmp_path / "config.yaml"), "--weights", weights]
    assert command([*words, "--format", "torch_export", "--output", str(output), "--size", "64", "96"]) == 0
    agree(model, output, [(64, 96)], [1, 2])


@pytest.mark.long
def test_compiled_ahead_of_time(tmp_path: Path) -> None:
    model, path = exported("DeformableDETR two-stage", "aoti", tmp_path)
    agree(model, path, [(64, 80)], [1, 3])
