"""Parameters, GFLOPs and frames per second of configurations beside the published figures.

The comparison tables of all five papers in one. Weights are not needed: each detector is built as configured.
Parameters and GFLOPs (one multiply-add counts as one) are those of `detr_family.benchmarks.complexity`. Frames per
second are of one image of --size at a time, from pixels to boxes without reading files, on this machine's
MODEL.DEVICE: to be compared with each other, not with the published ones, which are an A100's.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from tqdm import tqdm

from detr_family.analysis import command_line, style
from detr_family.analysis.loading import load_cfg, load_detector, title_of
from detr_family.benchmarks.complexity import count_gflops, count_params
from detr_family.model_zoo.published import MEAN_IMAGE, figures_of
from detr_family.modeling.set_detector import SetDetector

COLUMNS = (
    *("config", "detector", "epochs", "AP", "AP50", "AP75", "APs", "APm", "APl"),
    *("params", "params_published", "gflops", "gflops_published", "fps", "fps_published", "device", "size"),
)
# Frames per second as DINO's paper gives them (its table 1): an A100, one image at a time.
PUBLISHED_FPS = {
    **{"detr_r50_dc5": 20, "deformable_detr_r50": 24, "dab_detr_r50_dc5": 17},
    **{"dino_r50_4scale": 24, "dino_r50_5scale": 10},
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """See the module."""
    parser.add_argument(
        "--config-file", dest="configs", action="append", required=True, metavar="FILE", help="may be repeated"
    )
    parser.add_argument(
        "--size",
        type=command_line.whole_numbers,
        metavar="H,W",
        help="pixels; by default what the published GFLOPs are of",
    )
    parser.add_argument("--repeats", type=int, default=5, help="images to time, after one to warm up; 0: no timing")
    command_line.add_output(parser)
    command_line.add_opts(parser)


def run(args: argparse.Namespace) -> list[Path]:
    """See the module."""
    if args.size and (len(args.size) != 2 or min(args.size) < 32):
        raise ValueError(f"--size {args.size}: two lengths in pixels of at least 32 are needed, as in 800,1111")
    size = (args.size[0], args.size[1]) if args.size else None
    rows = []
    for config in tqdm(args.configs, desc="configurations", disable=None):
        rows.append(measure(config, args.opts, size=size, repeats=args.repeats))
    headings = {
        **{"config": "configuration", "epochs": "epochs", "AP": "AP", "params": "params (M)", "size": "image"},
        **{"params_published": "published", "gflops": "GFLOPs", "gflops_published": "published"},
        **{"fps": "frames/s here", "fps_published": "published (A100)"},
    }
    print(style.table(rows, headings))
    return [
        *style.save_figure(draw(rows), args.output, "summary"),
        style.save_csv(rows, COLUMNS, args.output, "summary"),
    ]


def measure(config: str, opts: Sequence[str], *, size: tuple[int, int] | None, repeats: int) -> dict[str, Any]:
    """One row: see COLUMNS.

    Args:
        config: the configuration's file, whose name without ".yaml" finds the published row.
        opts: KEY VALUE pairs.
        size: (height, width) of the image, pixels; None: what the published GFLOPs are of.
        repeats: images to time; 0 leaves the speed out.
    """
    cfg = load_cfg(config, opts)
    model = load_detector(cfg, untrained=True)
    figures = figures_of(config)
    size = size or (figures.size if figures else MEAN_IMAGE)
    row: dict[str, Any] = {
        "config": Path(config).stem,
        "detector": title_of(model),
        "params": count_params(model),
        "gflops": count_gflops(model, *size),
        "fps_published": PUBLISHED_FPS.get(Path(config).stem) if figures else None,
        "fps": frames_per_second(model, size, repeats) if repeats > 0 else None,
        "device": _device(model),
        "size": f"{size[0]}x{size[1]}",
    }
    if figures is not None:
        row |= dict(zip(COLUMNS[3:9], figures.ap, strict=False))
        row |= {"epochs": figures.epochs, "params_published": figures.params, "gflops_published": figures.gflops}
    return row


def _device(model: SetDetector) -> str:
    return torch.cuda.get_device_name(model.device) if model.device.type == "cuda" else model.device.type


@torch.no_grad()
def frames_per_second(model: SetDetector, size: tuple[int, int], repeats: int) -> float:
    """1 / the median time of an image of noise from pixels to boxes, one at a time, by the clock."""
    g = torch.Generator().manual_seed(0)
    inputs = [{"image": torch.randint(256, (len(model.pixel_mean), *size), generator=g).to(torch.uint8)}]
    seconds = []
    for _ in range(repeats + 1):
        _wait_for(model.device)
        start = time.perf_counter()
        model(inputs)
        _wait_for(model.device)
        seconds.append(time.perf_counter() - start)
    return 1 / statistics.median(seconds[1:])


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def draw(rows: Sequence[dict[str, Any]]) -> Figure:
    """Published AP against GFLOPs, a point for each configuration, one colour and marker for each detector."""
    figure = style.new_figure(7.4, 5.2)
    axes = style.tidy(figure.subplots())
    known = [row for row in rows if row.get("AP") is not None and row.get("gflops_published") is not None]
    if not known:
        style.say_empty(axes, "none of these configurations has published figures:\nthe table has what was measured")
        return figure
    kinds = list(dict.fromkeys((row["detector"], row["epochs"]) for row in known))
    for number, kind in enumerate(kinds):
        chosen = [row for row in known if (row["detector"], row["epochs"]) == kind]
        axes.scatter(
            [row["gflops_published"] for row in chosen],
            [row["AP"] for row in chosen],
            color=style.COLOURS[number % len(style.COLOURS)],
            marker=style.MARKERS[number % len(style.MARKERS)],
            label=kind[0] if kind[1] is None else f"{kind[0]}, {kind[1]} epochs",
        )
    axes.set_xscale("log")
    axes.set_xticks([50, 100, 200, 400, 800], ["50", "100", "200", "400", "800"])
    axes.minorticks_off()
    axes.margins(x=0.25)
    axes.set_xlabel("GFLOPs, as published (logarithmic)")
    axes.set_ylabel("box AP on COCO val2017, as published (%)")
    axes.set_title("What the papers published")
    axes.legend(frameon=False)
    figure.canvas.draw()  # fixes the scales that labels are placed by
    _label(axes, [(row["config"].split("detr_")[-1], row["gflops_published"], row["AP"]) for row in known])
    return figure


def _label(axes: Axes, points: Sequence[tuple[str, float, float]]) -> None:
    """Names beside points, each at the first of eight places where it covers no point and no other name."""
    scale = axes.figure.dpi / 72  # pixels of a typographic point
    pixels = axes.transData.transform([(x, y) for _, x, y in points])
    taken = [(px - 4 * scale, py - 4 * scale, px + 4 * scale, py + 4 * scale) for px, py in pixels]
    for (name, x, y), (px, py) in zip(points, pixels, strict=True):
        width, height = 3.6 * scale * len(name), 7 * scale
        places = [(dx if dx > 0 else dx - width / scale, dy) for dy in (-3, 4, -10, 11) for dx in (6, -6)]
        boxes = [(px + dx * scale, py + dy * scale) for dx, dy in places]
        overlaps = [
            sum(
                max(min(left + width, t[2]) - max(left, t[0]), 0) * max(min(low + height, t[3]) - max(low, t[1]), 0)
                for t in taken
            )
            for left, low in boxes
        ]
        best = overlaps.index(min(overlaps))
        left, low = boxes[best]
        taken.append((left, low, left + width, low + height))
        axes.annotate(name, (x, y), places[best], textcoords="offset points", fontsize=6.5)
