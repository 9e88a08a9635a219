"""Seeing what happens in a run: predictions, curves and tables while it goes on, one page at its end.

Everything here is for the eyes of the user: none of it changes the training, and what fails is logged. What draws is
imported when something is drawn: matplotlib would make every start half a second longer.
"""

from __future__ import annotations

import logging
import os
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.detection_utils import annotations_to_instances
from detectron2.engine import HookBase
from detectron2.engine.hooks import PeriodicWriter
from detectron2.utils import comm
from PIL import Image
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from detr_family.engine.loggers import LoggerHook, RunLogger
from detr_family.inference.predictor import Predictor

_IMAGES = 4
_LONGEST_SIDE = 1200  # of what TensorBoard gets, pixels
_logger = logging.getLogger(__name__)


def watching_hooks(cfg: CfgNode, hooks: Sequence[HookBase]) -> list[HookBase]:
    """The hooks of a run with those that watch it in their places: drawings before the writers, the page
    after, and the end of loggers.

    Args:
        cfg: reads VIS_PERIOD, VIS_REPORT and what is to be seen.
        hooks: the others.
    """
    result = list(hooks)
    if not comm.is_main_process():
        return result
    if cfg.VIS_PERIOD > 0:
        places = [i for i, hook in enumerate(result) if isinstance(hook, PeriodicWriter)]
        result.insert(places[0] if places else len(result), PredictionDrawer(cfg))
    result.append(RunWriter(cfg))
    writers = [writer for hook in result if isinstance(hook, PeriodicWriter) for writer in hook._writers]
    if loggers := [writer for writer in writers if isinstance(writer, RunLogger)]:
        result.append(LoggerHook(loggers))
    return result


@contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Leaves every module's mode and all random states as they were."""
    modes = [(module, module.training) for module in model.modules()]
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])
        if cuda:
            torch.cuda.set_rng_state_all(cuda)


class PredictionDrawer(HookBase):
    """Draws predictions beside ground truth every VIS_PERIOD iterations.

    They go to OUTPUT_DIR/vis/predictions_0000499.png (all images, one below the other) and, image by image,
    to the writers that take images, TensorBoard's that is. The images are those of the first test set, else of
    the training set, spread evenly over those with objects.

    Args:
        cfg: a configuration whose datasets are registered.
    """

    def __init__(self, cfg: CfgNode) -> None:
        self.cfg = cfg
        self.period = cfg.VIS_PERIOD
        self.records: list[dict[str, Any]] | None = None
        self.class_names: list[str] = []

    def after_step(self) -> None:
        """Draw, if it is time to."""
        done = self.trainer.iter + 1
        if done % self.period and done != self.trainer.max_iter:
            return
        try:
            self._draw()
        except Exception:
            _logger.warning("Predictions could not be drawn; the training goes on", exc_info=True)

    def _draw(self) -> None:
        from detr_family.visualization.draw import draw_comparison

        if self.records is None:
            self._choose()
        if not self.records:
            return
        model = self.trainer.model
        model = model.module if isinstance(model, DistributedDataParallel) else model
        with untouched(model):
            predictor = Predictor(
                model,
                input_format=self.cfg.INPUT.FORMAT,
                min_size=self.cfg.INPUT.MIN_SIZE_TEST,
                max_size=self.cfg.INPUT.MAX_SIZE_TEST,
                resize_rounding=self.cfg.INPUT.RESIZE_ROUNDING,
            )
            predictions = list(predictor.stream([record["file_name"] for record in self.records]))
        truths = []
        for record in self.records:
            objects = [a for a in record.get("annotations", ()) if not a.get("iscrowd", 0)]
            truths.append(annotations_to_instances(objects, (record["height"], record["width"])))
        # Early in a training nothing scores 0.5: then as many as there are objects are drawn.
        scores = torch.cat([p.instances.scores for p in predictions]).sort(descending=True).values
        wanted = min(sum(map(len, truths)), len(scores))
        threshold = min(0.5, float(scores[wanted - 1])) if wanted else 0.5
        drawn = []
        for record, prediction, truth in zip(self.records, predictions, truths, strict=True):
            image = draw_comparison(prediction.image, prediction.instances, truth, self.class_names, threshold)
            image.thumbnail((_LONGEST_SIDE, _LONGEST_SIDE))
            drawn.append(image)
            pixels = np.asarray(image).transpose(2, 0, 1)
            self.trainer.storage.put_image(f"predictions/{os.path.basename(str(record['file_name']))}", pixels)
        sheet = Image.new("RGB", (max(p.width for p in drawn), sum(p.height for p in drawn)), "white")
        top = 0
        for image in drawn:
            sheet.paste(image, (0, top))
            top += image.height
        folder = Path(self.cfg.OUTPUT_DIR) / "vis"
        folder.mkdir(parents=True, exist_ok=True)
        sheet.save(folder / f"predictions_{self.trainer.iter:07d}.png")

    def _choose(self) -> None:
        self.records = []
        for name in (*self.cfg.DATASETS.TEST, *self.cfg.DATASETS.TRAIN):
            try:
                records = DatasetCatalog.get(name)
            except (ValueError, OSError) as error:
                _logger.warning("No predictions on %s are drawn: %s", name, error)
                continue
            shown = [r for r in records if any(not a.get("iscrowd", 0) for a in r.get("annotations", ()))] or records
            step = max(len(shown) // _IMAGES, 1)
            self.records = list(shown[::step])[:_IMAGES]
            self.class_names = list(MetadataCatalog.get(name).thing_classes)
            return


class RunWriter(HookBase):
    """Writes curves.png and metrics.csv every VIS_PERIOD iterations and at the end, and there report.html.

    Args:
        cfg: a configuration whose datasets are registered.
    """

    def __init__(self, cfg: CfgNode) -> None:
        self.cfg = cfg

    def after_step(self) -> None:
        """Write the curves, if it is time to."""
        if self.cfg.VIS_PERIOD > 0 and (self.trainer.iter + 1) % self.cfg.VIS_PERIOD == 0:
            self._curves()

    def after_train(self) -> None:
        """Write the curves and the page, also of a run that was stopped."""
        if not self.cfg.VIS_REPORT:
            return
        self._curves()
        try:
            from detr_family.visualization.report import write_report

            _logger.info("What there is to see of this run: %s", write_report(self.cfg.OUTPUT_DIR, self.cfg))
        except Exception:
            _logger.warning("The report of this run could not be written", exc_info=True)

    def _curves(self) -> None:
        folder = Path(self.cfg.OUTPUT_DIR)
        if not (folder / "metrics.json").is_file() or not (folder / "metrics.json").stat().st_size:
            return  # nothing was recorded yet
        try:
            from detr_family.visualization.curves import write_csv, write_curves
            from detr_family.visualization.draw import read_metrics

            metrics = read_metrics(str(folder / "metrics.json"))
            write_csv(metrics, str(folder / "metrics.csv"))
            write_curves(metrics, str(folder / "curves.png"))
        except Exception:
            _logger.warning("The curves of this run could not be written", exc_info=True)
