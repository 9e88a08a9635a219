"""Foreign checkpoints of the deformable detectors: detrex's and transformers'."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import foreign
import golden
import hub
import pytest
import tiny
import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from torch import nn

import projects.deformable  # noqa: F401
from detr_family.checkpoint import DETRCheckpointer
from detr_family.checkpoint.architecture import config_file
from detr_family.checkpoint.detrex import convert_detrex, differences
from detr_family.checkpoint.to_transformers import write_for_transformers
from detr_family.config import load_config
from detr_family.modeling.set_detector import SetDetector

CONFIGS = Path(__file__).resolve().parents[1] / "configs"


def model_of(name: str, *opts: str) -> nn.Module:
    opts = ("MODEL.DEVICE", "cpu", "MODEL.DETR.NUM_CLASSES", "80", "MODEL.DETR.DROPOUT", "0", *opts)
    return build_model(load_config(str(CONFIGS / f"{name}.yaml"), opts))


@pytest.mark.golden
def test_outputs_and_losses_of_single_images_are_detrexs(tmp_path: Path) -> None:
    expected = golden.load("detrex_deformable_detr_r50")
    model = golden.fill(model_of("detrex/deformable_detr_r50"), expected, tmp_path / "detrex.pth")
    golden.compare_single_images(model, expected)
    wrong = r"eps of 1e-05 here, 0.001 there.*projects/deformable/configs/detrex/deformable_detr_r50\.yaml"
    with pytest.raises(ValueError, match=wrong):
        DETRCheckpointer(model_of("deformable_detr_r50")).load(str(tmp_path / "detrex.pth"))


@pytest.mark.parametrize("path", sorted((CONFIGS / "detrex").glob("*.yaml")), ids=lambda p: p.stem)
def test_every_config_file_of_detrex_is_filled_by_its_weights_which_name_it(path: Path) -> None:
    with torch.device("meta"):
        model = model_of(f"detrex/{path.stem}", "MODEL.DEVICE", "meta")
    name = config_file(model.state_dict(), folder="detrex/")
    assert name == f"projects/deformable/configs/detrex/{path.stem}.yaml"
    numbered = foreign.numbered(model)
    there = foreign.as_detrex(numbered)
    assert not differences(there, model)
    foreign.assert_numbered(convert_detrex(there), numbered)


def narrow_cfg(*, refine: bool, two_stage: bool) -> CfgNode:
    """A small detector on a narrow ResNet-50; of the papers' width, since transformers always norms in 32 groups."""
    cfg = hub.narrow(tiny.cfg_of("DETR"))
    cfg.MODEL.META_ARCHITECTURE = "DeformableDETR"
    cfg.MODEL.DETR.HIDDEN_DIM = 256
    cfg.MODEL.DETR.COST.CLASS = cfg.MODEL.DETR.LOSS.CLASS = 2.0
    cfg.MODEL.DEFORMABLE.ENC_POINTS, cfg.MODEL.DEFORMABLE.DEC_POINTS = 3, 2
    cfg.MODEL.DEFORMABLE.BOX_REFINEMENT, cfg.MODEL.DEFORMABLE.TWO_STAGE = refine, two_stage
    cfg.MODEL.RESNETS.OUT_FEATURES = ["res3", "res4", "res5"]
    return cfg


def there(refine: bool, two_stage: bool) -> Any:
    return hub.there(
        "DeformableDetr", d_model=256, encoder_n_points=3, decoder_n_points=2, num_feature_levels=4,
        out_features=["stage2", "stage3", "stage4"], with_box_refine=refine, two_stage=two_stage,
        two_stage_num_proposals=7, class_cost=2,
    )  # fmt: skip


FORMS = [(False, False), (True, False), (True, True)]


@pytest.mark.parity
@pytest.mark.parametrize(("refine", "two_stage"), FORMS)
def test_a_detector_that_transformers_saved_gives_its_outputs_and_losses(
    refine: bool, two_stage: bool, tmp_path: Path
) -> None:
    other = there(refine, two_stage)
    model = build_model(narrow_cfg(refine=refine, two_stage=two_stage))
    DETRCheckpointer(model, whole=True).load(hub.as_safetensors(other, tmp_path))
    hub.compare(model, other, 2.0)


@pytest.mark.parity
@pytest.mark.parametrize(("refine", "two_stage"), FORMS)
def test_transformers_takes_what_is_written_for_it(refine: bool, two_stage: bool, tmp_path: Path) -> None:
    cfg = narrow_cfg(refine=refine, two_stage=two_stage)
    torch.manual_seed(4)
    model = hub.away_from_the_start(build_model(cfg))
    write_for_transformers(str(tmp_path), cfg, model, ["owl", "emu", "newt"])
    family = hub.transformers().DeformableDetrForObjectDetection
    other, report = family.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
    hub.compare_outputs(model, other.eval())
    again = build_model(cfg)
    DETRCheckpointer(again, whole=True).load(str(tmp_path))
    silent = {f"{prefix}class_embed.2.{x}" for prefix in ("", "transformer.decoder.") for x in ("weight", "bias")}
    for name, value in again.state_dict().items():
        rows = slice(1, None) if two_stage and name in silent else slice(None)  # of proposals the first is no class
        assert torch.equal(value[rows] if value.dim() else value, model.state_dict()[name][rows]), name


def two_stage_dab(**keys: Any) -> SetDetector:
    """detrex's two-stage DAB-Deformable-DETR, tiny."""
    cfg = tiny.cfg_of("DABDETR")
    cfg.MODEL.META_ARCHITECTURE = "TwoStageDABDeformableDETR"
    cfg.MODEL.DEFORMABLE.NUM_LEVELS, cfg.MODEL.DEFORMABLE.ENC_POINTS, cfg.MODEL.DEFORMABLE.DEC_POINTS = 3, 2, 5
    cfg.MODEL.DEFORMABLE.IGNORE_PADDING = True
    cfg.MODEL.DETR.SPATIAL_ENCODING.TEMPERATURE = 10000.0
    for key, value in keys.items():
        cfg.MODEL.DAB[key] = value
    torch.manual_seed(1)
    return build_model(cfg)


def test_a_decoder_starts_from_the_best_proposals_of_any_class() -> None:
    model = two_stage_dab().train()
    inputs = tiny.batch()
    images = model.preprocess_image(inputs)
    prediction = model.predict(images)
    proposals = prediction.proposals
    assert proposals.layer_logits.shape == (1, 2, 7, 3)
    scores = proposals.logits.amax(-1)
    assert (scores[:, :-1] >= scores[:, 1:]).all()  # best first, by the best class
    # Boxes of all layers start where the proposals are, as box heads start from zeros.
    for boxes in prediction.layer_boxes.unbind(0):
        torch.testing.assert_close(boxes, proposals.boxes.detach(), rtol=1e-3, atol=1e-4)
    losses = model(inputs)
    assert {"loss_ce_enc", "loss_bbox_enc", "loss_giou_enc", "loss_ce", "loss_ce_0"} <= losses.keys()
    sum(losses.values()).backward()
    assert not [k for k, p in model.named_parameters() if p.requires_grad and p.grad is None]
    inputs = [tiny.image(64, 64, 2, seed=0), tiny.image(128, 128, 2, seed=1)]
    with torch.no_grad():
        alone = model.eval().predict(model.preprocess_image(inputs[:1]))
        both = model.predict(model.preprocess_image(inputs))
    torch.testing.assert_close(both.logits[0], alone.logits[0], rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match=r"MODEL\.DAB\.NUM_PATTERNS"):
        two_stage_dab(NUM_PATTERNS=3)


def test_detrexs_names_fill_the_two_stage_detector(tmp_path: Path) -> None:
    model = two_stage_dab()
    state = {k: v + 1 for k, v in model.state_dict().items()}
    renamed = foreign.as_detrex(state)
    once = [name for name in renamed if name.startswith("transformer.decoder.class_embed")]
    for name in once:  # stored twice, so one may be absent
        del renamed[name]
    renamed["transformer.pos_trans.weight"] = torch.zeros(2)
    torch.save({"model": renamed}, tmp_path / "detrex.pth")
    fresh = two_stage_dab()
    DETRCheckpointer(fresh, strict=True, whole=True).load(str(tmp_path / "detrex.pth"))
    assert all(torch.equal(v, state[k]) for k, v in fresh.state_dict().items())
