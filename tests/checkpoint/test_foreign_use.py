"""A checkpoint of another origin goes where one of this project goes: evaluation, fine-tuning, the demo."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import hub
import pytest
import tiny
import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from engine_runs import run_cfg, train

from detr_family.checkpoint import DETRCheckpointer
from detr_family.checkpoint.to_transformers import write_for_transformers
from detr_family.commands import demo
from detr_family.commands.train import main
from detr_family.engine.processes import argument_parser
from detr_family.modeling.set_detector import SetDetector


def as_detrex(model: SetDetector, cfg: CfgNode, folder: Path, names: list[str]) -> str:
    """DETR's weights under detrex's names, which say nothing of classes."""
    state = {}
    for name, value in model.state_dict().items():
        for here, there in (
            (".self_attn.", ".attentions.0.attn."),
            (".multihead_attn.", ".attentions.1.attn."),
            (".linear1.", ".ffns.0.layers.0.0."),
            (".linear2.", ".ffns.0.layers.1."),
            ("decoder.norm.", "decoder.post_norm_layer."),
            *((f".norm{i + 1}.", f".norms.{i}.") for i in range(3) if ".layers." in name),
        ):
            name = name.replace(here, there)
        state[name] = value
    torch.save({"model": state, "iteration": 89999}, folder / "detrex.pth")
    return str(folder / "detrex.pth")


def as_transformers(model: SetDetector, cfg: CfgNode, folder: Path, names: list[str]) -> str:
    write_for_transformers(str(folder / "for_transformers"), cfg, model, names)
    return str(folder / "for_transformers")


def run(folder: Path, opts: list[Any] | None = None) -> CfgNode:
    return hub.narrow(run_cfg("DETR", folder, "run", opts))


SHAPES = ["circle", "square", "triangle"]


@pytest.mark.parametrize("write", [as_detrex, as_transformers])
def test_it_is_evaluated_shown_and_fine_tuned(
    write: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("setup_logger", "default_setup"):  # which would take the loggers from the tests after this one
        monkeypatch.setattr(f"detr_family.commands.train.{name}", lambda *_, **__: None)
    cfg = run(tmp_path)
    torch.manual_seed(3)
    path = write(build_model(cfg), cfg, tmp_path, SHAPES)

    cfg.DATASETS.TEST = cfg.DATASETS.TRAIN
    (tmp_path / "config.yaml").write_text(cfg.dump())
    words = ["--config-file", str(tmp_path / "config.yaml"), "--eval-only", "MODEL.WEIGHTS", path]
    results = main(argument_parser().parse_args(words))
    assert "AP" in results["bbox"]

    image = next((tmp_path / "data").rglob("*.png"))
    words = ["--config-file", str(tmp_path / "config.yaml"), "--weights", path, "--input", str(image)]
    words += ["--output", str(tmp_path / "drawn"), "--confidence-threshold", "0"]
    opts = ["--opts", "MODEL.DETR.NUM_CLASSES", "3"]  # which detrex's file does not say
    assert demo.run(demo.parser().parse_args([*words, *opts]), progress=False) == 0
    assert "7 boxes" in capsys.readouterr().out

    large = run(tmp_path, ["MODEL.DETR.NUM_CLASSES", 80])
    published = build_model(large)
    path = write(published, large, tmp_path, hub_names())
    cfg = run(tmp_path, ["MODEL.WEIGHTS", path, "MODEL.DETR.CLASS_ROWS", "match", "SOLVER.MAX_ITER", 1])
    trained = train(cfg).model
    # After one step of a small learning rate the rest is still what was loaded, the row of no-object too.
    row = trained.class_embed.weight[-1] - published.class_embed.weight[-1]
    assert row.abs().max() < 0.01 < (trained.class_embed.weight[0] - published.class_embed.weight[0]).abs().max()


def hub_names() -> list[str]:
    """COCO's, as config.json of a published detector has them."""
    from detr_family.checkpoint.rows import COCO_NAMES

    return list(COCO_NAMES)


@pytest.mark.parametrize("prefix", ["bbox_head.cls_branches.0.weight", "query_head.fc_cls.weight"])
@pytest.mark.parametrize("key", ["model", "state_dict"])
def test_mmdetections_are_refused_by_name(prefix: str, key: str, tmp_path: Path) -> None:
    state = {prefix: torch.zeros(2), "backbone.layer1.0.conv1.weight": torch.zeros(2)}
    torch.save({key: state, "meta": {}}, tmp_path / "mm.pth")
    with pytest.raises(ValueError, match=r"mm\.pth cannot be loaded: it is mmdetection's"):
        DETRCheckpointer(tiny.build("DETR")).load(str(tmp_path / "mm.pth"))


def test_a_download_that_broke_off_is_told(tmp_path: Path) -> None:
    model = tiny.build("DETR")
    DETRCheckpointer(model, str(tmp_path)).save("whole")
    (tmp_path / "half.pth").write_bytes((tmp_path / "whole.pth").read_bytes()[:9000])
    with pytest.raises(ValueError, match=r"half\.pth .*cut short.*fetch it anew"):
        DETRCheckpointer(model).load(str(tmp_path / "half.pth"))
