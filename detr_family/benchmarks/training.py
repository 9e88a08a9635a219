"""Where a training step's time goes on the CPU, and what fused parts save: python -m detr_family.benchmarks.training

python -m detr_family.benchmarks.training detr_r50 dino_r50_4scale --size 480 640

For each configuration steps as they are and steps of the plain layers (`detr_family.layers.fused` says what differs)
run in one process, in turn, with the same weights and images of noise; of each part the table holds the median of the
process's CPU time. Losses are compared without dropout, for which the two draw other random numbers. Ratios of one run
mean something, absolute times little.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from torch import nn
from torch.optim import Optimizer

from detr_family.benchmarks.denoising import images
from detr_family.config import load_config
from detr_family.config.projects import add_import
from detr_family.engine.memory import keep_freed_memory
from detr_family.engine.optimizer import build_optimizer
from detr_family.layers.fused import plain_layers
from detr_family.modeling.set_detector import SetDetector

PARTS = ("forward", "losses", "backward", "optimizer")
NUM_CLASSES = 80


def timed_step(
    model: SetDetector, optimizer: Optimizer, inputs: list[dict[str, Any]], clip_norm: float | None, clock: Any
) -> tuple[dict[str, float], float]:
    """Seconds of each of PARTS of a step, and its total loss.

    Args:
        model: in training mode.
        optimizer: of its parameters.
        inputs: a batch.
        clip_norm: the largest norm of the gradient; None leaves it alone.
        clock: gives seconds.
    """
    torch.manual_seed(0)
    moments = [clock()]
    optimizer.zero_grad()
    batch = model.preprocess_image(inputs)
    targets = model.targets(inputs)
    prediction = model.predict(batch, targets)
    moments.append(clock())
    total = sum(model.losses(prediction, targets).values())
    assert isinstance(total, torch.Tensor)
    moments.append(clock())
    total.backward()
    moments.append(clock())
    if clip_norm is not None:
        nn.utils.clip_grad_norm_(model.parameters(), clip_norm)
    optimizer.step()
    moments.append(clock())
    seconds = {part: moments[i + 1] - moments[i] for i, part in enumerate(PARTS)}
    return seconds, float(total.detach())


def built(config: str, opts: Sequence[str]) -> tuple[CfgNode, SetDetector]:
    """The configured detector in training mode on the CPU, with random weights."""
    own = ["MODEL.DEVICE", "cpu", "MODEL.WEIGHTS", "", "MODEL.DETR.NUM_CLASSES", str(NUM_CLASSES)]
    cfg = load_config(config, [*own, *opts])
    torch.manual_seed(0)
    model = build_model(cfg)
    assert isinstance(model, SetDetector)
    return cfg, model.train()


@contextmanager
def without_dropout(model: nn.Module) -> Iterator[None]:
    """For the time being no part of a model drops anything."""
    found = [
        (module, name, module.__dict__[name])
        for module in model.modules()
        for name in ("p", "dropout", "drop_prob")
        if isinstance(module.__dict__.get(name), float)
    ]
    for module, name, _ in found:
        setattr(module, name, 0.0)
    try:
        yield
    finally:
        for module, name, probability in found:
            setattr(module, name, probability)


def measure(
    cfg: CfgNode, model: SetDetector, inputs: list[dict[str, Any]], repeats: int, wall: bool
) -> tuple[dict[str, dict[str, float]], float]:
    """Median seconds of each part, as it is and of plain layers, and how far the losses are apart without dropout.

    Weights stay as they are: the optimizer's learning rates and weight decay are zero.
    """
    optimizer = build_optimizer(cfg, model)
    for group in optimizer.param_groups:
        group["lr"] = group["weight_decay"] = 0.0
    clip = cfg.SOLVER.CLIP_GRADIENTS
    clip_norm = clip.CLIP_VALUE if clip.ENABLED else None
    clock = time.perf_counter if wall else time.process_time
    ways: dict[str, Callable[[], Any]] = {"plain": plain_layers, "fused": nullcontext}
    seconds: dict[str, list[dict[str, float]]] = {name: [] for name in ways}
    losses = {}
    for name, way in ways.items():
        with way(), without_dropout(model):
            losses[name] = timed_step(model, optimizer, inputs, clip_norm, clock)[1]
    for round_number in range(repeats + 1):
        for name, way in ways.items():
            with way():
                parts, _ = timed_step(model, optimizer, inputs, clip_norm, clock)
            if round_number:  # the first round warms up
                seconds[name].append({**parts, "step": sum(parts.values())})
    medians = {
        name: {part: statistics.median(each[part] for each in values) for part in (*PARTS, "step")}
        for name, values in seconds.items()
    }
    return medians, abs(losses["fused"] / losses["plain"] - 1)


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("configs", nargs="+", help="names or files of configurations")
    parser.add_argument("--size", nargs=2, type=int, default=(480, 640), metavar=("HEIGHT", "WIDTH"))
    parser.add_argument("--batch", type=int, default=1, help="images of a step")
    parser.add_argument("--boxes", type=int, default=7, help="in every image (7 is COCO's mean)")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--wall", action="store_true", help="the clock's time in place of the process's CPU time")
    parser.add_argument("--opts", nargs="+", default=[], help="KEY VALUE pairs of the configurations")
    add_import(parser)
    args = parser.parse_args(arguments)
    torch.set_num_threads(args.threads)
    keep_freed_memory()  # as a Trainer does
    inputs = images(args.batch, args.boxes, args.size)
    print(
        f"{args.batch} image(s) of {args.size[0]}x{args.size[1]} a step, {args.boxes} boxes each, {args.threads} "
        f"thread(s), medians of {args.repeats}{'' if args.wall else ' of CPU time'}; seconds"
    )
    print(f"{'':28} {'':6}" + "".join(f"{part:>10}" for part in (*PARTS, "step")) + f"{'times':>8}")
    for config in args.configs:
        cfg, model = built(config, args.opts)
        medians, apart = measure(cfg, model, inputs, args.repeats, args.wall)
        for name, parts in medians.items():
            row = "".join(f"{seconds:10.3f}" for seconds in parts.values())
            print(f"{config:28} {name:6}{row}{medians['plain']['step'] / parts['step']:7.2f}x", flush=True)
        print(f"{'':28} losses differ by {apart:.1g} of their size", flush=True)


if __name__ == "__main__":
    main()
