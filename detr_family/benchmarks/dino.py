"""What the native operator gives a whole detector: python -m detr_family.benchmarks.dino --config-file FILE

Inference and a training step (forward and backward) of a detector with deformable attention on one image, with the
native operator and on the pure-torch path, in one process and in turn; the table holds medians. The share of time in
deformable attention is that of the operator alone, run on the very inputs that it has inside of the detector.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any
from unittest import mock

import torch
from detectron2.modeling import build_model
from torch import Tensor

from detr_family.benchmarks.denoising import NUM_CLASSES, images, step_of
from detr_family.benchmarks.measure import Run, time_on_cpu
from detr_family.config import load_config
from detr_family.config.options import OptionsParser
from detr_family.layers import deformable_attention
from detr_family.layers.deformable_attention import pure_torch_path
from detr_family.modeling.set_detector import SetDetector

PATHS: dict[str, Callable[[], AbstractContextManager[None]]] = {"native": nullcontext, "torch": pure_torch_path}


@contextmanager
def operator_calls() -> Iterator[list[tuple[Any, ...]]]:
    """The arguments of every call of the operator inside, detached."""
    calls: list[tuple[Any, ...]] = []
    operator = deformable_attention._fused

    def noted(*args: Any) -> Tensor:
        calls.append(tuple(x.detach() if isinstance(x, Tensor) else x for x in args))
        return operator(*args)

    with mock.patch.object(deformable_attention, "_fused", noted):
        yield calls


def replay(calls: list[tuple[Any, ...]], *, train: bool) -> Run:
    """All calls of the operator again, with their backward in training."""

    def run() -> None:
        for args in calls:
            value, shapes, starts, reference, offsets, logits, deterministic = args
            if train:
                value, offsets, logits = (x.requires_grad_() for x in (value, offsets, logits))
            out = deformable_attention._fused(value, shapes, starts, reference, offsets, logits, deterministic)
            if train:
                torch.autograd.grad(out, (value, offsets, logits), torch.ones_like(out))

    return run


def inference_of(model: SetDetector, inputs: list[dict[str, Any]]) -> Run:
    """A forward in evaluation mode."""

    def run() -> None:
        with torch.no_grad():
            model(inputs)

    return run


def on_path(run: Run, path: str, autocast: bool) -> Run:
    """The same on one of PATHS, under autocast to bfloat16 or not."""

    def there() -> None:
        with PATHS[path](), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            run()

    return there


def main() -> None:
    """Parse the command line and print the table."""
    parser = OptionsParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--config-file", required=True, help="of a detector with deformable attention")
    parser.add_argument("--size", type=int, nargs=2, default=(800, 1333), help="height and width in pixels")
    parser.add_argument("--boxes", type=int, default=7, help="in the image of a training step (7 is COCO's mean)")
    parser.add_argument("--only", choices=("inference", "training"), help="one line of the table alone")
    parser.add_argument("--autocast", action="store_true", help="to bfloat16, as training with SOLVER.AMP does")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--wall", action="store_true", help="wall-clock time in place of the process's CPU time")
    parser.add_argument("opts", nargs=argparse.REMAINDER, help="KEY VALUE pairs of the configuration")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)

    opts = [*args.opts, "MODEL.DETR.NUM_CLASSES", str(NUM_CLASSES), "MODEL.DEVICE", "cpu", "MODEL.WEIGHTS", ""]
    torch.manual_seed(0)
    model = build_model(load_config(args.config_file, opts))
    inputs = images(1, args.boxes, args.size)
    height, width = args.size
    clock = "wall-clock" if args.wall else "CPU"
    dtype = "autocast to bfloat16" if args.autocast else "float32"
    numbers = f"{clock} seconds on {args.threads} thread(s), medians of {args.repeats}"
    print(f"one image of {height}x{width}, {dtype}, {numbers}")
    print(f"{'':12}{'native':>10}{'torch':>10}{'ratio':>8}   share of deformable attention")
    for name in (args.only,) if args.only else ("inference", "training"):
        train = name == "training"
        model.train(train)
        run = step_of(model, inputs) if train else inference_of(model, inputs)
        with operator_calls() as calls:
            on_path(run, "native", args.autocast)()
        if not calls:
            raise ValueError(f"{args.config_file} makes a {type(model).__name__}, which has no deformable attention")
        parts = {"whole": run, "op": replay(calls, train=train)}
        runs = {f"{part} {path}": on_path(each, path, args.autocast) for path in PATHS for part, each in parts.items()}
        times = time_on_cpu(runs, args.repeats, wall=args.wall)
        native, torch_ = times["whole native"], times["whole torch"]
        shares = ", ".join(f"{path} {times[f'op {path}'] / times[f'whole {path}']:.0%}" for path in PATHS)
        print(f"{name:12}{native:10.2f}{torch_:10.2f}{torch_ / native:8.2f}   {shares}")


if __name__ == "__main__":
    main()
