"""What Detectron2 lets a subclass of its trainer override is heard here, and mistakes are told before a training."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetMapper, build_detection_test_loader, build_detection_train_loader
from detectron2.data import transforms as T
from detectron2.engine import HookBase
from detectron2.evaluation import DatasetEvaluator
from detectron2.solver import build_optimizer as detectron2_optimizer
from engine_runs import run_cfg

from detr_family.data.dataset_mapper import DETRDatasetMapper
from detr_family.data.datasets.coco import check_test_sets, training_dicts
from detr_family.data.images import read_image
from detr_family.engine import Trainer
from detr_family.engine.loader import InParts, TrainLoader


class Heard(HookBase):
    pass


class Brightened(DatasetMapper):
    """An ordinary mapper of Detectron2's, with something of its own."""

    def __call__(self, dataset_dict: dict[str, Any]) -> dict[str, Any]:
        mapped = super().__call__(dataset_dict)
        assert mapped is not None
        return {**mapped, "image": mapped["image"] | 1, "own": True}


class Counted(DatasetEvaluator):
    def reset(self) -> None:
        self.inputs: list[dict[str, Any]] = []

    def process(self, inputs: Any, outputs: Any) -> None:
        self.inputs += inputs

    def evaluate(self) -> dict[str, Any]:
        return {"own": {"images": len(self.inputs), "marked": all("own" in x for x in self.inputs)}}


class Own(Trainer):
    """Overrides everything that Detectron2's trainer offers."""

    @classmethod
    def build_train_loader(cls, cfg: CfgNode) -> Any:
        return build_detection_train_loader(cfg, mapper=Brightened(cfg, True))

    @classmethod
    def build_test_loader(cls, cfg: CfgNode, dataset_name: str) -> Any:
        return build_detection_test_loader(cfg, dataset_name, mapper=Brightened(cfg, False))

    @classmethod
    def build_evaluator(cls, cfg: CfgNode, dataset_name: str) -> Any:
        return Counted()

    @classmethod
    def build_optimizer(cls, cfg: CfgNode, model: torch.nn.Module) -> Any:
        return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.25)

    @classmethod
    def build_lr_scheduler(cls, cfg: CfgNode, optimizer: Any) -> Any:
        return torch.optim.lr_scheduler.ConstantLR(optimizer, factor=0.5, total_iters=100)

    @classmethod
    def build_model(cls, cfg: CfgNode) -> Any:
        model = super().build_model(cfg)
        model.own = True
        model.seen = []
        model.register_forward_pre_hook(lambda module, inputs: module.seen.append((module.training, inputs[0])))
        return model

    def build_hooks(self) -> list[HookBase]:
        return [*super().build_hooks(), Heard()]


def with_tests(cfg: CfgNode) -> CfgNode:
    cfg.DATASETS.TEST = cfg.DATASETS.TRAIN
    cfg.VIS_REPORT = False
    return cfg


@pytest.mark.parametrize("per_forward", [0, 1])
def test_every_override_is_heard(tmp_path: Path, caplog: pytest.LogCaptureFixture, per_forward: int) -> None:
    cfg = with_tests(run_cfg("DETR", tmp_path, "run", ["SOLVER.MAX_ITER", 2, "SOLVER.STEPS", ()]))
    cfg.INPUT.CROP.ENABLED, cfg.SOLVER.IMAGES_PER_FORWARD = False, per_forward
    with caplog.at_level(logging.WARNING):
        trainer = Own(cfg)
    trainer.train()
    told = [x for x in caplog.messages if "build_train_loader gives a loader of its own" in x]
    assert len(told) == 1 and told[0].startswith("Own.")
    model = trainer.model
    training = [inputs for is_training, inputs in model.seen if is_training]
    assert len(training) == 2 * (4 if per_forward else 1)
    assert {len(inputs) for inputs in training} == {per_forward or 4}
    assert all(x["own"] for inputs in training for x in inputs)
    assert model.own and isinstance(trainer.optimizer, torch.optim.SGD)
    assert trainer.optimizer.param_groups[0]["lr"] == 0.125
    assert isinstance(trainer.scheduler, torch.optim.lr_scheduler.ConstantLR)
    assert any(isinstance(hook, Heard) for hook in trainer._hooks)
    assert trainer._last_eval_results["own"] == {"images": 14, "marked": True}


def test_an_own_mapper_in_the_exact_loader_stays_exact(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    class Exact(Trainer):
        @classmethod
        def build_train_loader(cls, cfg: CfgNode) -> Any:
            return TrainLoader(cfg, training_dicts(cfg), Brightened(cfg, True))

    cfg = run_cfg("DETR", tmp_path, "run")
    cfg.INPUT.CROP.ENABLED = False
    with caplog.at_level(logging.WARNING):
        trainer = Exact(cfg)
    assert "of its own" not in caplog.text
    loader = trainer.data_loader
    assert isinstance(loader, TrainLoader) and loader.seed == trainer.seed
    assert all(x["own"] for x in next(iter(loader)))


def test_own_augmentation_by_what_detectron2_overrides(tmp_path: Path) -> None:
    """Detectron2's mapper with augmentations of one's own: images and boxes are mirrored, and it can be trained on."""

    class Mirrored(Trainer):
        @classmethod
        def build_train_loader(cls, cfg: CfgNode) -> Any:
            mirror = T.RandomFlip(prob=1.0, horizontal=True, vertical=False)
            mapper = DatasetMapper(is_train=True, augmentations=[mirror], image_format=cfg.INPUT.FORMAT)
            return TrainLoader(cfg, training_dicts(cfg), mapper)

    cfg = run_cfg("DETR", tmp_path, "run", ["SOLVER.MAX_ITER", 1, "SOLVER.STEPS", (), "VIS_REPORT", False])
    trainer = Mirrored(cfg)
    records = {record["file_name"]: record for record in training_dicts(cfg)}
    seen = 0
    for mapped in next(iter(trainer.data_loader)):
        record = records[mapped["file_name"]]
        boxes = torch.tensor([a["bbox"] for a in record["annotations"]]).reshape(-1, 4)
        left = record["width"] - boxes[:, 0] - boxes[:, 2]  # x, y, width, height
        torch.testing.assert_close(mapped["instances"].gt_boxes.tensor[:, 0], left.float())
        image = torch.from_numpy(read_image(mapped["file_name"], cfg.INPUT.FORMAT).copy()).permute(2, 0, 1)
        assert torch.equal(mapped["image"], image.flip(2))
        seen += len(boxes)
    assert seen
    trainer.train()


def test_batches_that_cannot_be_divided_are_told() -> None:
    assert [len(x) for x in InParts([[{}] * 6], 3)] == [2, 2, 2]
    with pytest.raises(ValueError, match=r"a batch of 5 images, which cannot be divided into 2 parts"):
        list(InParts([[{}] * 5], 2))


def test_losses_without_ground_truth_are_told(tmp_path: Path) -> None:
    """As in a hook that wants the loss on the validation set and takes the mapper of an evaluation."""
    cfg = run_cfg("DETR", tmp_path, "run")
    mapper = DETRDatasetMapper(cfg, False)
    inputs = [mapper(x) for x in training_dicts(cfg)[:2]]
    for name in tiny.DETECTORS:
        model = tiny.build(name).train()
        with pytest.raises(ValueError, match=r"\.png comes without ground truth.*is_train=True.*model\.eval\(\)"):
            model(inputs)
    assert len(model.eval()(inputs)) == 2


def test_a_built_in_test_set_that_is_not_here_is_told(cfg: CfgNode) -> None:
    cfg.DATASETS.TEST = ("coco_2017_val",)
    message = r"'coco_2017_val' in DATASETS\.TEST cannot be evaluated on: its annotation file .* is not there"
    with pytest.raises(ValueError, match=message):
        check_test_sets(cfg)


def changed(path: str, folder: Path, **keys: Any) -> str:
    """A copy of an annotation file with other entries; one that is None is left out."""
    data = {**json.loads(Path(path).read_text()), **keys}
    copy = folder / "changed.json"
    copy.write_text(json.dumps({k: v for k, v in data.items() if v is not None}))
    return str(copy)


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("string", r"DATASETS\.TEST is 'other', one text, and must be a tuple.*\('other',\)"),
        ("train string", r"DATASETS\.TRAIN is '.*', one text, and must be a tuple"),
        ("unknown", r"DATASETS\.TEST names 'other', which is no registered dataset"),
        ("missing", r"'other.*' in DATASETS\.TEST cannot be evaluated on: .*gone\.json.*DATASETS\.TEST \"\(\)\""),
        ("no categories", r"'other.*' in DATASETS\.TEST cannot be evaluated on: .*\"categories\" is missing"),
        ("broken", r"'other.*' in DATASETS\.TEST cannot be evaluated on: .*the file is not JSON"),
        ("no images", r"'other.*' in DATASETS\.TEST cannot be evaluated on: .*images looked for are missing"),
        ("detector", r"MODEL\.META_ARCHITECTURE is 'DETRR', which is not registered"),
    ],
)
def test_mistakes_are_told_before_a_training_from_python(tmp_path: Path, fault: str, message: str) -> None:
    cfg = run_cfg("DETR", tmp_path, "run")
    _, json_file, folder = cfg.DATASETS.COCO_FORMAT[0]
    name = f"other {tmp_path}"  # the catalog of datasets is one for all tests
    files = {
        "missing": str(tmp_path / "gone.json"),
        "no categories": changed(json_file, tmp_path, categories=None),
        "no images": json_file,
    }
    if fault == "broken":
        (tmp_path / "broken.json").write_text('{"images": [')
        files["broken"] = str(tmp_path / "broken.json")
    if fault in files:
        place = str(tmp_path) if fault == "no images" else folder
        cfg.DATASETS.COCO_FORMAT = [*cfg.DATASETS.COCO_FORMAT, [name, files[fault], place]]
        cfg.DATASETS.TEST = (name,)
    elif fault == "detector":
        cfg.MODEL.META_ARCHITECTURE = "DETRR"
    elif fault == "train string":
        cfg.DATASETS.TRAIN = cfg.DATASETS.TRAIN[0]
    else:
        cfg.DATASETS.TEST = {"string": "other", "unknown": ("other",)}[fault]
    with pytest.raises(ValueError, match=message):
        Trainer(cfg)


def small(folder: Path, *opts: Any) -> CfgNode:
    keys = ["SOLVER.MAX_ITER", 2, "SOLVER.STEPS", (), "VIS_REPORT", False, "INPUT.CROP.ENABLED", False, *opts]
    return run_cfg("DETR", folder, "run", keys)


def own(**methods: Any) -> type[Trainer]:
    return type("Mine", (Trainer,), methods)


@pytest.mark.parametrize(
    "method", ["build_model", "build_optimizer", "build_lr_scheduler", "build_train_loader", "build_hooks"]
)
def test_a_forgotten_return_is_told(tmp_path: Path, method: str) -> None:
    with pytest.raises(ValueError, match=rf"Mine\.{method} returned None: it must return what it builds"):
        own(**{method: lambda *_: None})(small(tmp_path))


def test_what_a_training_would_fail_of_is_told_before_it(tmp_path: Path) -> None:
    def plateau(_: Any, optimizer: Any) -> Any:
        return torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)

    with pytest.raises(ValueError, match=r"Mine\.build_lr_scheduler gives a ReduceLROnPlateau"):
        own(build_lr_scheduler=staticmethod(plateau))(small(tmp_path))
    with pytest.raises(ValueError, match=r"Mine\.build_optimizer asks Detectron2 to clip.*ENABLED False"):
        own(build_optimizer=staticmethod(detectron2_optimizer))(small(tmp_path))


def test_a_loader_that_ends_and_a_model_left_in_evaluation_mode_are_told(tmp_path: Path) -> None:
    cfg = small(tmp_path)
    batch = [Brightened(cfg, True)(x) for x in training_dicts(cfg)[:4]]
    with pytest.raises(ValueError, match=r"the training loader, list, ended before iteration 1: .* endless"):
        own(build_train_loader=staticmethod(lambda _: [batch]))(cfg).train()

    class Looks(HookBase):
        def after_step(self) -> None:
            self.trainer.model.eval()

    with pytest.raises(ValueError, match=r"the model is in evaluation mode.*model\.train\(\)"):
        own(build_hooks=lambda self: [*Trainer.build_hooks(self), Looks()])(cfg).train()


def test_a_mapper_leaves_images_out_as_with_detectron2(tmp_path: Path) -> None:
    cfg = small(tmp_path)
    dicts = training_dicts(cfg)
    kept = {x["file_name"] for x in dicts[::2]}

    def mapper(record: dict[str, Any]) -> dict[str, Any] | None:
        return Brightened(cfg, True)(record) if record["file_name"] in kept else None

    def names() -> list[str]:
        batches = iter(TrainLoader(cfg, dicts, mapper))
        return [x["file_name"] for _ in range(5) for x in next(batches)]

    first = names()
    assert set(first) <= kept and len(first) == 20
    assert names() == first  # the seed decides what is taken in an image's place
    with pytest.raises(ValueError, match="the mapper, nothing, gave None for 100 images"):

        def nothing(_: dict[str, Any]) -> None:
            return None

        next(iter(TrainLoader(cfg, dicts, nothing)))


def test_images_are_counted_with_a_run_step_of_ones_own(tmp_path: Path) -> None:
    def run_step(self: Trainer) -> None:
        self._trainer.iter = self.iter
        self._trainer.run_step()

    trainer = own(run_step=run_step)(small(tmp_path))
    trainer.train()
    assert trainer.images == 8
    again = Trainer(small(tmp_path, "SOLVER.MAX_ITER", 3))
    again.resume_or_load()
    assert again.data_loader.images == 8  # else it would see the first images anew


def test_a_model_of_ones_own_may_give_one_loss(tmp_path: Path) -> None:
    class One(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(1))

        def forward(self, batch: list[dict[str, Any]]) -> torch.Tensor:
            return (self.weight**2).sum()

    trainer = own(build_model=staticmethod(lambda _: One()))(small(tmp_path))
    trainer.train()
    assert trainer.storage.history("loss").latest() == trainer.storage.history("total_loss").latest() > 0
