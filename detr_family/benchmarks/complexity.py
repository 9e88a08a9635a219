"""Parameters and GFLOPs beside the published ones: python -m detr_family.benchmarks.complexity [files or names]

Counted by fvcore on a forward pass of the detector (backbone to boxes, as the papers count), one multiply-add as one
FLOP. Added to what fvcore knows: scaled dot-product attention. Deformable attention is traced on its pure-torch path,
whose sampling and weighting fvcore knows.

Images have the size that the published figure is of, see `detr_family.model_zoo.published`, or that of --size.

Without any: all that come with the package and whose figures are published. A project's are counted with --import.
"""

from __future__ import annotations

import argparse
import logging
import math
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from detectron2.modeling import build_model
from detectron2.structures import ImageList
from fvcore.nn import FlopCountAnalysis
from fvcore.nn.jit_handles import get_shape
from torch import Tensor, nn

from detr_family.config import config_names, load_config
from detr_family.config.projects import add_import
from detr_family.model_zoo.published import MEAN_IMAGE, PUBLISHED, figures_of
from detr_family.modeling.set_detector import SetDetector


class Predict(nn.Module):
    """A detector's forward pass of one image, as a function of tensors alone.

    Args:
        detector: in evaluation mode.
    """

    def __init__(self, detector: SetDetector) -> None:
        super().__init__()
        self.detector = detector

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """(1, 3, H, W), normalised -> logits and boxes."""
        prediction = self.detector.predict(ImageList(image, [tuple(image.shape[-2:])]))
        return prediction.logits, prediction.boxes


def attention_flops(inputs: Sequence[Any], outputs: Sequence[Any]) -> int:
    """Multiply-adds of scaled dot-product attention, (B, M, Q, E), (B, M, S, E), (B, M, S, D) -> (B, M, Q, D)."""
    query, key, value = (get_shape(x) for x in inputs[:3])
    return math.prod(query[:-1]) * key[-2] * (query[-1] + value[-1])


def count_gflops(detector: SetDetector, height: int, width: int) -> float:
    """Billions of multiply-adds of a forward pass of one image.

    Args:
        detector: of which evaluation is counted.
        height: of the image as the detector sees it, pixels.
        width: the same.
    """
    training = detector.training
    image = torch.zeros(1, len(detector.pixel_mean), height, width, device=detector.device)
    analysis = FlopCountAnalysis(Predict(detector.eval()), image)
    analysis.set_op_handle("aten::scaled_dot_product_attention", attention_flops)
    analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False).tracer_warnings("none")
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        total = analysis.total()
    detector.train(training)
    return total / 1e9


def count_params(detector: nn.Module) -> float:
    """Millions of parameters, frozen ones included; the constants of frozen batch norms are none."""
    return sum(p.numel() for p in detector.parameters()) / 1e6


def difference(ours: float, theirs: float | None) -> str:
    """In percent, with a sign; empty where nothing is published."""
    return "" if theirs is None else f"{100 * (ours / theirs - 1):+.1f}"


def row(config_file: Path, size: tuple[int, int] | None) -> str:
    """One line of the table.

    Args:
        config_file: its name is looked up among the published.
        size: height and width of the image, pixels; None: what the published figure is of.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        opts = ["MODEL.DEVICE", "cpu", "MODEL.DETR.NUM_CLASSES", "80", "MODEL.TIMM.PRETRAINED", "False"]
        cfg = load_config(str(config_file), opts)
        detector = build_model(cfg)
    theirs = figures_of(str(config_file))
    height, width = size or (theirs.size if theirs else MEAN_IMAGE)
    params, gflops = count_params(detector), count_gflops(detector, height, width)
    cells = [f"{config_file.stem:32}", f"{params:7.2f}"]
    cells += [f"{theirs.params or '':>9}", f"{difference(params, theirs.params):>6}"] if theirs else [" " * 18]
    cells += [f"{height:>5}x{width:<5}", f"{gflops:7.1f}"]
    if theirs:
        cells += [f"{theirs.gflops or '':>9}", f"{difference(gflops, theirs.gflops):>6}", theirs.why]
    return " ".join(cells).rstrip()


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config_files", nargs="*", type=Path)
    parser.add_argument("--size", nargs=2, type=int, metavar=("HEIGHT", "WIDTH"))
    add_import(parser)
    args = parser.parse_args()
    logging.getLogger("fvcore").setLevel(logging.ERROR)
    known = config_names()
    files = args.config_files or [Path(name) for name in PUBLISHED if name in known]
    print("params in millions, GFLOPs in billions of multiply-adds, both beside the published ones")
    print(f"{'':32} {'params':>7} {'published':>9} {'%':>6} {'image':>9} {'GFLOPs':>9} {'published':>9} {'%':>6}")
    for path in files:
        print(row(path, tuple(args.size) if args.size else None), flush=True)


if __name__ == "__main__":
    main()
