"""What denoising costs a training step of DN-DETR: python -m detr_family.benchmarks.denoising --config-file FILE

Steps (forward and backward) with and without denoising groups run in one process, in turn, and the table holds the
medians of the process's CPU time: ratios of one run mean something, absolute times little. Images are noise with
boxes anywhere. --crowded gives the peak of memory of a step whose first image has that many boxes.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

import torch
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances

from detr_family.benchmarks.measure import Run, peak_of, time_on_cpu
from detr_family.config import load_config
from detr_family.modeling.dn_detr import DNDETR
from detr_family.modeling.set_detector import SetDetector

NUM_CLASSES = 80


def images(count: int, boxes: int, size: Sequence[int]) -> list[dict[str, Any]]:
    """Images of noise, (height, width) pixels, with `boxes` boxes each."""
    height, width = size
    extent = torch.tensor([width, height], dtype=torch.float32)
    g = torch.Generator().manual_seed(0)
    result = []
    for _ in range(count):
        centre = (0.2 + 0.6 * torch.rand(boxes, 2, generator=g)) * extent
        half = (0.02 + 0.15 * torch.rand(boxes, 2, generator=g)) * extent
        truth = Instances((height, width))
        truth.gt_boxes = Boxes(torch.cat([centre - half, centre + half], 1))
        truth.gt_classes = torch.randint(NUM_CLASSES, (boxes,), generator=g)
        result.append({"image": torch.randint(256, (3, height, width), generator=g).byte(), "instances": truth})
    return result


def build(config_file: str, opts: Sequence[str], denoising: bool) -> DNDETR:
    """The configured detector in training mode on the CPU, with denoising or without; the same weights for both."""
    cfg = load_config(config_file, [*opts, "MODEL.DETR.NUM_CLASSES", str(NUM_CLASSES), "MODEL.DEVICE", "cpu"])
    if not denoising:
        cfg.MODEL.DN.GROUPS = 0
    torch.manual_seed(0)
    model = build_model(cfg)
    if not isinstance(model, DNDETR):
        raise ValueError(f"{config_file} makes a {type(model).__name__}; a configuration of DN-DETR is needed")
    return model.train()


def step_of(model: SetDetector, inputs: list[dict[str, Any]]) -> Run:
    """A forward and a backward."""

    def step() -> None:
        model.zero_grad()
        sum(model(inputs).values()).backward()

    return step


def crowded_peak(config_file: str, opts: Sequence[str], boxes: int, size: Sequence[int], denoising: bool) -> int:
    """Bytes at the peak of a step on two images, the first with `boxes` boxes; for a process of its own."""
    model = build(config_file, opts, denoising)
    step_of(model, images(1, 1, (64, 64)))()  # loads code, makes room for gradients
    return peak_of(step_of(model, [*images(1, boxes, size), *images(1, 1, size)]))


def main() -> None:
    """Parse the command line and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--config-file", required=True, help="of a DN-DETR")
    parser.add_argument("--pictures", dest="images", type=int, default=2)
    parser.add_argument("--boxes", type=int, default=7, help="in every image (7 is COCO's mean)")
    parser.add_argument("--size", type=int, nargs=2, default=(800, 1066), help="height and width in pixels")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--crowded", type=int, nargs="*", default=[], help="peak memory with that many boxes")
    parser.add_argument("opts", nargs="*", help="KEY VALUE pairs of the configuration")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)

    inputs = images(args.images, args.boxes, args.size)
    models = {name: build(args.config_file, args.opts, name == "with") for name in ("without", "with")}
    times = time_on_cpu({name: step_of(model, inputs) for name, model in models.items()}, args.repeats, wall=False)
    share = 1 - times["without"] / times["with"]
    targets = models["with"].targets(inputs)
    making = time_on_cpu({"groups": lambda: models["with"].make_groups(targets)}, 50, wall=False)["groups"]
    height, width = args.size
    print(f"{args.images} images of {height}x{width} with {args.boxes} boxes, {args.threads} thread(s)")
    print(f"a step without denoising {times['without']:.3f} s, with {times['with']:.3f} s: {share:.1%} is denoising")
    print(f"making the groups {making * 1e3:.2f} ms, {making / times['with']:.2%} of a step")
    for boxes in args.crowded:
        peaks = []
        for denoising in (False, True):
            code = (
                "from detr_family.benchmarks.denoising import crowded_peak; "
                f"print(crowded_peak({args.config_file!r}, {args.opts!r}, {boxes}, {tuple(args.size)!r}, {denoising}))"
            )
            result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
            peaks.append(int(result.stdout.split()[-1]) / 2**20)
        print(f"peak of a step with {boxes} boxes in an image: {peaks[0]:.0f} MiB without, {peaks[1]:.0f} MiB with")


if __name__ == "__main__":
    main()
