"""Batches of the training set, from any position of the training on."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetFromList, build_detection_train_loader
from detectron2.data.build import trivial_batch_collator
from detectron2.data.common import AspectRatioGroupedDataset
from detectron2.utils import comm
from torch.utils.data import DataLoader, Dataset, Sampler

from detr_family.config import images_per_forward
from detr_family.data.workers import outliving_sigterm
from detr_family.engine.randomness import IMAGE, ORDER, seeded

Mapper = Callable[[dict[str, Any]], dict[str, Any] | None]
_TRIES = 100  # of images, where the mapper leaves some out


class TrainLoader:
    """An endless series of batches that depends on the seed and the position, not on what was read before.

    Detectron2's sampler (DATALOADER.SAMPLER_TRAIN) orders the images; they are dealt out to processes batch by batch,
    so that one process with eight batches to accumulate sees what eight processes see. Aspect ratios are
    grouped by the sizes in the dataset, before an image is read. Every image is augmented with random numbers of
    its place in the order.

    Args:
        cfg: reads SOLVER.IMS_PER_BATCH, ACCUMULATION_STEPS and IMAGES_PER_FORWARD, DATALOADER and SEED.
        dataset: Detectron2's dicts.
        mapper: what makes a dict the model's input; None leaves an image out, as with Detectron2's, and another is
            taken.

    Attributes:
        seed: of the order and the augmentation; SEED, or 0 where that is negative, until it is set.
        images: how many images of the order all processes have had; where iterating starts. It is for
            whoever takes the batches to keep count.
    """

    def __init__(self, cfg: CfgNode, dataset: Sequence[dict[str, Any]], mapper: Mapper) -> None:
        self.cfg = cfg
        self.dataset = DatasetFromList(list(dataset), copy=False)
        self.mapper = mapper
        self.seed = max(cfg.SEED, 0)
        self.images = 0
        self.batch_size = images_per_forward(cfg, comm.get_world_size())
        self.sizes = None
        if cfg.DATALOADER.ASPECT_RATIO_GROUPING:
            self.sizes = [(x["width"], x["height"]) for x in dataset]

    def __iter__(self) -> Iterator[list[dict[str, Any]]]:
        order = _order(self.cfg, self.dataset, self.seed)
        return iter(
            DataLoader(
                _Augmented(self.dataset, self.mapper, self.seed),
                batch_sampler=_Batches(order, self.batch_size, self.images, self.sizes),
                num_workers=self.cfg.DATALOADER.NUM_WORKERS,
                collate_fn=trivial_batch_collator,
                worker_init_fn=outliving_sigterm(),
                generator=torch.Generator(),  # leaves the global one alone
            )
        )


class InParts:
    """The batches of any loader, each in several parts one after the other.

    Args:
        loader: gives lists of images.
        parts: how many a list is divided in.
    """

    def __init__(self, loader: Iterable[list[dict[str, Any]]], parts: int) -> None:
        self.loader = loader
        self.parts = parts

    def __iter__(self) -> Iterator[list[dict[str, Any]]]:
        for batch in self.loader:
            size, rest = divmod(len(batch), self.parts)
            if rest or not size:
                raise ValueError(
                    f"build_train_loader gave a batch of {len(batch)} images, which cannot be divided into "
                    f"{self.parts} parts of one size: give SOLVER.IMS_PER_BATCH images over all processes, or set "
                    "SOLVER.ACCUMULATION_STEPS to 1 and SOLVER.IMAGES_PER_FORWARD to 0"
                )
            yield from (batch[i : i + size] for i in range(0, len(batch), size))


def _order(cfg: CfgNode, dataset: Dataset[Any], seed: int) -> Callable[[], Iterator[int]]:
    """Detectron2's sampler as a function that gives the whole endless order, of all processes, from its start."""
    cfg = cfg.clone()
    cfg.defrost()
    cfg.SEED = seed
    with seeded(seed, ORDER):  # some samplers take cfg.SEED, the others draw theirs
        arguments = build_detection_train_loader.from_config(cfg, mapper=lambda x: x, dataset=dataset)
    sampler = arguments["sampler"]
    if not hasattr(sampler, "_infinite_indices"):
        raise ValueError(
            f"DATALOADER.SAMPLER_TRAIN {cfg.DATALOADER.SAMPLER_TRAIN} is no endless sampler of Detectron2's"
        )
    return sampler._infinite_indices


class _Batches(Sampler[list[tuple[int, int]]]):
    """This process's batches of (position in the order, index into the dataset).

    Args:
        order: gives the endless order of indices.
        batch_size: images in a batch of one process.
        start: images that all processes together have had before.
        sizes: width and height of each image, to put wide and tall ones in different batches; None mixes them.
    """

    def __init__(
        self,
        order: Callable[[], Iterator[int]],
        batch_size: int,
        start: int,
        sizes: Sequence[tuple[int, int]] | None,
    ) -> None:
        self.order = order
        self.batch_size = batch_size
        self.start = start
        self.sizes = sizes

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        places: Iterator[tuple[int, int]] = enumerate(self.order())
        if self.sizes is None:
            places = itertools.islice(places, self.start, None)
            batches = iter(lambda: list(itertools.islice(places, self.batch_size)), [])
        else:  # what waits in the groups follows from all before
            batches = itertools.islice(self._grouped(places), self.start // self.batch_size, None)
        return itertools.islice(batches, comm.get_rank(), None, comm.get_world_size())

    def _grouped(self, places: Iterator[tuple[int, int]]) -> Iterator[list[tuple[int, int]]]:
        assert self.sizes is not None
        items = (
            {"width": self.sizes[index][0], "height": self.sizes[index][1], "place": (position, index)}
            for position, index in places
        )
        for batch in AspectRatioGroupedDataset(items, self.batch_size):
            yield [item["place"] for item in batch]


class _Augmented(Dataset[dict[str, Any]]):
    """Maps a place to the augmented image there."""

    def __init__(self, dataset: Dataset[dict[str, Any]], mapper: Mapper, seed: int) -> None:
        self.dataset = dataset
        self.mapper = mapper
        self.seed = seed

    def __getitem__(self, place: tuple[int, int]) -> dict[str, Any]:
        position, index = place
        with seeded(self.seed, IMAGE, position):
            for _ in range(_TRIES):
                mapped = self.mapper(self.dataset[index])
                if mapped is not None:
                    return mapped
                index = random.randrange(len(self.dataset))  # type: ignore[arg-type]
        raise ValueError(
            f"the mapper, {getattr(self.mapper, '__name__', type(self.mapper).__name__)}, gave None for {_TRIES} "
            "images in a row: it must return Detectron2's dict, and None for the few images that are to be left out"
        )
