"""Checkpoints in another format: what is written loads again, here and in transformers, with the same outputs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import hub
import pytest
import tiny
import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model

from detr_family.checkpoint import DETRCheckpointer, read_class_names
from detr_family.checkpoint.to_transformers import transformers_config, write_for_transformers
from detr_family.commands.convert_checkpoint import command
from detr_family.modeling.set_detector import SetDetector

NAMES = ["owl", "emu", "newt"]


def narrow_cfg(name: str) -> CfgNode:
    """A tiny detector on a narrow ResNet-50."""
    cfg = hub.narrow(tiny.cfg_of(name))
    cfg.MODEL.DAB.NUM_PATTERNS = 2
    return cfg


def compare(model: SetDetector, folder: Path, family: Any) -> Any:
    """What transformers computes from the folder is what the model does; returns its model."""
    family = getattr(hub.transformers(), f"{family}ForObjectDetection")
    loaded = family.from_pretrained(folder, output_loading_info=True)
    other, report = loaded
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
    hub.compare_outputs(model, other.eval())
    return other


@pytest.mark.parity
@pytest.mark.parametrize(
    ("name", "family"), [("DETR", "Detr"), ("ConditionalDETR", "ConditionalDetr"), ("DABDETR", "DabDetr")]
)
def test_transformers_takes_what_is_written_for_it(name: str, family: str, tmp_path: Path) -> None:
    cfg = narrow_cfg(name)
    cfg.MODEL.DETR.INVERSE_SIGMOID_EPS = 1e-5
    torch.manual_seed(5)
    model = hub.away_from_the_start(build_model(cfg))
    write_for_transformers(str(tmp_path), cfg, model, NAMES)
    other = compare(model, tmp_path, family)
    assert [other.config.id2label[i] for i in range(3)] == NAMES
    # And back.
    again = build_model(cfg)
    DETRCheckpointer(again, whole=True).load(str(tmp_path))
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in again.state_dict().items())
    assert read_class_names(str(tmp_path)) == NAMES
    processor = json.loads((tmp_path / "preprocessor_config.json").read_text())
    assert processor["image_std"] == [1.0, 1.0, 1.0] and processor["size"]["longest_edge"] == cfg.INPUT.MAX_SIZE_TEST


@pytest.mark.slow
@pytest.mark.parity
@pytest.mark.parametrize(("name", "family"), [("DETR", "Detr"), ("DABDETR", "DabDetr")])
def test_a_dilated_backbone_is_timms(name: str, family: str, tmp_path: Path) -> None:
    pytest.importorskip("timm", reason="the timm package is not installed")
    cfg = narrow_cfg(name)
    resnet = cfg.MODEL.RESNETS
    resnet.STEM_OUT_CHANNELS, resnet.RES2_OUT_CHANNELS, resnet.WIDTH_PER_GROUP = 64, 256, 64  # timm's resnet50
    resnet.RES5_DILATION, cfg.MODEL.DETR.INVERSE_SIGMOID_EPS = 2, 1e-5
    torch.manual_seed(0)
    model = hub.away_from_the_start(build_model(cfg))
    write_for_transformers(str(tmp_path), cfg, model, NAMES)
    compare(model, tmp_path, family)


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("META_ARCHITECTURE", "DINO", "transformers has no DINO"),
        ("DETR.PRE_NORM", True, r"MODEL\.DETR\.PRE_NORM is True"),
        ("BACKBONE.NAME", "build_swin_backbone", r"MODEL\.BACKBONE\.NAME is build_swin_backbone"),
        ("DETR.SPATIAL_ENCODING.TEMPERATURE", 20.0, "TEMPERATURE is 20.0.*only 10000.0"),
    ],
)
def test_what_transformers_does_not_have_is_refused(key: str, value: object, said: str) -> None:
    cfg = hub.narrow(tiny.cfg_of("DETR"))
    cfg.merge_from_list([f"MODEL.{key}", value])
    with pytest.raises(ValueError, match=said):
        transformers_config(cfg, None)


def written(tmp_path: Path) -> tuple[SetDetector, list[str]]:
    """A checkpoint and the flags that name it and its config file."""
    model = tiny.build("DABDETR")
    DETRCheckpointer(model, str(tmp_path), class_names=NAMES).save("model")
    cfg = tiny.cfg_of("DABDETR")
    cfg.MODEL.DETR.NUM_CLASSES = -1
    (tmp_path / "config.yaml").write_text(cfg.dump())
    return model, ["--config-file", str(tmp_path / "config.yaml"), "--weights", str(tmp_path / "model.pth")]


@pytest.mark.parametrize("file", ["copy.pth", "copy.safetensors"])
def test_a_file_that_is_written_is_the_same_model(file: str, tmp_path: Path) -> None:
    model, flags = written(tmp_path)
    assert command([*flags, "--output", str(tmp_path / "new" / file)]) == 0
    again = tiny.build("DABDETR")
    for parameter in again.parameters():
        torch.nn.init.zeros_(parameter)
    DETRCheckpointer(again, whole=True, class_names=NAMES).load(str(tmp_path / "new" / file))
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in again.state_dict().items())
    assert read_class_names(str(tmp_path / "new" / file)) == NAMES


def test_a_safetensors_file_that_is_cut_short_is_told(tmp_path: Path) -> None:
    _, flags = written(tmp_path)
    whole = tmp_path / "copy.safetensors"
    assert command([*flags, "--output", str(whole)]) == 0
    for size in (5, 200, whole.stat().st_size - 100):
        cut = tmp_path / "cut.safetensors"
        cut.write_bytes(whole.read_bytes()[:size])
        with pytest.raises(ValueError, match=r"cut\.safetensors .*cut short or damaged.*fetch it anew"):
            DETRCheckpointer(tiny.build("DABDETR")).load(str(cut))


def test_mistakes_end_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, flags = written(tmp_path)
    assert command([*flags, "--output", str(tmp_path / "x"), "--format", "transformers"]) == 2
    assert "MODEL.BACKBONE.NAME is build_patch_backbone" in capsys.readouterr().err
    assert command([*flags[:2], "--weights", str(tmp_path / "no.pth"), "--output", str(tmp_path / "x.pth")]) == 2
    assert "there is no checkpoint" in capsys.readouterr().err
