"""Detectron2's `DefaultTrainer` for detectors that predict sets."""

from __future__ import annotations

import logging
import weakref
from typing import Any

from detectron2.config import CfgNode
from detectron2.data import build_detection_train_loader
from detectron2.engine import DefaultTrainer, TrainerBase, create_ddp_model
from detectron2.evaluation import DatasetEvaluator
from detectron2.utils import comm
from torch import nn
from torch.optim import Optimizer

from detr_family.checkpoint import DETRCheckpointer
from detr_family.config import check_class_count, class_names
from detr_family.dataset_mapper import DETRDatasetMapper, build_test_loader
from detr_family.datasets.coco import training_dicts
from detr_family.engine.instability import build_instability_hook
from detr_family.engine.optimizer import build_optimizer, clips_full_model
from detr_family.engine.schedule import iterations_from_epochs
from detr_family.engine.step import TrainStep
from detr_family.evaluation import build_evaluator


class Trainer(DefaultTrainer):
    """Trains any of the detectors; hooks, writers, evaluation and resuming are Detectron2's.

    What differs: the schedule may be given in epochs, released checkpoints load, the training step is
    `TrainStep`, several processes work without GPUs, and the data set is checked before the first step.

    Args:
        cfg: a configuration with detr_family's keys, whose data sets are registered.

    Raises:
        ValueError: class counts that disagree, a data set or a setting that cannot be trained with.
    """

    def __init__(self, cfg: CfgNode) -> None:
        # DefaultTrainer's own __init__ makes its own step, checkpointer and DDP wrapper, and has no place
        # for the data set's size between the configuration and the schedule.
        TrainerBase.__init__(self)
        cfg = DefaultTrainer.auto_scale_workers(cfg, comm.get_world_size())
        if cfg.SOLVER.IMS_PER_BATCH % comm.get_world_size() or cfg.SOLVER.IMS_PER_BATCH < 1:
            raise ValueError(
                f"SOLVER.IMS_PER_BATCH {cfg.SOLVER.IMS_PER_BATCH} cannot be split over "
                f"{comm.get_world_size()} processes"
            )
        check_class_count(cfg)
        dataset = training_dicts(cfg)
        self.cfg = cfg = iterations_from_epochs(cfg, len(dataset))

        model = self.build_model(cfg)
        optimizer = self.build_optimizer(cfg, model)
        loader = build_detection_train_loader(cfg, mapper=DETRDatasetMapper(cfg, True), dataset=dataset)
        device_ids = [comm.get_local_rank()] if next(model.parameters()).is_cuda else None
        model = create_ddp_model(model, broadcast_buffers=False, device_ids=device_ids)
        self._trainer = TrainStep(
            model,
            loader,
            optimizer,
            clip_norm=cfg.SOLVER.CLIP_GRADIENTS.CLIP_VALUE if clips_full_model(cfg) else None,
            amp=cfg.SOLVER.AMP.ENABLED,
            nonfinite=cfg.SOLVER.NONFINITE,
            output_dir=cfg.OUTPUT_DIR,
        )
        self.scheduler = self.build_lr_scheduler(cfg, optimizer)
        self.checkpointer = DETRCheckpointer(
            model, cfg.OUTPUT_DIR, class_names=class_names(cfg), trainer=weakref.proxy(self)
        )
        self.start_iter = 0
        self.max_iter = cfg.SOLVER.MAX_ITER
        hooks = self.build_hooks()
        instability = build_instability_hook(cfg, dataset, cfg.SOLVER.IMS_PER_BATCH // comm.get_world_size())
        if instability is not None:
            hooks.insert(1, instability)  # before checkpoints and writers, which take what it has found
        self.register_hooks(hooks)

    @classmethod
    def build_model(cls, cfg: CfgNode) -> nn.Module:
        """Detectron2's `build_model`, with a line on its size in the log."""
        model = super().build_model(cfg)
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        total = sum(p.numel() for p in model.parameters())
        logging.getLogger(__name__).info("%.1f M parameters, %.1f M of them trained", total / 1e6, trained / 1e6)
        return model

    @classmethod
    def build_optimizer(cls, cfg: CfgNode, model: nn.Module) -> Optimizer:
        """AdamW in two groups, see `detr_family.engine.optimizer`."""
        return build_optimizer(cfg, model)

    @classmethod
    def build_train_loader(cls, cfg: CfgNode) -> Any:
        """Batches of the training set as the detectors are trained on it."""
        return build_detection_train_loader(
            cfg, mapper=DETRDatasetMapper(cfg, True), dataset=training_dicts(cfg)
        )

    @classmethod
    def build_test_loader(cls, cfg: CfgNode, dataset_name: str) -> Any:
        """Pictures of a test set, TEST.IMS_PER_BATCH at a time."""
        return build_test_loader(cfg, dataset_name)

    @classmethod
    def build_evaluator(cls, cfg: CfgNode, dataset_name: str) -> DatasetEvaluator:
        """The COCO evaluator, writing to OUTPUT_DIR/inference; see `detr_family.evaluation.inference_folder`."""
        return build_evaluator(cfg, dataset_name)


