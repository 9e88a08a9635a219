"""What transformers saves loads as it is and gives its outputs and losses; and what is written for it, it takes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hub
import pytest
import tiny
import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from safetensors.torch import load_file

from detr_family.checkpoint import DETRCheckpointer, read_class_names
from detr_family.checkpoint.rows import COCO_IDS, COCO_NAMES
from detr_family.checkpoint.transformers import convert_transformers

pytestmark = pytest.mark.parity

# Name here: its family there, settings there, class weight there.
DETECTORS: dict[str, tuple[str, dict[str, Any], float]] = {
    "DETR": ("Detr", {"d_model": 16}, 1.0),
    "ConditionalDETR": ("ConditionalDetr", {"d_model": 16}, 2.0),
    "DABDETR": ("DabDetr", {"hidden_size": 16, "num_patterns": 2}, 1.0),
}


def cfg_of(name: str, num_classes: int = tiny.NUM_CLASSES) -> CfgNode:
    cfg = hub.narrow(tiny.cfg_of(name))
    cfg.MODEL.DETR.NUM_CLASSES = num_classes
    cfg.MODEL.DAB.NUM_PATTERNS = 2
    return cfg


@pytest.mark.parametrize(
    ("name", "save"),
    [
        ("DETR", hub.as_folder),
        ("DETR", hub.as_bin),
        ("DETR", hub.as_with_timm),
        ("ConditionalDETR", hub.as_safetensors),
        ("ConditionalDETR", hub.as_in_memory),
        ("DABDETR", hub.as_safetensors),
        ("DABDETR", hub.as_with_timm),
    ],
)
def test_a_saved_detector_gives_its_outputs_and_losses(
    name: str, save: Callable[[Any, Path], Path], tmp_path: Path
) -> None:
    family, settings, class_weight = DETECTORS[name]
    other = hub.there(family, **settings)
    model = build_model(cfg_of(name))
    DETRCheckpointer(model, whole=True).load(save(other, tmp_path))
    hub.compare(model, other, class_weight)


@pytest.mark.parametrize("name", DETECTORS)
def test_rows_of_a_published_coco_detector_are_those_of_its_category_ids(name: str, tmp_path: Path) -> None:
    family, settings, _ = DETECTORS[name]
    other = hub.there(family, num_labels=91, **settings)
    path = hub.as_safetensors(other, tmp_path)
    assert read_class_names(str(path)) == COCO_NAMES
    model = build_model(cfg_of(name, 80))
    DETRCheckpointer(model).load(str(path))
    theirs = load_file(path)["class_embed.bias" if name == "DABDETR" else "class_labels_classifier.bias"]
    expected = theirs[[*COCO_IDS, 91] if name == "DETR" else COCO_IDS]
    assert torch.equal(model.class_embed.bias, expected)


def test_a_fine_tuned_detector_names_its_classes_and_is_fine_tuned_by_them(tmp_path: Path) -> None:
    other = hub.there("Detr", d_model=16)
    other.config.id2label = {0: "owl", 1: "Traffic Light", 2: "newt"}
    path = hub.as_folder(other, tmp_path) / "model.safetensors"
    assert read_class_names(str(path)) == ["owl", "Traffic Light", "newt"]
    model = build_model(cfg_of("DETR", 2))
    DETRCheckpointer(model, class_names=["newt", "emu"], class_rows="match").load(str(path))
    bias = load_file(path)["class_labels_classifier.bias"]
    assert model.class_embed.bias[0] == bias[2] and model.class_embed.bias[2] == bias[3]
    assert model.class_embed.bias[1] not in bias
    with pytest.raises(ValueError, match=r"another number of classes.*owl, Traffic Light, newt"):
        DETRCheckpointer(build_model(cfg_of("DETR", 2))).load(str(path))


def test_the_config_files_name_is_in_the_refusal(tmp_path: Path) -> None:
    path = hub.as_safetensors(hub.there("ConditionalDetr", d_model=16), tmp_path)
    with pytest.raises(ValueError, match=r"does not fit DETR.*configs/conditional_detr_r50\.yaml"):
        DETRCheckpointer(build_model(cfg_of("DETR"))).load(str(path))


def test_what_config_json_says_otherwise_is_refused(tmp_path: Path) -> None:
    family, settings, _ = DETECTORS["DABDETR"]
    path = hub.as_safetensors(hub.there(family, **settings), tmp_path)
    for key, value, said in (
        ("dilation", True, r"stride 32 here, 16 there.*configs/transformers/dab_detr_r50_dc5_2pat\.yaml"),
        ("temperature_height", 10, "temperature 20.0 here, 10 there"),
    ):
        config = json.loads((tmp_path / "config.json").read_text())
        config[key] = value
        (path.parent / "config.json").write_text(json.dumps(config))
        with pytest.raises(ValueError, match=said):
            DETRCheckpointer(build_model(cfg_of("DABDETR"))).load(str(path))


def test_a_segmentation_models_detector_loads_without_its_mask_head(tmp_path: Path) -> None:
    other = hub.there("Detr", d_model=16)
    state = {f"detr.{k}": v for k, v in other.state_dict().items()} | {"mask_head.lay1.weight": torch.zeros(2)}
    torch.save(state, tmp_path / "panoptic.bin")
    model = build_model(cfg_of("DETR"))
    DETRCheckpointer(model, whole=True).load(str(tmp_path / "panoptic.bin"))
    hub.compare(model, other, 1.0)


def test_another_detector_of_transformers_is_told() -> None:
    state = {"model.encoder.layers.0.fc1.weight": torch.zeros(2), "model.decoder.in_proj_trans.weight": torch.zeros(2)}
    with pytest.raises(ValueError, match=r"1 of its names \(model\.decoder\.in_proj_trans\.weight"):
        convert_transformers(state, 80)
