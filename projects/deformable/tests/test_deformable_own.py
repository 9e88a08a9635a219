"""What is one detector's own: proposals, patterns, denoising."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny
import torch
from detectron2.modeling import build_model
from test_deformable_detectors import build, cfg_of, known_to_the_suite  # noqa: F401  (a fixture)

from detr_family.checkpoint import DETRCheckpointer
from projects.deformable.deformable_detr import TwoStagePrediction

TWO_STAGE = "DeformableDETR two-stage"  # of DETECTORS


def test_proposals_are_trained_for_one_label_and_have_a_row_for_it() -> None:
    model = build(TWO_STAGE).train()
    inputs = tiny.batch()
    prediction = model.predict(model.preprocess_image(inputs), model.targets(inputs))
    assert isinstance(prediction, TwoStagePrediction)
    tokens = 5 * 6 + 3 * 3 + 2 * 2
    assert prediction.proposals.logits.shape == (2, tokens, tiny.NUM_CLASSES + 1)
    losses = model(inputs)
    assert {"loss_ce_enc", "loss_bbox_enc", "loss_giou_enc"} <= losses.keys()
    for x in inputs:
        x["instances"].gt_classes = (x["instances"].gt_classes + 1) % tiny.NUM_CLASSES
    others = model(inputs)
    assert torch.equal(others["loss_ce_enc"], losses["loss_ce_enc"]) and others["loss_ce"] != losses["loss_ce"]


def test_padding_is_chosen_last() -> None:
    model = build(TWO_STAGE).eval()
    small, large = tiny.image(64, 96, 0, seed=1), tiny.image(128, 160, 0, seed=2)
    with torch.no_grad():
        for parameter in (model.transformer.enc_output.weight, model.class_embed[-1].weight):
            parameter.normal_()
        model.transformer.enc_output_norm.bias.normal_()
        references = []
        decoder = model.transformer.decoder
        decoder.register_forward_pre_hook(lambda *a: references.append(a[2]["reference"]), with_kwargs=True)
        model.predict(model.preprocess_image([small, large]))
    # An unusable token proposes the box 1, 1, 1, 1.
    assert (references[0] < 1).all()


def test_without_refinement_there_are_no_two_stages() -> None:
    with pytest.raises(ValueError, match=r"TWO_STAGE needs MODEL\.DEFORMABLE\.BOX_REFINEMENT"):
        build(TWO_STAGE, BOX_REFINEMENT=False)


def test_the_proposals_row_stays_when_classes_are_matched_by_name(tmp_path: Path) -> None:
    source, target = build(TWO_STAGE), build(TWO_STAGE)
    with torch.no_grad():
        for parameter in target.parameters():
            parameter.add_(1)
    DETRCheckpointer(source, str(tmp_path), class_names=["a", "b", "c"]).save("model")
    checkpointer = DETRCheckpointer(target, class_rows="match", class_names=["c", "new", "a"])
    checkpointer.load(str(tmp_path / "model.pth"))
    ours, theirs = target.class_embed[-1].weight, source.class_embed[-1].weight
    assert torch.equal(ours[-1], theirs[-1]) and torch.equal(ours[0], theirs[2]) and torch.equal(ours[2], theirs[0])
    assert not torch.equal(ours[1], theirs[1])


def test_patterns_multiply_the_set() -> None:
    cfg = cfg_of("DABDeformableDETR")
    cfg.MODEL.DAB.NUM_PATTERNS = 2
    model = build_model(cfg).eval()
    with torch.no_grad():
        prediction = model.predict(model.preprocess_image(tiny.batch()))
        model.patterns_embed.weight[1] = model.patterns_embed.weight[0]
        same = model.predict(model.preprocess_image(tiny.batch()))
    assert prediction.logits.shape == (2, 14, tiny.NUM_CLASSES)
    assert not torch.allclose(prediction.logits[:, :7], prediction.logits[:, 7:], atol=1e-3)
    torch.testing.assert_close(same.boxes[:, :7], same.boxes[:, 7:])


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("DABDeformableDETR", "FIX_CENTRES"),
        ("DABDeformableDETR", "ANCHOR_SIZE"),
        ("DNDeformableDETR", "FIX_CENTRES"),
        ("DNDeformableDETR", "NUM_PATTERNS"),
    ],
)
def test_settings_of_dab_detr_that_it_does_not_have_are_refused(name: str, key: str) -> None:
    cfg = cfg_of(name)
    cfg.MODEL.DAB[key] = type(cfg.MODEL.DAB[key])(1)
    with pytest.raises(ValueError, match=rf"MODEL\.DAB\.{key}"):
        build_model(cfg)


def test_denoising_changes_no_matching_query() -> None:
    model = build("DNDeformableDETR").train()
    inputs = tiny.batch()
    with torch.no_grad():
        with_groups = model.predict(model.preprocess_image(inputs), model.targets(inputs))
        without = model.predict(model.preprocess_image(inputs))
    assert len(with_groups.groups) == 9
    torch.testing.assert_close(with_groups.logits, without.logits, rtol=1e-4, atol=1e-5)
    losses = model(inputs)
    assert {"loss_ce_dn", "loss_bbox_dn_0", "loss_giou_dn"} <= losses.keys()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_two_stages_with_anchors_run_in_weights_of_another_type(dtype: torch.dtype) -> None:
    cfg = cfg_of("DABDeformableDETR")
    cfg.MODEL.META_ARCHITECTURE = "TwoStageDABDeformableDETR"
    torch.manual_seed(11)
    model = build_model(cfg).eval()
    with torch.no_grad():
        expected = model(tiny.batch())
        found = model.to(dtype)(tiny.batch())
    for a, b in zip(expected, found, strict=True):
        torch.testing.assert_close(
            b["instances"].scores, a["instances"].scores, atol=0.2 * torch.finfo(dtype).eps + 1e-6, rtol=0
        )
