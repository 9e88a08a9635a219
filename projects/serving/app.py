"""Detection over HTTP: FastAPI around a `Predictor`, one in each worker process, requests put together in batches.

docs/serving.md says how to start it, and what its variables of the environment mean.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from typing import Any

import torch
from fastapi import FastAPI, HTTPException, Request

from detr_family.inference import Prediction, Predictor
from detr_family.inference.exported import is_exported

Answer = dict[str, Any]


def predictor_of_environment() -> Predictor:
    """The predictor that DETR_CONFIG and DETR_WEIGHTS name.

    Raises:
        FileNotFoundError, ValueError: see `Predictor.from_config`; or neither names a detector.
    """
    config, weights = os.environ.get("DETR_CONFIG", ""), os.environ.get("DETR_WEIGHTS") or None
    batch_size = _number("DETR_BATCH", 8)
    if weights is not None and is_exported(weights):
        return Predictor.from_exported(weights, batch_size=batch_size, threads=_number("DETR_THREADS", 1))
    if not config:
        raise ValueError("DETR_CONFIG is not set: the config.yaml of a training, or an exported file in DETR_WEIGHTS")
    return Predictor.from_config(config, weights, batch_size=batch_size)


class Full(Exception):
    """As many requests wait as may."""


class Batches:
    """Images of requests that wait at the same time go through the detector together, in a thread of its own.

    Args:
        predictor: its batch size is the most of one forward; images of different sizes go one after the other.
        waiting: the most that wait.
    """

    def __init__(self, predictor: Predictor, waiting: int) -> None:
        self.predictor = predictor
        self.queue: asyncio.Queue[tuple[bytes, asyncio.Future[Prediction]]] = asyncio.Queue(waiting)
        # One thread alone uses the model: what computes in parallel is torch, below it.
        self.thread = ThreadPoolExecutor(1, thread_name_prefix="detector")

    async def detect(self, content: bytes) -> Prediction:
        """What is found in the bytes of an image file.

        Raises:
            Full: too many wait.
            ValueError: the bytes are no image.
        """
        found: asyncio.Future[Prediction] = asyncio.get_running_loop().create_future()
        try:
            self.queue.put_nowait((content, found))
        except asyncio.QueueFull:
            raise Full from None
        return await found

    async def run(self) -> None:
        """Serve requests, without end."""
        loop = asyncio.get_running_loop()
        while True:
            taken = [await self.queue.get()]
            while len(taken) < self.predictor.batch_size and not self.queue.empty():
                taken.append(self.queue.get_nowait())
            try:
                results = await loop.run_in_executor(self.thread, self._predict, [content for content, _ in taken])
            except Exception as error:  # a fault of ours: those who wait are told, and the next ones served
                results = [error] * len(taken)
            for (_, found), result in zip(taken, results, strict=True):
                if found.done():  # whoever asked has gone
                    continue
                if isinstance(result, Exception):
                    found.set_exception(result)
                else:
                    found.set_result(result)

    def _predict(self, contents: Sequence[bytes]) -> list[Prediction | Exception]:
        results: dict[int, Prediction | Exception] = {}
        sources = [bytearray(content) for content in contents]  # no two are the same object, whatever they hold

        def failed(source: object, error: ValueError) -> None:
            results[id(source)] = error

        for prediction in self.predictor.stream(sources, on_error=failed):
            results[id(prediction.source)] = prediction
        return [results[id(source)] for source in sources]


def create_app(load: Callable[[], Predictor] = predictor_of_environment) -> FastAPI:
    """The application.

    Args:
        load: makes the predictor. It is called in each worker process when that starts, never before a fork.
    """

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        torch.set_num_threads(_number("DETR_THREADS", 1))
        app.state.batches = Batches(load(), _number("DETR_WAITING", 64))
        task = asyncio.create_task(app.state.batches.run())
        yield
        task.cancel()
        app.state.batches.thread.shutdown()

    app = FastAPI(title="Detection", lifespan=lifespan)

    @app.get("/health")
    async def health() -> Answer:
        """Which process answers, and what its detector can find."""
        return {"process": os.getpid(), "classes": app.state.batches.predictor.class_names}

    @app.post("/detect")
    async def detect(request: Request, threshold: float = 0.5) -> Answer:
        """Boxes (x1, y1, x2, y2 in pixels) in the image file that is the request's body, best first."""
        content = await _body(request, _number("DETR_MAX_BYTES", 20_000_000))
        try:
            prediction = await app.state.batches.detect(content)
        except Full:
            raise HTTPException(503, "too many requests wait: try again", {"Retry-After": "1"}) from None
        except ValueError as error:
            raise HTTPException(422, str(error)) from error
        instances = prediction.instances[prediction.instances.scores >= threshold]
        names = app.state.batches.predictor.names(instances)
        rows = zip(names, instances.scores.tolist(), instances.pred_boxes.tensor.tolist(), strict=True)
        height, width = prediction.image.shape[:2]
        found = [{"class": name, "score": score, "box": box} for name, score, box in rows]
        return {"process": os.getpid(), "width": width, "height": height, "detections": found}

    return app


async def _body(request: Request, most: int) -> bytes:
    content = bytearray()
    async for part in request.stream():
        content += part
        if len(content) > most:
            raise HTTPException(413, f"the image has more than {most} bytes (DETR_MAX_BYTES)")
    return bytes(content)


def _number(name: str, default: int) -> int:
    text = os.environ.get(name, str(default))
    if not text.isdigit() or int(text) < 1:
        raise ValueError(f"{name} is {text!r}; a whole number from 1 on is needed")
    return int(text)


app = create_app()
