"""Every key of Detectron2's is either read, or known as one without effect and told when it is changed."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
from detectron2.config import CfgNode, get_cfg
from engine_runs import run_cfg
from yacs.config import CfgNode as YacsNode

from detr_family.analysis.loading import load_cfg
from detr_family.checkpoint import DETRCheckpointer
from detr_family.config import ignored, load_config
from detr_family.config.ignored import IGNORED, ignored_keys, warn_of_ignored
from detr_family.engine import Trainer
from detr_family.inference import Predictor

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
# Read by Detectron2 or this package, some under conditions (a scheduler, a backbone, precise batch norms).
READ = {
    "VERSION", "MODEL.DEVICE", "MODEL.META_ARCHITECTURE", "MODEL.WEIGHTS", "MODEL.PIXEL_MEAN", "MODEL.PIXEL_STD",
    "MODEL.BACKBONE", "MODEL.RESNETS", "MODEL.FPN", "INPUT.MIN_SIZE_TRAIN", "INPUT.MIN_SIZE_TRAIN_SAMPLING",
    "INPUT.MAX_SIZE_TRAIN", "INPUT.MIN_SIZE_TEST", "INPUT.MAX_SIZE_TEST", "INPUT.RANDOM_FLIP", "INPUT.CROP",
    "INPUT.FORMAT", "DATASETS.TRAIN", "DATASETS.TEST", "DATALOADER", "SOLVER.LR_SCHEDULER_NAME", "SOLVER.MAX_ITER",
    "SOLVER.BASE_LR", "SOLVER.BASE_LR_END", "SOLVER.WEIGHT_DECAY", "SOLVER.GAMMA", "SOLVER.STEPS",
    "SOLVER.NUM_DECAYS", "SOLVER.WARMUP_FACTOR", "SOLVER.WARMUP_ITERS", "SOLVER.WARMUP_METHOD",
    "SOLVER.RESCALE_INTERVAL", "SOLVER.CHECKPOINT_PERIOD", "SOLVER.IMS_PER_BATCH", "SOLVER.REFERENCE_WORLD_SIZE",
    "SOLVER.CLIP_GRADIENTS", "SOLVER.AMP", "TEST.EVAL_PERIOD", "TEST.DETECTIONS_PER_IMAGE", "TEST.PRECISE_BN",
    "TEST.AUG", "TEST.EXPECTED_RESULTS", "OUTPUT_DIR", "SEED", "CUDNN_BENCHMARK", "VIS_PERIOD",
}  # fmt: skip


def leaves(node: Any, prefix: str = "") -> Iterator[str]:
    for key, value in node.items():
        if isinstance(value, CfgNode):
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}"


def entries(key: str, names: Any) -> list[str]:
    return [name for name in names if f"{key}.".startswith(f"{name}.")]


def test_every_key_of_detectron2_is_known() -> None:
    for key in leaves(get_cfg()):
        assert bool(entries(key, READ)) != bool(entries(key, IGNORED)), key
    known = list(leaves(get_cfg()))
    assert all(any(f"{key}.".startswith(f"{entry}.") for key in known) for entry in IGNORED)


def test_what_the_table_names_is_not_read_by_a_training_and_its_evaluation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg = run_cfg("DETR", tmp_path, "run", ["SOLVER.MAX_ITER", 1, "SOLVER.STEPS", ()])
    cfg.DATASETS.TEST, cfg.VIS_REPORT = cfg.DATASETS.TRAIN, False
    groups: dict[tuple[str, ...], list[str]] = defaultdict(list)  # a copy of a group has the same keys

    def note(node: CfgNode, prefix: str) -> None:
        groups[tuple(sorted(node))].append(prefix)
        for key, value in node.items():
            if isinstance(value, CfgNode):
                note(value, f"{prefix}{key}.")

    note(cfg, "")
    read: set[str] = set()
    plain = YacsNode.__getattr__

    def noting(self: YacsNode, name: str) -> Any:
        for prefix in groups.get(tuple(sorted(self)), ()) if name in self else ():
            read.add(f"{prefix}{name}")
        return plain(self, name)

    monkeypatch.setattr(YacsNode, "__getattr__", noting)
    Trainer(cfg).train()
    monkeypatch.undo()
    assert {"SOLVER.BASE_LR", "TEST.DETECTIONS_PER_IMAGE", "INPUT.MIN_SIZE_TEST"} <= read
    # The mapper of Detectron2 asks whether there are masks, keypoints and proposals; what it would load nothing takes.
    mapper = {"MODEL.MASK_ON", "MODEL.KEYPOINT_ON", "MODEL.LOAD_PROPOSALS", "INPUT.MASK_FORMAT"}
    leaf = set(leaves(cfg))
    assert {key for key in read & leaf if entries(key, IGNORED)} <= mapper


CHANGES = ["MODEL.ROI_HEADS.NUM_CLASSES", "5", "MODEL.RPN.NMS_THRESH", "0.5"]
CHANGES += ["SOLVER.MOMENTUM", "0.8", "MODEL.MASK_ON", "True", "MODEL.ANCHOR_GENERATOR.SIZES", "[[8]]"]


def test_a_changed_key_is_told_once(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ignored, "_told", set())
    cfg = load_config(str(CONFIGS / "detr_r50.yaml"), CHANGES)
    assert set(ignored_keys(cfg)) == set(CHANGES[::2])
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        warn_of_ignored(cfg, but=["SOLVER"])
        warn_of_ignored(cfg, but=["SOLVER"])
    assert len(caplog.messages) == 1 and "MODEL.ROI_HEADS.NUM_CLASSES (set MODEL.DETR.NUM_CLASSES)" in caplog.text
    assert "MODEL.ANCHOR_GENERATOR.SIZES, MODEL.RPN.NMS_THRESH (there are no anchors" in caplog.text
    assert "SOLVER.MOMENTUM" not in caplog.text
    warn_of_ignored(cfg)
    assert len(caplog.messages) == 2 and "SOLVER.MOMENTUM (the optimizer is AdamW" in caplog.messages[1]


def test_it_depends_on_backbone_clipping_and_detector() -> None:
    opts = ["MODEL.FPN.OUT_CHANNELS", "64", "MODEL.RESNETS.DEPTH", "18", "SOLVER.CLIP_GRADIENTS.NORM_TYPE", "1.0"]
    cfg = load_config(str(CONFIGS / "detr_r50.yaml"), opts)
    assert set(ignored_keys(cfg)) == {"MODEL.FPN.OUT_CHANNELS", "SOLVER.CLIP_GRADIENTS.NORM_TYPE"}
    cfg.MODEL.BACKBONE.NAME, cfg.SOLVER.CLIP_GRADIENTS.CLIP_TYPE = "build_resnet_fpn_backbone", "norm"
    assert not ignored_keys(cfg)
    for name, group in (("swin", "SWIN"), ("timm", "TIMM"), ("vit", "VIT")):
        cfg.MODEL.BACKBONE.NAME = f"build_{name}_backbone"
        assert set(ignored_keys(cfg)) == {"MODEL.FPN.OUT_CHANNELS", "MODEL.RESNETS.DEPTH"}
        assert f"set in MODEL.{group}" in ignored_keys(cfg)["MODEL.RESNETS.DEPTH"]
        other = cfg.clone()
        other.MODEL.RESNETS.OUT_FEATURES = ["res3"]
        assert "MODEL.RESNETS.OUT_FEATURES" in ignored_keys(other)
    cfg.MODEL.META_ARCHITECTURE = "GeneralizedRCNN"
    assert not ignored_keys(cfg)


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda p: p.stem)
def test_our_own_recipes_set_nothing_without_effect(path: Path) -> None:
    assert not ignored_keys(load_config(str(path)))


def test_predictions_and_analyses_tell_of_it_too(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def told(act: Callable[[], object]) -> list[str]:
        monkeypatch.setattr(ignored, "_told", set())
        caplog.clear()
        act()
        return [message for message in caplog.messages if "without effect" in message]

    DETRCheckpointer(tiny.build("DETR"), str(tmp_path)).save("model")
    cfg = tiny.cfg_of("DETR")
    cfg.merge_from_list(["MODEL.ROI_HEADS.SCORE_THRESH_TEST", 0.7, "SOLVER.MOMENTUM", 0.8])
    (tmp_path / "config.yaml").write_text(cfg.dump())
    weights = str(tmp_path / "model.pth")
    for act in (
        lambda: Predictor.from_config(cfg, weights),
        lambda: load_cfg(str(tmp_path / "config.yaml"), ["MODEL.WEIGHTS", weights]),
    ):
        (message,) = told(act)
        assert "MODEL.ROI_HEADS.SCORE_THRESH_TEST (the TEST.DETECTIONS_PER_IMAGE best" in message
        assert "SOLVER" not in message  # nothing is trained
