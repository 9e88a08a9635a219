"""Each detector computes what its paper's release computes (see tests/golden.py)."""

from pathlib import Path

import golden
import pytest
from detectron2.config import CfgNode
from detectron2.modeling import build_model

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
DETECTORS = ["detr_r50", "conditional_detr_r50", "dab_detr_r50", "dn_detr_r50", "dino_r50_4scale"]

pytestmark = pytest.mark.golden


@pytest.mark.parametrize("name", DETECTORS)
def test_outputs_losses_and_gradients_are_the_papers(name: str, cfg: CfgNode, tmp_path: Path) -> None:
    expected = golden.load(name)
    cfg.merge_from_file(str(CONFIGS / f"{name}.yaml"))
    cfg.MODEL.DETR.DROPOUT = 0.0
    for noise in (cfg.MODEL.DN, cfg.MODEL.DINO):
        noise.LABEL_NOISE = noise.BOX_NOISE = 0.0
    if name.startswith("dino"):
        cfg.MODEL.DETR.NUM_QUERIES = 100
    model = golden.fill(build_model(cfg), expected, tmp_path / "released.pth")
    golden.compare_outputs(model, expected)
    golden.compare_training(model, expected, gradients=3e-3 if name.startswith("dino") else 1e-3)
