"""How stable bipartite matching is from epoch to epoch (DN-DETR, arXiv 2203.01305, section 3.2)."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.engine import HookBase
from detectron2.utils import comm
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from detr_family.data.dataset_mapper import DETRDatasetMapper
from detr_family.modeling.set_detector import SetDetector


class MatchingInstability(HookBase):
    """Records IS at the end of every epoch, as `matching_instability` in the metrics.

    Each image has a vector V: V_n = m where the last decoder layer's query n is matched to box m, -1 where it is
    matched to none. IS is the number of n for which V_n differs from the epoch before, averaged over always the same
    images, which are shown without augmentation to the model in evaluation mode. The first epoch has none.

    Args:
        dicts: the images, in Detectron2's dataset format with annotations.
        mapper: makes the model's input of each, with `instances`.
        period: iterations in an epoch.
        batch_size: images shown at once.

    Raises:
        ValueError: no image.
    """

    def __init__(
        self,
        dicts: Sequence[dict[str, Any]],
        mapper: Callable[[dict[str, Any]], dict[str, Any]],
        *,
        period: int,
        batch_size: int,
    ) -> None:
        if not dicts:
            raise ValueError("matching instability needs at least one image (TEST.INSTABILITY_IMAGES)")
        self.dicts = dicts
        self.mapper = mapper
        self.period = period
        self.batch_size = batch_size
        self.previous: list[Tensor] | None = None

    def after_step(self) -> None:
        """Record at the end of an epoch."""
        if (self.trainer.iter + 1) % self.period == 0:
            value = self.measure(self.trainer.model)
            if value is not None:
                self.trainer.storage.put_scalar("matching_instability", value, smoothing_hint=False)
                logging.getLogger(__name__).info("Matching instability IS %.2f of %d images", value, len(self.dicts))

    def measure(self, model: nn.Module) -> float | None:
        """IS between the last call and this one; None at the first.

        Every process shows its share of the images; all of them have to call.
        """
        now = matchings(model, self.share(), self.mapper, self.batch_size)
        before, self.previous = self.previous, now
        if before is None:
            return None
        changed = sum(int((a != b).sum()) for a, b in zip(before, now, strict=True))
        return sum(comm.all_gather(changed)) / len(self.dicts)

    def share(self) -> Sequence[dict[str, Any]]:
        """This process's images."""
        return self.dicts[comm.get_rank() :: comm.get_world_size()]

    def state_dict(self) -> dict[str, Any]:
        """The last epoch's matchings, so that a resumed run goes on where it was."""
        return {} if self.previous is None else {"previous": self.previous}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The reverse of `state_dict`; matchings of other images than now are forgotten."""
        previous = state.get("previous")
        if previous is not None and len(previous) == len(self.share()):
            self.previous = previous


@torch.no_grad()
def matchings(
    model: nn.Module,
    dicts: Sequence[dict[str, Any]],
    mapper: Callable[[dict[str, Any]], dict[str, Any]],
    batch_size: int,
) -> list[Tensor]:
    """V of every image: (Q,) int64, the box that each query of the last layer is matched to, -1 for none."""
    detector = model.module if isinstance(model, DistributedDataParallel) else model
    assert isinstance(detector, SetDetector)
    was_training = detector.training
    detector.eval()
    result = []
    try:
        for start in range(0, len(dicts), batch_size):
            inputs = [mapper(x) for x in dicts[start : start + batch_size]]
            targets = detector.targets(inputs)
            prediction = detector.predict(detector.preprocess_image(inputs)).layers(-1)
            pairs = detector.matcher(prediction, targets)
            query, target = pairs.query[0].cpu(), pairs.target[0].cpu()
            image = targets.image.cpu()[target]
            first = np.cumsum([0, *targets.counts])
            for i in range(len(inputs)):
                matched = torch.full((prediction.logits.shape[1],), -1)
                matched[query[image == i]] = target[image == i] - int(first[i])
                result.append(matched)
    finally:
        detector.train(was_training)
    return result


def build_instability_hook(
    cfg: CfgNode, dataset: Sequence[dict[str, Any]], images_per_process: int
) -> MatchingInstability | None:
    """The hook for TEST.INSTABILITY_IMAGES images of a training set, evenly spaced; None where that is 0.

    Args:
        cfg: whose schedule is in iterations.
        dataset: the training images.
        images_per_process: images shown at once.
    """
    count = min(cfg.TEST.INSTABILITY_IMAGES, len(dataset))
    if count <= 0:
        return None
    plain = cfg.clone()
    plain.defrost()
    plain.INPUT.MIN_SIZE_TRAIN, plain.INPUT.MAX_SIZE_TRAIN = (cfg.INPUT.MIN_SIZE_TEST,), cfg.INPUT.MAX_SIZE_TEST
    plain.INPUT.CROP.ENABLED, plain.INPUT.RANDOM_FLIP = False, "none"
    chosen = [dataset[int(i)] for i in np.linspace(0, len(dataset) - 1, count)]
    return MatchingInstability(
        chosen,
        DETRDatasetMapper(plain, True),
        period=max(len(dataset) // cfg.SOLVER.IMS_PER_BATCH, 1),
        batch_size=images_per_process,
    )
