"""An exponential moving average of the weights beside those that are trained (SOLVER.EMA)."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn


class WeightAverage:
    """Keeps average = decay * average + (1 - decay) * weights, statistics of batch norms included.

    Args:
        model: the model that is trained, wrapped for several processes or not.
        decay: in [0, 1), the share of the average that a step leaves.

    Attributes:
        model: the averaged model, in evaluation mode, its parameters named as those of the trained one.

    Raises:
        ValueError: `decay` is out of range.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"SOLVER.EMA.DECAY is {decay}; it must be at least 0 and below 1")
        self.trained = model.module if isinstance(model, DistributedDataParallel) else model
        self.averaged = AveragedModel(self.trained, multi_avg_fn=get_ema_multi_avg_fn(decay), use_buffers=True)
        self.averaged.requires_grad_(False).eval()
        self.model: nn.Module = self.averaged.module

    def update(self) -> None:
        """Take the weights as they are now into the average; the first time they are the average."""
        self.averaged.update_parameters(self.trained)

    def state_dict(self) -> dict[str, Any]:
        """The averaged model's state, and of how many steps it is."""
        return {"model": self.model.state_dict(), "steps": int(self.averaged.n_averaged)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """The reverse of `state_dict`."""
        self.model.load_state_dict(state_dict["model"])
        self.averaged.n_averaged.fill_(state_dict["steps"])
