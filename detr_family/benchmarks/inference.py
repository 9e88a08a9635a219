"""Time of a whole detector in every form it can be run in: python -m detr_family.benchmarks.inference detr_r50 ...

All forms of a detector run in turn, in one process, on the same images of noise, so that what else the machine does
meets them alike; medians are shown. The weights are random, and the same in all forms:

- `eager`: as it is built; `prepared`, `bfloat16`: by `detr_family.inference.optimize`; `compiled`: `model.compile()`;
- `torch_export`, `aoti`, `torchscript`, `onnx`, `openvino`: the files of `detr_family.export`, in their runtimes;
- `transformers`, `transformers_onnx`: its port of the detector (DETR, Conditional DETR, DAB-DETR, Deformable DETR) with
  these weights, as it is, and exported for this size to onnxruntime. Its choice of detections is not part of the time.

What is not installed, or does not exist for a detector, is named and left out.
"""

from __future__ import annotations

import argparse
import copy
import functools
import importlib.metadata
import importlib.util
import platform
import tempfile
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from torch import Tensor, nn

from detr_family.benchmarks.measure import Run, time_on_cpu
from detr_family.checkpoint.to_transformers import write_for_transformers
from detr_family.config import load_config
from detr_family.config.projects import add_import
from detr_family.errors import UserError, require
from detr_family.export.exporting import SUFFIX, export_model
from detr_family.inference import optimize
from detr_family.inference.exported import ExportedDetector

Model = Callable[[list[dict[str, Any]]], object]
_RUNTIMES = ("torch", "onnxruntime", "openvino", "transformers")


@dataclass
class Case:
    """A detector to measure.

    Attributes:
        cfg: its configuration.
        model: as it was built, in evaluation mode, on the CPU.
        size: height and width of the images.
        batch: images that are measured with.
        threads: of every runtime.
        folder: for the files.
    """

    cfg: CfgNode
    model: Any
    size: tuple[int, int]
    batch: int
    threads: int
    folder: Path


def _eager(case: Case) -> Model:
    return case.model


def _prepared(case: Case, precision: str) -> Model:
    return optimize(copy.deepcopy(case.model), precision=precision)


def _compiled(case: Case) -> Model:
    model = copy.deepcopy(case.model)
    model.compile()
    return model


def _exported(case: Case, format: str) -> Model:
    path = case.folder / f"{format}{SUFFIX[format]}"
    export_model(case.model, format, path, size=case.size, batch=case.batch, check=False)
    return ExportedDetector(path, threads=case.threads)


class _Ported(nn.Module):
    """transformers' port, from pixels (B, 3, H, W) uint8 as floats on."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        names = [f"class {i}" for i in range(case.model.num_classes)]
        write_for_transformers(str(case.folder / "transformers"), case.cfg, case.model, names)
        transformers = require("transformers", "parity")
        self.port = transformers.AutoModelForObjectDetection.from_pretrained(str(case.folder / "transformers")).eval()
        self.mean = torch.tensor(case.cfg.MODEL.PIXEL_MEAN).view(-1, 1, 1)
        self.std = torch.tensor(case.cfg.MODEL.PIXEL_STD).view(-1, 1, 1)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        mask = torch.ones(images.shape[0], *images.shape[2:], dtype=torch.int64)
        found = self.port(pixel_values=(images - self.mean) / self.std, pixel_mask=mask)
        return found.logits, found.pred_boxes


def _stacked(batch: list[dict[str, Any]]) -> Tensor:
    return torch.stack([x["image"] for x in batch]).float()


def _transformers(case: Case) -> Model:
    port = _Ported(case)
    return lambda batch: port(_stacked(batch))


def _transformers_onnx(case: Case) -> Model:
    require("onnxscript", "onnx")
    onnxruntime = require("onnxruntime", "onnx")
    path = case.folder / "transformers.onnx"
    example = torch.zeros(case.batch, 3, *case.size)
    torch.onnx.export(_Ported(case), (example,), path, dynamo=True, input_names=["images"], verbose=False)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = case.threads
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return lambda batch: session.run(None, {"images": _stacked(batch).numpy()})


FORMS: dict[str, Callable[[Case], Model]] = {
    "eager": _eager,
    "prepared": functools.partial(_prepared, precision="float32"),
    "bfloat16": functools.partial(_prepared, precision="bfloat16"),
    "compiled": _compiled,
    **{format: functools.partial(_exported, format=format) for format in SUFFIX},
    "transformers": _transformers,
    "transformers_onnx": _transformers_onnx,
}


def built(config: str, size: tuple[int, int], batch: int, threads: int, folder: Path) -> Case:
    """The detector of a configuration, with random weights."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        cfg = load_config(config, ["MODEL.DEVICE", "cpu", "MODEL.WEIGHTS", "", "MODEL.DETR.NUM_CLASSES", "80"])
        torch.manual_seed(0)
        return Case(cfg, build_model(cfg).eval(), size, batch, threads, folder)


def forms_of(case: Case, names: Sequence[str]) -> tuple[dict[str, Model], dict[str, str]]:
    """A detector in the named forms, and why those that are missing are."""
    models: dict[str, Model] = {}
    missing: dict[str, str] = {}
    for name in names:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                models[name] = FORMS[name](case)
        except (UserError, ValueError) as error:
            missing[name] = str(error)
        except Exception as error:  # whatever a compiler or another project's exporter raises: the others are measured
            missing[name] = f"{type(error).__name__}: {str(error).strip().splitlines()[0][:200] if str(error) else ''}"
    return models, missing


def measure(case: Case, models: dict[str, Model], repeats: int, cpu_time: bool = False) -> dict[str, float]:
    """Median seconds of a pass of each form over the same images, in turn; on request the process's CPU time."""
    generator = torch.Generator().manual_seed(0)
    height, width = case.size
    batch = [
        {"image": torch.randint(256, (3, height, width), dtype=torch.uint8, generator=generator)}
        for _ in range(case.batch)
    ]
    runs: dict[str, Run] = {name: functools.partial(model, batch) for name, model in models.items()}
    with torch.no_grad():
        return time_on_cpu(runs, repeats, wall=not cpu_time)


def report(config: str, case: Case, names: Sequence[str], repeats: int, cpu_time: bool) -> list[str]:
    """The lines of one detector: seconds of a pass, images a second, and how many times as fast as the first form."""
    models, missing = forms_of(case, names)
    times = measure(case, models, repeats, cpu_time)
    first = next(iter(times.values()), 0.0)
    lines = [
        f"{config:28} {name:18} {seconds:9.3f} {case.batch / seconds:9.2f} {first / seconds:8.2f}x"
        for name, seconds in times.items()
    ]
    return lines + [f"{config:28} {name:18} left out: {reason}" for name, reason in missing.items()]


def versions() -> str:
    """The runtimes that are installed."""
    there = [name for name in _RUNTIMES if importlib.util.find_spec(name)]
    absent = [name for name in _RUNTIMES if name not in there]
    found = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in there)
    return found + (f"; not installed: {', '.join(absent)}" if absent else "")


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("configs", nargs="+", help="names or files of configurations")
    parser.add_argument("--forms", nargs="+", choices=list(FORMS), default=list(FORMS), metavar="FORM", help="of these")
    parser.add_argument("--size", nargs=2, type=int, default=(800, 1066), metavar=("HEIGHT", "WIDTH"))
    parser.add_argument("--batch", type=int, default=1, help="images of a pass: 1 for latency, more for throughput")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument(
        "--cpu-time", action="store_true", help="of the process, in place of the clock's: for a machine that is shared"
    )
    add_import(parser)
    args = parser.parse_args(arguments)
    torch.set_num_threads(args.threads)
    height, width = args.size
    print(
        f"{args.batch} image(s) of {height}x{width} a pass, {args.threads} thread(s), medians of {args.repeats}"
        f"{' of CPU time' if args.cpu_time else ''},"
    )
    print(f"float32 but for bfloat16; {platform.machine()}, {versions()}")
    print(f"{'':28} {'':18} {'seconds':>9} {'images/s':>9} {'times':>9}")
    for config in args.configs:
        with tempfile.TemporaryDirectory() as folder:
            case = built(config, (height, width), args.batch, args.threads, Path(folder))
            for line in report(config, case, args.forms, args.repeats, args.cpu_time):
                print(line, flush=True)


if __name__ == "__main__":
    main()
