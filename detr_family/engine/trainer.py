"""Detectron2's `DefaultTrainer` for detectors that predict sets."""

from __future__ import annotations

import copy
import logging
import os
import sys
import time
import weakref
from collections.abc import Iterable, Sequence
from typing import Any

from detectron2.config import CfgNode
from detectron2.engine import DefaultTrainer, HookBase, TrainerBase, create_ddp_model
from detectron2.engine.hooks import CallbackHook, EvalHook, PeriodicCheckpointer, PeriodicWriter
from detectron2.evaluation import DatasetEvaluator
from detectron2.solver import LRMultiplier
from detectron2.utils import comm
from detectron2.utils.events import EventWriter
from torch import nn
from torch.optim import Optimizer

from detr_family.checkpoint import DETRCheckpointer
from detr_family.checkpoint.files import CheckpointError
from detr_family.config import (
    check_class_count,
    check_registered,
    class_names,
    images_per_forward,
    parts_of_step,
)
from detr_family.config.ignored import warn_of_ignored
from detr_family.config.types import check_choices, check_types
from detr_family.data.dataset_mapper import DETRDatasetMapper, build_test_loader
from detr_family.data.datasets.coco import check_dataset_names, check_test_sets, register_datasets, training_dicts
from detr_family.engine.averaging import WeightAverage
from detr_family.engine.best import EarlyStop, KeepBest, check_best_metric, keeping_hooks, remember_checkpoints
from detr_family.engine.instability import build_instability_hook
from detr_family.engine.interruption import (
    STATUS,
    Interrupted,
    Listener,
    ProcessLostError,
    StorageError,
    explained,
    explanation,
    in_flight,
    leave_with_main,
)
from detr_family.engine.loader import InParts, TrainLoader
from detr_family.engine.loggers import LoggerHook, build_loggers, check_loggers
from detr_family.engine.occupation import is_still_there, leave, occupy
from detr_family.engine.optimizer import build_optimizer, clips_full_model
from detr_family.engine.overrides import given
from detr_family.engine.randomness import run_seed
from detr_family.engine.records import keep_short, make_up, recipe_of, restore, state_of
from detr_family.engine.schedule import iterations_from_epochs
from detr_family.engine.step import TrainStep
from detr_family.engine.watch import watching_hooks
from detr_family.evaluation.evaluator import build_evaluator
from detr_family.inference.augmentation import augmented

_logger = logging.getLogger(__name__)

# Keys, by their beginnings, and the method that reads them.
_READERS = {
    "SOLVER.LR_SCHEDULER_NAME": "build_lr_scheduler",
    "SOLVER.WARMUP": "build_lr_scheduler",
    "SOLVER.BEST_METRIC": "build_hooks",
    "SOLVER": "build_optimizer",
    "INPUT": "build_train_loader",
    "DATALOADER": "build_train_loader",
    "TEST": "build_evaluator",
}


class Trainer(DefaultTrainer):
    """Trains any of the detectors; hooks, writers and evaluation are Detectron2's.

    What differs: the schedule may be given in epochs, released checkpoints load, the training step is
    `TrainStep`, several processes work without GPUs, the dataset is checked before the first step, the weights
    may be averaged, and a run that was stopped and resumed gives what one that was not would have given.

    A resumed run takes its settings from the configuration, not from the checkpoint, and logs those that differ.

    Args:
        cfg: a configuration with detr_family's keys; datasets that it does not name in DATASETS.COCO_FORMAT are
            registered.

    Raises:
        ValueError: class counts that disagree, a dataset or a setting that cannot be trained with.
    """

    def __init__(self, cfg: CfgNode) -> None:
        # DefaultTrainer's own __init__ makes its own step, checkpointer and DDP wrapper, and has no place
        # for the dataset's size between the configuration and the schedule.
        TrainerBase.__init__(self)
        check_types(cfg)
        occupy(cfg.OUTPUT_DIR)
        cfg = DefaultTrainer.auto_scale_workers(cfg, comm.get_world_size())
        check_registered(cfg)
        own = [group for group, method in _READERS.items() if self._overrides(method)]
        check_choices(cfg, own)
        check_best_metric(cfg, own)
        warn_of_ignored(cfg, own)
        check_dataset_names(cfg)
        check_loggers(cfg)
        cfg = _registered(cfg)
        parts = parts_of_step(cfg, comm.get_world_size())
        check_class_count(cfg)
        dataset = training_dicts(cfg)
        check_test_sets(cfg, own_evaluator="TEST" in own)
        self.cfg = cfg = iterations_from_epochs(cfg, len(dataset))
        self.seed = run_seed(cfg.SEED)
        self.images = 0  # taken by all processes
        self.evaluated = -1  # the last iteration that was
        self.settled = -1  # the last iteration whose state is complete
        self._records: dict[str, Any] = {}
        self._outer: BaseException | None = None
        this = weakref.proxy(self)
        self._listener = Listener(lambda: bool(this._trainer.moving))
        _logger.info("The seed of this run is %d; SEED %d repeats it", self.seed, self.seed)

        model = given(self, "build_model", cfg)
        optimizer = given(self, "build_optimizer", cfg, model)
        loader = self._train_loader(cfg, dataset, parts)
        device_ids = [comm.get_local_rank()] if next(model.parameters()).is_cuda else None
        model = create_ddp_model(model, broadcast_buffers=False, device_ids=device_ids)
        self._trainer = TrainStep(
            model,
            loader,
            optimizer,
            clip_norm=cfg.SOLVER.CLIP_GRADIENTS.CLIP_VALUE if clips_full_model(cfg) else None,
            amp=cfg.SOLVER.AMP.ENABLED,
            precision=cfg.SOLVER.AMP.PRECISION,
            accumulation=parts,
            seed=self.seed,
            nonfinite=cfg.SOLVER.NONFINITE,
            output_dir=cfg.OUTPUT_DIR,
        )
        together = images_per_forward(cfg, comm.get_world_size())
        if parts > 1:
            _logger.info("Each process computes its share of a batch in %d parts of %d", parts, together)
        self.scheduler = given(self, "build_lr_scheduler", cfg, optimizer)
        self.average = WeightAverage(model, cfg.SOLVER.EMA.DECAY) if cfg.SOLVER.EMA.ENABLED else None
        self.checkpointer = DETRCheckpointer(
            model,
            cfg.OUTPUT_DIR,
            class_rows=cfg.MODEL.DETR.CLASS_ROWS,
            class_names=class_names(cfg),
            trainer=weakref.proxy(self),
        )
        if self.average is not None:
            self.checkpointer.add_checkpointable("ema", self.average)
        self.start_iter = 0
        self.max_iter = cfg.SOLVER.MAX_ITER
        hooks = given(self, "build_hooks")
        instability = build_instability_hook(cfg, dataset, together)
        if instability is not None:
            hooks.insert(1, instability)  # before checkpoints and writers, which take what it has found
        self.register_hooks(hooks)

    def _overrides(self, method: str) -> bool:
        """Whether a subclass has a method of its own in the place of this class's."""
        own, ours = (getattr(owner, method) for owner in (type(self), Trainer))
        return getattr(own, "__func__", own) is not getattr(ours, "__func__", ours)

    def _train_loader(self, cfg: CfgNode, dataset: Sequence[dict[str, Any]], parts: int) -> Iterable[Any]:
        """What `build_train_loader` gives, which a subclass may have overridden, in parts of a batch."""
        if self._overrides("build_train_loader"):
            loader: Iterable[Any] = given(self, "build_train_loader", cfg)
        else:  # of what has been read already
            loader = TrainLoader(cfg, dataset, DETRDatasetMapper(cfg, True))
        if isinstance(loader, TrainLoader):
            loader.seed = self.seed
            return loader
        _logger.warning(
            "%s.build_train_loader gives a loader of its own, %s: its order of images and its augmentation start anew "
            "when a run is resumed, and differ with the number of processes and workers",
            type(self).__name__, type(loader).__name__,
        )  # fmt: skip
        return InParts(loader, parts) if parts > 1 else loader

    def build_hooks(self) -> list[HookBase]:
        """Detectron2's; the average moves before it is saved, and is evaluated whenever the weights are."""
        hooks: list[HookBase] = super().build_hooks()
        saving = [i for i, hook in enumerate(hooks) if isinstance(hook, (PeriodicCheckpointer, EvalHook))]
        hooks.insert(saving[0] if saving else len(hooks), CallbackHook(after_step=Trainer._settle))
        if self.average is not None:
            hooks.insert(1, CallbackHook(after_step=lambda trainer: trainer.average.update()))
            after_evaluation = 1 + max(i for i, hook in enumerate(hooks) if isinstance(hook, EvalHook))
            hooks.insert(after_evaluation, EvalHook(self.cfg.TEST.EVAL_PERIOD, self.test_average))
        after_evaluation = 1 + max((i for i, hook in enumerate(hooks) if isinstance(hook, EvalHook)), default=-1)
        hooks.insert(after_evaluation, CallbackHook(after_step=Trainer._note_evaluation))
        return watching_hooks(self.cfg, keeping_hooks(self.cfg, hooks, self.checkpointer))

    def build_writers(self) -> list[EventWriter]:
        """Those of LOGGERS and Detectron2's."""
        return [*build_loggers(self.cfg), *super().build_writers()]

    def before_train(self) -> None:
        """The hooks', and what the run has missed that is resumed; one that had stopped early does not go on."""
        self.settled = self.start_iter - 1
        keep_short(self.storage)
        with explained(self.cfg.OUTPUT_DIR):
            restore(self._records, self.storage, self._hooks, self.start_iter)
            super().before_train()
            make_up(self, self.cfg.TEST.EVAL_PERIOD)
            self.iter = self.start_iter - 1
            self._stop_early()
            if self.start_iter != self.max_iter:
                self.iter = self.start_iter
            elif not self.checkpointer.get_checkpoint_file().endswith("model_final.pth"):  # stopped just before it
                self.checkpointer.save("model_final", iteration=self.iter)

    def after_step(self) -> None:
        """The hooks', and the early end."""
        self._trainer.moving = True  # also where the step was skipped
        self.images += self.cfg.SOLVER.IMS_PER_BATCH  # here, as a subclass may have a run_step of its own
        with explained(self.cfg.OUTPUT_DIR):
            super().after_step()
            self._stop_early()

    def after_train(self) -> None:
        """The hooks'; of a run that ends before its time what has to be, the checkpoint first."""
        error = in_flight(self._outer)
        error = error and (explanation(error, self.cfg.OUTPUT_DIR) or error)
        if not isinstance(error, (Interrupted, ProcessLostError, StorageError, CheckpointError)):
            with explained(self.cfg.OUTPUT_DIR):
                super().after_train()
            return
        if isinstance(error, (Interrupted, ProcessLostError)):
            self._save_settled()
        for hook in self._hooks:  # writers, then what ends the runs of loggers
            if isinstance(hook, (PeriodicWriter, LoggerHook)) and is_still_there(self.cfg.OUTPUT_DIR):
                try:
                    hook.after_train()
                except OSError as again:
                    _logger.debug("The last metrics are not written: %s", again)

    def _settle(self) -> None:
        """Weights, average and schedule have done this iteration."""
        self.settled = self.iter
        self._trainer.moving = False
        self._listener.check()
        done = self.iter + 1
        periods = (self.cfg.SOLVER.CHECKPOINT_PERIOD, self.cfg.TEST.EVAL_PERIOD, 20)
        written = done == self.max_iter or any(period > 0 and done % period == 0 for period in periods)
        if written and not is_still_there(self.cfg.OUTPUT_DIR):  # evaluations and TensorBoard would make another one
            raise StorageError(
                f"OUTPUT_DIR {self.cfg.OUTPUT_DIR} is not there any more, or another folder (was a network folder or "
                "disk unmounted?): bring it back. --resume then goes on from the last checkpoint"
            )

    def _note_evaluation(self) -> None:
        period = self.cfg.TEST.EVAL_PERIOD
        if period > 0 and (self.iter + 1) % period == 0:
            self.evaluated = self.iter

    def _save_settled(self) -> None:
        """A checkpoint of the last whole step, if there has been one since the last checkpoint."""
        if self._trainer.moving:
            _logger.warning("The run ends within a step of the optimizer: its last checkpoint is that of before")
        elif self.start_iter <= self.settled != self.checkpointer.saved:
            self.iter, start = self.settled, time.perf_counter()
            try:
                self.checkpointer.save(f"model_{self.settled:07d}", iteration=self.settled)
            except CheckpointError as error:
                _logger.error("%s", error)
            else:
                seconds = time.perf_counter() - start
                _logger.info("Iteration %d was saved in %.1f s: --resume goes on from it", self.settled, seconds)

    def _stop_early(self) -> None:
        if any(isinstance(hook, KeepBest) and hook.stop for hook in self._hooks):
            self.checkpointer.save("model_final", iteration=self.iter)
            raise EarlyStop

    def test_average(self) -> dict[str, Any]:
        """Evaluate the averaged weights; results go under `ema`, files into OUTPUT_DIR/ema."""
        assert self.average is not None
        cfg = self.cfg.clone()
        cfg.defrost()
        cfg.OUTPUT_DIR = os.path.join(cfg.OUTPUT_DIR, "ema")
        return {"ema": self.test(cfg, self.average.model)}

    @classmethod
    def test(cls, cfg: CfgNode, model: nn.Module, evaluators: Any = None) -> Any:
        """Detectron2's evaluation on DATASETS.TEST, with test-time augmentation where TEST.AUG.ENABLED asks for it."""
        return super().test(cfg, augmented(cfg, model), evaluators)

    def train(self) -> Any:
        """All steps, fewer with SOLVER.EARLY_STOP, then DATASETS.FINAL_TEST with the best weights, see `best_model`.

        Raises:
            SystemExit: SIGTERM has come; after a checkpoint, with the status 143.
            UserError: OUTPUT_DIR cannot be written to any more, or a data worker or another process has ended.
        """
        self._outer = sys.exc_info()[1]
        try:
            with self._listener.listening():
                try:
                    with explained(self.cfg.OUTPUT_DIR):  # what comes between the parts below, as signals can
                        results = super().train()
                except EarlyStop:
                    results = getattr(self, "_last_eval_results", None)
                if self.cfg.DATASETS.FINAL_TEST:
                    with explained(self.cfg.OUTPUT_DIR):
                        self.test_final(self.cfg, self.best_model())
        except Interrupted:
            leave_with_main()
            raise SystemExit(STATUS) from None
        finally:
            self._end_loading()
            leave(self.cfg.OUTPUT_DIR)
        return results

    def _end_loading(self) -> None:
        self._trainer.end_loading()
        if isinstance(self.data_loader, TrainLoader):  # who trains on goes on in its order
            self.data_loader.images = self.images

    def best_model(self) -> nn.Module:
        """The detector with the weights in model_best.pth, averaged ones where SOLVER.BEST_METRIC judges those.

        Where nothing was judged in the training it is the last weights, or their average where there is one.
        """
        keepers = [hook for hook in self._hooks if isinstance(hook, KeepBest)]
        judged = comm.all_gather(any(hook.best_iter is not None for hook in keepers))[0]  # the main process knows
        path = os.path.join(self.cfg.OUTPUT_DIR, "model_best.pth")
        if judged and not all(comm.all_gather(os.path.isfile(path))):
            _logger.warning("Not all processes can read %s: the last weights are taken in its place", path)
            judged = False
        if not judged:
            return self.model if self.average is None else self.average.model
        model = copy.deepcopy(self.model.module if hasattr(self.model, "module") else self.model)
        averaged = self.cfg.SOLVER.BEST_METRIC.startswith("ema/")
        DETRCheckpointer(model, whole=True, averaged=averaged).load(path, checkpointables=[])
        return model

    @classmethod
    def test_final(cls, cfg: CfgNode, model: nn.Module) -> dict[str, Any]:
        """Evaluate on DATASETS.FINAL_TEST; files go into OUTPUT_DIR/test. Nothing happens where it is empty."""
        if not cfg.DATASETS.FINAL_TEST:
            return {}
        cfg = cfg.clone()
        cfg.defrost()
        cfg.DATASETS.TEST, cfg.OUTPUT_DIR = cfg.DATASETS.FINAL_TEST, os.path.join(cfg.OUTPUT_DIR, "test")
        _logger.info("The test split, once, at the end: %s", ", ".join(cfg.DATASETS.TEST))
        return dict(cls.test(cfg, model))

    def run_step(self) -> None:
        """One step of all processes."""
        with explained(self.cfg.OUTPUT_DIR):
            super().run_step()

    def resume_or_load(self, resume: bool = True) -> None:
        """Go on from the newest whole checkpoint in OUTPUT_DIR, else start from the weights in MODEL.WEIGHTS.

        Raises:
            ValueError: see `DETRCheckpointer.resume_or_load` and `load_state_dict`.
        """
        self.checkpointer.resume_or_load(self.cfg.MODEL.WEIGHTS, resume=resume)
        if self.checkpointer.resumed:
            self.start_iter = self.iter + 1  # the checkpoint has the iteration that was done
            remember_checkpoints(self._hooks, self.cfg.OUTPUT_DIR, self.start_iter)

    def state_dict(self) -> dict[str, Any]:
        """Everything but the weights that the next step depends on, and the settings of the run."""
        return {
            **super().state_dict(),
            "seed": self.seed,
            "pictures": self.images,
            "parameters": self._trained_names(),
            "recipe": recipe_of(self.cfg),
            "evaluated": self.evaluated,
            "records": state_of(getattr(self, "storage", None), self._hooks),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """The reverse of `state_dict`, but for the settings, which stay those of the configuration.

        A parameter that was not trained before starts with no history in the optimizer; one that is not trained any
        more loses its history.
        """
        state_dict = self._with_optimizer_by_name(state_dict)
        settings = [{k: v for k, v in g.items() if k != "params"} for g in self.optimizer.param_groups]
        rates = list(self.scheduler.base_lrs)
        super().load_state_dict(state_dict)
        if isinstance(self.scheduler, LRMultiplier):  # its rate follows from the settings and the iteration
            self.scheduler.base_lrs = rates
            for group, setting in zip(self.optimizer.param_groups, settings, strict=True):
                group.update(setting)
            for group, rate in zip(self.optimizer.param_groups, self.scheduler.get_lr(), strict=True):
                group["lr"] = rate
        self.images = state_dict.get("pictures", (self.iter + 1) * self.cfg.SOLVER.IMS_PER_BATCH)
        seed = state_dict.get("seed", self.seed)
        if seed != self.seed:
            _logger.info("The run goes on with the seed %d that it was started with, not %d", seed, self.seed)
        self.seed = self._trainer.seed = seed
        if isinstance(self.data_loader, TrainLoader):
            self.data_loader.seed, self.data_loader.images = seed, self.images
        self.evaluated, self._records = state_dict.get("evaluated", -1), state_dict.get("records", {})
        self._log_changes(state_dict.get("recipe", {}))

    def _with_optimizer_by_name(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        """`state_dict` with the optimizer's state in this run's order of parameters, which may be grouped otherwise."""
        names = self._trained_names()
        before = state_dict.get("parameters", names)
        if before == names:
            return state_dict
        old, new = ([name for group in groups for name in group] for groups in (before, names))
        _logger.warning(
            "%d parameters are trained from here on that were not, %d are not trained any more",
            len(set(new) - set(old)), len(set(old) - set(new)),
        )  # fmt: skip
        saved = state_dict["_trainer"]["optimizer"]["state"]
        number = {name: i for i, name in enumerate(old)}
        state = {i: saved[number[name]] for i, name in enumerate(new) if number.get(name) in saved}
        optimizer = {"state": state, "param_groups": self.optimizer.state_dict()["param_groups"]}
        return {**state_dict, "_trainer": {**state_dict["_trainer"], "optimizer": optimizer}}

    def _trained_names(self) -> list[list[str]]:
        """Names of the parameters of each of the optimizer's groups, whose order its state goes by."""
        model = self.model.module if hasattr(self.model, "module") else self.model
        names = {id(p): name for name, p in model.named_parameters()}
        return [[names[id(p)] for p in group["params"]] for group in self.optimizer.param_groups]

    def _log_changes(self, before: dict[str, Any]) -> None:
        recipe = recipe_of(self.cfg)
        for key in sorted(before.keys() & recipe.keys()):
            if before[key] != recipe[key]:
                _logger.warning("%s was %s in the checkpoint and is %s from here on", key, before[key], recipe[key])
        if not isinstance(self.scheduler, LRMultiplier):
            _logger.warning("The learning rate of %s goes on as in the checkpoint", type(self.scheduler).__name__)

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
        """Batches of the training set as the detectors are trained on it.

        A subclass may give any loader of Detectron2's kind, with a mapper of its own. Given a `TrainLoader`, runs stay
        as exact as they are: `TrainLoader(cfg, training_dicts(cfg), mapper)`.
        """
        return TrainLoader(cfg, training_dicts(cfg), DETRDatasetMapper(cfg, True))

    @classmethod
    def build_test_loader(cls, cfg: CfgNode, dataset_name: str) -> Any:
        """Images of a test set, TEST.IMS_PER_BATCH at a time."""
        return build_test_loader(cfg, dataset_name)

    @classmethod
    def build_evaluator(cls, cfg: CfgNode, dataset_name: str) -> DatasetEvaluator:
        """The COCO evaluator, writing to OUTPUT_DIR/inference; see `evaluation.evaluator.inference_folder`."""
        return build_evaluator(cfg, dataset_name)


def _registered(cfg: CfgNode) -> CfgNode:
    """A copy of a configuration whose own datasets are registered, those of a folder among them."""
    frozen = cfg.is_frozen()
    cfg = cfg.clone()
    cfg.defrost()
    register_datasets(cfg)
    if frozen:
        cfg.freeze()
    return cfg
