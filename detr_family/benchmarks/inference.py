"""Time of a whole detector as it is and prepared for a CPU: python -m detr_family.benchmarks.inference detr_r50 ...

All forms of a detector run in turn on one image of noise, so that what else the machine does meets them alike; the
weights are random.
"""

from __future__ import annotations

import argparse
import copy
import functools
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from detectron2.modeling import build_model

from detr_family.benchmarks.measure import Run, time_on_cpu
from detr_family.config import load_config
from detr_family.config.projects import add_import
from detr_family.inference import optimize


def forms_of(config: str) -> dict[str, Any]:
    """The detector of a configuration as it is, and prepared in float32 and bfloat16."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        cfg = load_config(config, ["MODEL.DEVICE", "cpu", "MODEL.WEIGHTS", "", "MODEL.DETR.NUM_CLASSES", "80"])
        torch.manual_seed(0)
        plain = build_model(cfg).eval()
    prepared = {p: optimize(copy.deepcopy(plain), precision=p) for p in ("float32", "bfloat16")}
    return {"as it is": plain, **{f"prepared, {p}": model for p, model in prepared.items()}}


def row(config: str, size: Sequence[int], repeats: int) -> str:
    """One line of the table: medians in seconds, and how many times as fast as the plain detector."""
    forms = forms_of(config)
    image = torch.randint(256, (3, *size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    inputs = [{"image": image, "height": size[0], "width": size[1]}]
    runs: dict[str, Run] = {name: functools.partial(model, inputs) for name, model in forms.items()}
    with torch.no_grad():
        medians = time_on_cpu(runs, repeats, wall=True)
    plain, *others = medians.values()
    cells = [f"{plain:9.3f}", *(f"{value:9.3f} {plain / value:5.2f}x" for value in others)]
    return f"{config:32} " + " ".join(cells)


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("configs", nargs="+", help="names or files of configurations")
    parser.add_argument("--size", nargs=2, type=int, default=(800, 1066), metavar=("HEIGHT", "WIDTH"))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    add_import(parser)
    args = parser.parse_args(arguments)
    torch.set_num_threads(args.threads)
    height, width = args.size
    print(f"seconds for one image of {height}x{width}, {args.threads} thread(s), medians of {args.repeats}")
    print(f"{'':32} {'as it is':>9} {'prepared':>16} {'bfloat16':>16}")
    for config in args.configs:
        print(row(config, args.size, args.repeats), flush=True)


if __name__ == "__main__":
    main()
