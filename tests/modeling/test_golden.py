"""Each detector computes what its paper's release computes (see tests/golden.py)."""

from pathlib import Path
from types import SimpleNamespace

import golden
import pytest
import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from torch import nn

from detr_family.inference import optimize
from detr_family.layers import winograd

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
DETECTORS = ["detr_r50", "conditional_detr_r50", "dab_detr_r50", "dn_detr_r50", "dino_r50_4scale"]

pytestmark = pytest.mark.golden


def filled(name: str, cfg: CfgNode, folder: Path) -> tuple[nn.Module, SimpleNamespace]:
    """A detector with the golden weights, and what its release computes."""
    expected = golden.load(name)
    cfg.merge_from_file(str(CONFIGS / f"{name}.yaml"))
    cfg.MODEL.DETR.DROPOUT = 0.0
    for noise in (cfg.MODEL.DN, cfg.MODEL.DINO):
        noise.LABEL_NOISE = noise.BOX_NOISE = 0.0
    if name.startswith("dino"):
        cfg.MODEL.DETR.NUM_QUERIES = 100
    return golden.fill(build_model(cfg), expected, folder / "released.pth"), expected


@pytest.mark.parametrize("name", DETECTORS)
def test_outputs_losses_and_gradients_are_the_papers(name: str, cfg: CfgNode, tmp_path: Path) -> None:
    model, expected = filled(name, cfg, tmp_path)
    golden.compare_outputs(model, expected)
    golden.compare_training(model, expected, gradients=3e-3 if name.startswith("dino") else 1e-3)


def test_so_they_are_with_winograds_convolutions(cfg: CfgNode, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A training takes them for larger images than the golden ones."""
    taken = []
    monkeypatch.setattr(winograd, "pays", lambda x, weight: taken.append(x) or min(weight.shape[:2]) >= 64)
    model, expected = filled("detr_r50", cfg, tmp_path)
    golden.compare_training(model, expected)
    assert taken


@pytest.mark.parametrize("name", DETECTORS)
def test_prepared_detectors_give_the_same(name: str, cfg: CfgNode, tmp_path: Path) -> None:
    """Logits of DAB- and DN-DETR move by up to 1.7e-4 with torch's channels-last layout alone."""
    model, _ = filled(name, cfg, tmp_path)
    with torch.no_grad():
        plain = model.eval().predict(model.preprocess_image(golden.batch()))
        optimize(model)
        prepared = model.predict(model.preprocess_image(golden.batch()))
    assert (prepared.boxes - plain.boxes).abs().max() < 5e-5
    assert (prepared.logits.sigmoid() - plain.logits.sigmoid()).abs().max() < 5e-5
    assert (prepared.logits - plain.logits).abs().max() < 3e-4
