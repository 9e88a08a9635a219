"""Predictions of any number of images: one process's share of them, streamed to its journal.

Data workers read and resize ahead by a bounded number of images. Images of one size after resizing share a batch, also
where they do not follow each other: nothing is padded, and the results are those of one by one.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from detectron2.data import DatasetFromList
from detectron2.structures import Instances
from torch.utils.data import DataLoader, Dataset, IterableDataset
from tqdm import tqdm

from detr_family.data.images import read_image
from detr_family.errors import UserError
from detr_family.inference import journal
from detr_family.inference.predictor import Predictor, resized
from detr_family.inference.work import ImageItem, Work

_AHEAD = 4  # images that each worker is ahead by
_WAITING = 8  # batches' worth of images that may wait for others of their size
_TO_DISK = 10.0  # seconds


class _Read(NamedTuple):
    """An image that was read, or could not be.

    Attributes:
        line: what the journal calls it by.
        pixels: (C, h, w) uint8 as the model takes it, or for tiles (H, W, 3); None where it could not be read.
        size: height and width of the image.
        error: why it could not be read.
    """

    line: dict[str, Any]
    pixels: np.ndarray | None
    size: tuple[int, int]
    error: str


class _Prepare:
    """What a worker does with an image that it has read: RGB (H, W, 3) to what the model takes; sent to workers."""

    def __init__(self, predictor: Predictor) -> None:
        self.resize, self.input_format = predictor.resize, predictor.input_format
        self.whole = bool(predictor.tile)

    def __call__(self, line: dict[str, Any], load: Callable[[], np.ndarray]) -> _Read:
        try:
            image = load()
            pixels = image if self.whole else resized(image, self.resize, self.input_format)
        except (ValueError, OSError, MemoryError) as error:
            return _Read(line, None, (0, 0), str(error) or type(error).__name__)
        return _Read(line, pixels, image.shape[:2], "")


class _Images(Dataset[_Read]):
    def __init__(self, items: Sequence[ImageItem], prepare: _Prepare) -> None:
        # One block of bytes, which workers share as long as they only read it.
        self.items = DatasetFromList([tuple(item) for item in items], copy=False, serialize=True)
        self.prepare = prepare

    def __getitem__(self, index: int) -> _Read:
        item = ImageItem(*self.items[index])
        line: dict[str, Any] = {"file_name": item.name}
        if item.image_id is not None:
            line["image_id"] = item.image_id
        return self.prepare(line, lambda: read_image(item.path, "RGB"))

    def __len__(self) -> int:
        return len(self.items)


class _Frames(IterableDataset[_Read]):
    """The frames of a video that are one process's share; the others are passed over without being turned to pixels."""

    def __init__(self, path: str, part: int, parts: int, known: set[str | int], prepare: _Prepare) -> None:
        self.path, self.part, self.parts, self.prepare = path, part, parts, prepare
        own = (key for key in known if isinstance(key, str) and key.startswith(f"{path}#"))
        numbers = (int(key.rpartition("#")[2]) for key in own)
        self.known = {number for number in numbers if number % parts == part}

    def __iter__(self) -> Iterator[_Read]:
        import cv2

        capture = cv2.VideoCapture(self.path)
        try:
            expected, count = frames_of(capture), 0
            while capture.grab():
                count += 1
                if count % self.parts == self.part and count not in self.known:
                    there, frame = capture.retrieve()
                    line = {"file_name": self.path, "frame": count}
                    if there:
                        yield self.prepare(line, lambda frame=frame: frame[:, :, ::-1])  # type: ignore[misc]
        finally:
            capture.release()
        reason = ""
        if not count:
            reason = f"The video {self.path} cannot be read: OpenCV finds no frame in it."
        elif expected is not None and count < 0.9 * expected:
            reason = f"The video {self.path} is damaged: {count} of {expected} frames could be read."
        if reason and self.part == 0:
            yield _Read({"file_name": self.path}, None, (0, 0), reason)


def frames_of(capture: Any) -> int | None:
    """How many frames a video says that it has; None where it does not say."""
    import cv2

    return max(int(capture.get(cv2.CAP_PROP_FRAME_COUNT)), 0) or None


def _as_it_is(item: Any) -> Any:
    """Arrays stay arrays: they come from the workers through a pipe, and need none of a container's shared memory."""
    return item


def _loader(dataset: Any, sampler: Sequence[int] | None, workers: int) -> DataLoader[_Read]:
    ahead = _AHEAD if workers else None
    return DataLoader(dataset, None, sampler=sampler, num_workers=workers, collate_fn=_as_it_is, prefetch_factor=ahead)


def by_size(items: Iterable[_Read], batch_size: int) -> Iterator[list[_Read]]:
    """Batches of images of one size; few wait for others, and of those the longest first."""
    groups: dict[tuple[int, ...], list[_Read]] = {}
    waiting = 0
    for item in items:
        assert item.pixels is not None
        shape = item.pixels.shape
        groups.setdefault(shape, []).append(item)
        waiting += 1
        if len(groups[shape]) == batch_size:
            batch = groups.pop(shape)
        elif waiting >= _WAITING * batch_size:
            batch = groups.pop(next(iter(groups)))
        else:
            continue
        waiting -= len(batch)
        yield batch
    yield from groups.values()


def predict_many(
    predictor: Predictor,
    work: Work,
    folder: Path,
    *,
    category_ids: Sequence[int],
    threshold: float,
    part: int = 0,
    parts: int = 1,
    workers: int = 2,
    progress: bool = True,
    start: Callable[[], None] = lambda: None,
) -> None:
    """Predicts a process's share of some work, but for what the folder has results of, into its journal.

    Args:
        predictor: its batch_size is that of the images.
        work: all of it; this process has every `parts`-th image and frame.
        folder: of results, see `detr_family.inference.journal`, on which `journal.begin` was called.
        category_ids: by class number.
        threshold: least score of what is written.
        part, parts: number of this process, from 0, and of all.
        workers: data workers; 0 reads the images in this process.
        progress: show a bar with rate and the time that is left.
        start: called once it is known what is to be done, before anything is written.

    Raises:
        UserError: another process writes this part.
    """
    known = journal.done(folder)
    own = np.arange(part, len(work.images), parts)
    left = [i for i in own.tolist() if _key(work.images[i]) not in known]
    start()
    writer = journal.Journal(folder, part)
    prepare = _Prepare(predictor)
    count = f"process {part} of {parts}: " if parts > 1 else ""
    show = {"disable": not progress, "file": sys.stderr, "mininterval": 0.5 if sys.stderr.isatty() else 30.0}
    try:
        with tqdm(total=len(own), initial=len(own) - len(left), desc=f"{count}images", unit="", **show) as bar:
            if left:
                reads = _loader(_Images(work.images, prepare), left, workers)
                _write(predictor, reads, writer, category_ids, threshold, bar)
        for video in work.videos:
            frames = _Frames(video, part, parts, known, prepare)
            title = f"{count}{Path(video).name}"
            with tqdm(total=_length(video, parts), initial=len(frames.known), desc=title, **show) as bar:
                _write(predictor, _loader(frames, None, min(workers, 1)), writer, category_ids, threshold, bar)
    finally:
        writer.close()


def _key(item: ImageItem) -> str | int:
    return item.name if item.image_id is None else item.image_id


def _length(video: str, parts: int) -> int | None:
    import cv2

    capture = cv2.VideoCapture(video)
    count = frames_of(capture)
    capture.release()
    return None if count is None else -(-count // parts)


def _write(
    predictor: Predictor,
    reads: Iterable[_Read],
    writer: journal.Journal,
    category_ids: Sequence[int],
    threshold: float,
    bar: Any,
) -> None:
    def readable() -> Iterator[_Read]:
        for read in reads:
            if read.pixels is not None:
                yield read
            else:
                writer.write({**read.line, "error": read.error})
                bar.update()

    last = time.monotonic()
    for batch in by_size(readable(), predictor.batch_size):
        for read, found in _found(predictor, batch):
            if isinstance(found, str):
                writer.write({**read.line, "error": found})
            else:
                writer.write({**read.line, **line_of(found, category_ids, threshold)})
            bar.update()
        now = time.monotonic()
        writer.flush(to_disk=now - last > _TO_DISK)
        last = now if now - last > _TO_DISK else last


def _found(predictor: Predictor, batch: Sequence[_Read]) -> Iterator[tuple[_Read, Instances | str]]:
    """What is found in each image, or why it could not be looked at, as one that is too small for an exported file."""
    pixels: Any = [read.pixels for read in batch]
    try:
        if predictor.tile:
            found = predictor.detect(pixels)
        else:
            found = predictor.find(list(zip(pixels, (read.size for read in batch), strict=True)))
    except (UserError, ValueError) as error:
        if len(batch) == 1:
            yield batch[0], f"{batch[0].line['file_name']}: {error}"
            return
        for read in batch:
            yield from _found(predictor, [read])
        return
    yield from zip(batch, found, strict=True)


def line_of(instances: Instances, category_ids: Sequence[int], threshold: float) -> dict[str, Any]:
    """What the journal says of an image: boxes to a thousandth of a pixel, scores to a millionth."""
    height, width = instances.image_size
    boxes = instances.pred_boxes.tensor.clone()
    boxes[:, 2:] -= boxes[:, :2]
    scores, numbers = instances.scores.tolist(), instances.pred_classes.tolist()
    detections = [
        {"category_id": category_ids[number], "bbox": [round(x, 3) for x in box], "score": round(score, 6)}
        for box, score, number in zip(boxes.tolist(), scores, numbers, strict=True)
        if score >= threshold
    ]
    best = round(max(scores, default=0.0), 6)
    return {"width": width, "height": height, "best": best, "detections": detections}
