"""A checkpoint of another origin goes where one of this project goes: evaluation, fine-tuning, demo and predict."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import foreign
import hub
import pytest
import tiny
import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from engine_runs import run_cfg, train

from detr_family.checkpoint import DETRCheckpointer
from detr_family.checkpoint.rows import CLASS_ROWS, COCO_NAMES
from detr_family.commands import demo, predict
from detr_family.commands.train import main
from detr_family.engine.processes import argument_parser

SHAPES = ["circle", "square", "triangle"]
# What detrex's detectors have otherwise than the releases (docs/checkpoints.md).
DETREX_DINO = ["MODEL.DINO.SHARE_HEADS", False]
DETREX_DINO += ["MODEL.DETR.SPATIAL_ENCODING.TEMPERATURE", 10000.0, "MODEL.DETR.SPATIAL_ENCODING.OFFSET", -0.5]


def run(name: str, folder: Path, opts: Sequence[Any] = ()) -> CfgNode:
    """The named detector on a narrow ResNet-50."""
    maps = ["res4", "res5"] if name == "DINO" else ["res5"]
    cfg = hub.narrow(run_cfg(name, folder, "run"))
    cfg.merge_from_list(["MODEL.RESNETS.OUT_FEATURES", maps, *opts])
    return cfg


@pytest.mark.parametrize(
    ("name", "write", "opts"),
    [
        ("DETR", foreign.detrex_file, []),
        ("DETR", foreign.transformers_folder, []),
        pytest.param("DINO", foreign.detrex_file, DETREX_DINO, marks=pytest.mark.slow),
        pytest.param("DINO", foreign.released_file, [], marks=pytest.mark.slow),
        pytest.param("DETR", foreign.released_file, [], marks=pytest.mark.slow),
        pytest.param("DABDETR", foreign.transformers_bin, [], marks=pytest.mark.slow),
    ],
)
def test_it_is_evaluated_shown_and_fine_tuned(
    name: str,
    write: Any,
    opts: list[Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for function in ("setup_logger", "default_setup"):  # which would take the loggers from the tests after this one
        monkeypatch.setattr(f"detr_family.commands.train.{function}", lambda *_, **__: None)
    cfg = run(name, tmp_path, opts)
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
    classes = ["--opts", "MODEL.DETR.NUM_CLASSES", "3"]  # which only transformers' file says
    assert demo.run(demo.parser().parse_args([*words, *classes]), progress=False) == 0
    assert f"{7 if name == 'DETR' else 21} boxes" in capsys.readouterr().out  # a box for each class, from DAB-DETR on
    words[words.index("--output") + 1] = str(tmp_path / "found")
    assert predict.command([*words, "--num-workers", "0", *classes]) == 0
    assert len(json.loads((tmp_path / "found" / "results.json").read_text())) == (7 if name == "DETR" else 21)

    large = run(name, tmp_path, ["MODEL.DETR.NUM_CLASSES", 80, *opts])
    published = build_model(large)
    path = write(published, large, tmp_path, list(COCO_NAMES))
    more = ["MODEL.WEIGHTS", path, "MODEL.DETR.CLASS_ROWS", "match", "SOLVER.MAX_ITER", 1]
    trained = train(run(name, tmp_path, [*more, *opts])).model
    # After one step of a small learning rate all but the classes is still what was loaded.
    before, after = published.state_dict(), trained.state_dict()
    moved = {k: (after[k] - before[k]).abs().max() for k in before if not CLASS_ROWS.search(k)}
    assert max(moved.values()) < 0.01
    heads = [k for k in before if CLASS_ROWS.search(k) and k.endswith("weight")]
    assert heads and all((after[k][0] - before[k][0]).abs().max() > 0.01 for k in heads)
    if name == "DETR":  # the row of no-object, too
        assert (after["class_embed.weight"][-1] - before["class_embed.weight"][-1]).abs().max() < 0.01


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
