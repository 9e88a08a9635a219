"""One training step: accumulated gradients, mixed precision, clipping of the whole gradient, and a loss of NaN."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterable
from contextlib import AbstractContextManager, ExitStack, suppress
from typing import Any

import torch
from detectron2.engine import SimpleTrainer
from detectron2.utils import comm
from detectron2.utils.events import get_event_storage
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from detr_family.engine.memory import keep_freed_memory
from detr_family.engine.randomness import STEP, seed_all
from detr_family.errors import UserError
from detr_family.modeling.criterion import mean_over_ranks, part_of_batch

PRECISIONS = {"float16": torch.float16, "bfloat16": torch.bfloat16}


class NotFiniteError(UserError, FloatingPointError):
    """A loss or gradient that is not finite; the message says which, on what images, and what to set."""


_SAVED_BATCHES = 10  # of steps that were skipped: a run may skip thousands, and disks fill


class TrainStep(SimpleTrainer):
    """Detectron2's `SimpleTrainer` with a step of our own.

    It differs from Detectron2's in six ways: it accumulates the gradients of a batch that comes in parts, works with
    and without mixed precision, clips the norm of the whole gradient, averages the losses over processes by one
    reduction of numbers in place of gathering pickled dicts, looks at loss and gradient norm before the weights move,
    and draws random numbers that depend on the seed, the iteration and the part alone.

    Args:
        model: returns a dict of losses; wrapped for several processes or not.
        data_loader: yields lists of Detectron2's dicts.
        optimizer: steps the model's parameters.
        clip_norm: the largest L2 norm of the whole gradient; None does not clip.
        amp: run the model under autocast; with float16 the loss is scaled.
        precision: what autocast computes in: "float16" or "bfloat16".
        accumulation: how many of the loader's batches make one step. The losses are those of one batch of all.
        seed: of the random numbers drawn in the step; None leaves the generators alone.
        nonfinite: "stop" raises, "skip" leaves out the step.
        output_dir: where the batch of a loss that is not finite is saved.

    Raises:
        ValueError: `nonfinite` or `precision` is none of these.
    """

    def __init__(
        self,
        model: nn.Module,
        data_loader: Iterable[list[dict[str, Any]]],
        optimizer: Optimizer,
        *,
        clip_norm: float | None,
        amp: bool,
        precision: str = "float16",
        accumulation: int = 1,
        seed: int | None = None,
        nonfinite: str,
        output_dir: str,
    ) -> None:
        super().__init__(model, data_loader, optimizer)
        if precision not in PRECISIONS:
            raise ValueError(f"SOLVER.AMP.PRECISION is {precision!r}; it may be {' or '.join(map(repr, PRECISIONS))}")
        if nonfinite not in ("stop", "skip"):
            raise ValueError(f"SOLVER.NONFINITE is {nonfinite!r}; it may be 'stop' or 'skip'")
        self.device = next(model.parameters()).device
        if self.device.type == "cpu":
            keep_freed_memory()
        self.clip_norm = clip_norm
        self.amp = amp
        self.precision = PRECISIONS[precision]
        self.accumulation = accumulation
        self.seed = seed
        self.nonfinite = nonfinite
        self.output_dir = output_dir
        self.skipped = 0
        self.moving = False  # from where the weights begin to change until the trainer says that all has followed
        # Only float16's range needs a scaled loss; otherwise the scaler passes everything through.
        self.scaled = amp and precision == "float16"
        self.grad_scaler = torch.amp.GradScaler(self.device.type, enabled=self.scaled)

    def run_step(self) -> None:
        """Take a batch, in its parts, backpropagate, look at the result, step.

        Raises:
            NotFiniteError: a loss or the gradient norm is not finite and `nonfinite` is "stop". The
                weights are those from before the step; the batch is saved.
        """
        if not self.model.training:
            raise ValueError(
                "the model is in evaluation mode, as a hook must have left it that looks at predictions: "
                "call model.train() after model.eval()"
            )
        start = time.perf_counter()
        parts = [self._next() for _ in range(self.accumulation)]
        data_time = time.perf_counter() - start

        self.optimizer.zero_grad()
        values: dict[str, Tensor] = {}
        for i in range(self.accumulation):
            with self._part(i, parts):
                with torch.autocast(self.device.type, dtype=self.precision, enabled=self.amp):
                    losses = self.model(parts[i])
                losses = {"loss": losses} if isinstance(losses, Tensor) else losses  # of a model of one's own
                total = sum(losses.values()) / self.accumulation
                self.grad_scaler.scale(total).backward()
            for name, loss in losses.items():
                share = loss.detach() / self.accumulation
                values[name] = values[name] + share if name in values else share
        if hasattr(self, "after_backward"):  # not in Detectron2 0.6
            self.after_backward()

        batch = [x for part in parts for x in part]
        if self.clip_norm is not None:
            self.grad_scaler.unscale_(self.optimizer)
            parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
            norm = nn.utils.clip_grad_norm_(parameters, self.clip_norm)
            if not self.scaled:  # under float16 an infinite gradient is the scaler's business
                values["gradient norm"] = norm
        # Under float16 the scaler itself leaves out a step whose gradient is not finite, and learns from it.
        if self._finite(values, batch, data_time) or self.scaled:
            self.moving = True
            self.grad_scaler.step(self.optimizer)
            self.grad_scaler.update()

    def _next(self) -> list[dict[str, Any]]:
        try:
            return next(self._data_loader_iter)
        except StopIteration:
            raise ValueError(
                f"the training loader, {type(self.data_loader).__name__}, ended before iteration {self.iter}: what "
                "build_train_loader gives must be endless, as Detectron2's build_detection_train_loader is"
            ) from None

    def _part(self, i: int, parts: list[list[dict[str, Any]]]) -> AbstractContextManager[Any]:
        """What the `i`-th part of the batch is computed in: its random numbers, and what it has with the others."""
        stack = ExitStack()
        if self.seed is not None:
            seed_all(self.seed, STEP, self.iter, i * comm.get_world_size() + comm.get_rank())
        if len(parts) > 1:
            counts = [len(x.get("instances", ())) for part in parts for x in part]  # the model tells of one without
            stack.enter_context(part_of_batch(counts, len(parts)))
        if isinstance(self.model, DistributedDataParallel) and i < len(parts) - 1:
            stack.enter_context(self.model.no_sync())  # gradients travel once, with the last part
        return stack

    def _finite(self, values: dict[str, Tensor], batch: list[dict[str, Any]], data_time: float) -> bool:
        """Log this step's numbers, averaged over processes; stop or say False where one is not finite.

        A number that is not finite on one rank makes the mean so on all: every rank decides alike.
        """
        means_tensor = mean_over_ranks(torch.stack(list(values.values())))
        means = dict(zip(values, means_tensor.tolist(), strict=True))  # waits for the device, as the matcher does
        bad = next((name for name, x in means.items() if not abs(x) < float("inf")), None)
        if bad is None:
            storage = get_event_storage()
            storage.put_scalar("data_time", data_time)
            norm = means.pop("gradient norm", None)
            if norm is not None:
                storage.put_scalar("grad_norm", norm)
            storage.put_scalar("total_loss", sum(means.values()))
            storage.put_scalars(**means)
            return True

        message = self._report(bad, means[bad], values, batch)
        if self.nonfinite == "stop":
            raise NotFiniteError(
                f"{message}. The weights are those from before this step; with SOLVER.NONFINITE skip the run goes on"
            )
        self.skipped += 1
        logging.getLogger(__name__).error("%s. Step skipped, the %d. of this run", message, self.skipped)
        return False

    def _report(self, bad: str, value: float, values: dict[str, Tensor], batch: list[dict[str, Any]]) -> str:
        """Save this rank's batch, unless so many are, and say in one line what is known."""
        images = [str(x.get("file_name", "?")) for x in batch]
        saved = f"the batches of the first {_SAVED_BATCHES} such steps are saved"
        if self.skipped < _SAVED_BATCHES:
            saved = f"this batch is saved in {self._save(values, batch)}"
        rates = sorted({group["lr"] for group in self.optimizer.param_groups}, reverse=True)
        return (
            f"{bad} is {value} at iteration {self.iter}, learning rate {' and '.join(f'{x:g}' for x in rates)}, "
            f"on the images {', '.join(images)}; {saved}"
        )

    def _save(self, values: dict[str, Tensor], batch: list[dict[str, Any]]) -> str:
        path = os.path.join(self.output_dir, f"nonfinite_iter{self.iter}_rank{comm.get_rank()}.pth")
        os.makedirs(self.output_dir, exist_ok=True)
        plain = [{k: v for k, v in x.items() if k != "instances"} for x in batch]
        for x, saved in zip(batch, plain, strict=True):
            saved["gt_boxes"] = x["instances"].gt_boxes.tensor
            saved["gt_classes"] = x["instances"].gt_classes
        torch.save({"batch": plain, "values": {k: float(v) for k, v in values.items()}}, path)
        return path

    def end_loading(self) -> None:
        """End the data workers; what is read afterwards starts the loader anew."""
        iterator: Any = getattr(self, "_data_loader_iter_obj", None)
        self._data_loader_iter_obj: Any = None
        if hasattr(iterator, "_shutdown_workers"):  # at once, also where an error's traceback holds it
            with suppress(RuntimeError):  # of a worker that was killed
                iterator._shutdown_workers()

    def state_dict(self) -> dict[str, Any]:
        """Optimizer and gradient scaler, beside the iteration."""
        return {**super().state_dict(), "grad_scaler": self.grad_scaler.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """The reverse of `state_dict`."""
        super().load_state_dict(state_dict)
        if state_dict.get("grad_scaler"):
            self.grad_scaler.load_state_dict(state_dict["grad_scaler"])
