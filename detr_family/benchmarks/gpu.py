"""One measurement on a GPU, each in a process of its own: python -m detr_family.benchmarks.gpu STEP

    probe      what the device and the operator's library are, as JSON
    smoke      the operator's forward and backward in every type, a few numbers each
    kernels    one call of each of four kernels, for a profiler
    model      one detector: inference and a training step, times, memory and waits for the device

Every table is printed line by line as it comes, so that what a time limit cuts off is the rest alone.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from detectron2.modeling import build_model

from detr_family.benchmarks.deformable_attention import Inputs, contestants, make_inputs, prepare
from detr_family.benchmarks.denoising import NUM_CLASSES, images, step_of
from detr_family.benchmarks.dino import inference_of
from detr_family.benchmarks.measure import Run
from detr_family.config import load_config
from detr_family.layers import deformable_attention_ops as ops
from detr_family.layers.deformable_attention import ms_deform_attn
from detr_family.layers.deformable_attention_torch import ms_deform_attn_torch

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
DETECTORS = ["detr_r50", "conditional_detr_r50", "dab_detr_r50", "dn_detr_r50", "dino_r50_4scale"]


def say(*parts: object) -> None:
    """Prints a line that is there at once."""
    print(*parts, flush=True)


def probe(device: torch.device) -> dict[str, Any]:
    """What decides whether a library has to be carried or built."""
    on_cuda = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(0) if on_cuda else "a CPU",
        "capability": "{}.{}".format(*torch.cuda.get_device_capability(0)) if on_cuda else "",
        "torch": torch.__version__,
        "cuda": torch.version.cuda or "",
        "missing": ops.missing_reason(device.type, device.index or 0, torch.float32),
        "library": ops.library_file(device.type) or "",
    }


def smoke(device: torch.device) -> bool:
    """Forward and backward of each kernel that there is on small inputs, compared with float64 on the CPU."""
    reason = ops.missing_reason(device.type, device.index or 0, torch.float32)
    if reason:
        say(f"the operator has no kernel here: {reason}")
        return False
    shapes, starts = [(9, 11), (5, 6)], [0, 99]
    fine = True
    tolerances = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 1e-2, torch.float64: 1e-9}
    for dtype, tolerance in tolerances.items():
        for channels in (32, 12):
            generator = torch.Generator().manual_seed(0)
            wide = torch.float64 if dtype == torch.float64 else torch.float32
            value = torch.randn(2, 129, 4, channels, generator=generator).to(dtype)
            locations = torch.rand(2, 129, 4, 2, 4, 2, generator=generator).to(wide)
            weights = torch.randn(2, 129, 4, 2, 4, generator=generator).to(wide)
            exact = [item.double().requires_grad_() for item in (value, locations, weights)]
            expected = ms_deform_attn_torch(exact[0], shapes, exact[1], exact[2])
            wanted = [expected.detach(), torch.autograd.grad(expected.sum(), exact[0])[0]]
            kinds: list[tuple[str, bool, list[str]]] = [("", False, []), (", deterministic", True, [])]
            if device.type == "cuda" and channels == 32 and dtype != torch.float64:
                kinds.append((", variants", False, list(ops.VARIANTS)))
            for kind, deterministic, variants in kinds:
                leaf = value.to(device).requires_grad_()
                with ops.cuda_variants(*variants):
                    output = ms_deform_attn(
                        leaf, shapes, starts, locations.to(device), weights.to(device), deterministic=deterministic
                    )
                    found = [output.detach(), torch.autograd.grad(output.sum(), leaf)[0]]
                pairs = zip(found, wanted, strict=True)
                errors = [float((x.double().cpu() - y).abs().max() / y.abs().max()) for x, y in pairs]
                good = all(error <= tolerance for error in errors)
                fine &= good
                title = f"{dtype} D={channels}{kind}"
                say(f"{title:36} output {errors[0]:.1e}  grad_value {errors[1]:.1e}  {'ok' if good else 'WRONG'}")
    return fine


def kernels(device: torch.device, small: bool) -> None:
    """The fused forward and backward in float32 and bfloat16, once each, at the encoder's size or the decoder's."""
    for dtype in (torch.float32, torch.bfloat16):
        inputs: Inputs = make_inputs("decoder" if small else "encoder", 1, dtype, str(device))
        forward, raw = contestants(inputs)["detr_family fused"]
        prepare(forward, raw, inputs, backward=True)()
    synchronize(device)
    say("four kernels ran")


def synchronize(device: torch.device) -> None:
    """Waits for all that was launched."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def seconds_of(run: Run, device: torch.device, repeats: int) -> float:
    """Median seconds of a call, from the host's clock around a wait for the device, after two calls that warm up."""
    times = []
    for number in range(repeats + 2):
        synchronize(device)
        begin = time.perf_counter()
        run()
        synchronize(device)
        if number >= 2:
            times.append(time.perf_counter() - begin)
    return statistics.median(times)


def waits_of(run: Run, device: torch.device) -> int:
    """How often a call makes the host wait for the device."""
    if device.type != "cuda":
        return 0
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            run()
        return sum("synchronizing" in str(warning.message) for warning in caught)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def under_autocast(run: Run, device: torch.device, autocast: bool) -> Run:
    """The same with autocast to bfloat16, or without."""

    def there() -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
            run()

    return there


def peak_memory(run: Run, device: torch.device) -> float:
    """GiB that the allocator held at the peak of a call, weights included; 0 where nobody counts."""
    if device.type != "cuda":
        return 0.0
    torch.cuda.reset_peak_memory_stats()
    run()
    synchronize(device)
    return torch.cuda.max_memory_allocated() / 2**30


def model(name: str, device: torch.device, args: argparse.Namespace) -> None:
    """The table of one detector with random weights on one image of noise (and --batch of them in training)."""
    opts = [*args.opts, "MODEL.DETR.NUM_CLASSES", str(NUM_CLASSES), "MODEL.DEVICE", device.type, "MODEL.WEIGHTS", ""]
    torch.manual_seed(0)
    detector: Any = build_model(load_config(str(CONFIGS / f"{name}.yaml"), opts))
    one, batch = images(1, 7, args.size), images(args.batch, 7, args.size)
    height, width = args.size
    say(f"{name}, {height}x{width}, on {device}")
    say(f"  {'':38}{'images/s':>9}{'ms':>10}{'GiB':>8}{'waits':>7}")
    rows: list[tuple[str, bool, Callable[[], Run]]] = [
        ("inference of 1", False, lambda: inference_of(detector, one)),
        (f"training step of {args.batch}", True, lambda: step_of(detector, batch)),
    ]
    for title, train, make in rows:
        count = args.batch if train else 1
        for autocast in (False, True):
            detector.train(train)
            run = under_autocast(make(), device, autocast)
            report(f"{title}, {'bfloat16' if autocast else 'float32'}", run, count, args)
    if args.compiled:
        compile_inference(detector)
        for autocast in (False, True):
            run = under_autocast(inference_of(detector, one), device, autocast)
            report(f"inference of 1, {'bfloat16' if autocast else 'float32'}, compiled", run, 1, args)


def compile_inference(detector: Any) -> None:
    """torch.compile where the detector itself knows what to compile."""
    detector.eval()
    detector.compile()


def report(title: str, run: Run, images_per_call: int, args: argparse.Namespace) -> None:
    """One line of the table; a call that fails is a line too, so that the others are measured."""
    device = torch.device(args.device)
    try:
        seconds = seconds_of(run, device, args.repeats)
        memory, waits = peak_memory(run, device), waits_of(run, device)
    except (RuntimeError, ValueError) as error:  # out of memory, a graph that does not compile
        args.failed = True
        say(f"  {title:38} FAILED: {str(error).splitlines()[0][:140]}")
        return
    rate = images_per_call / seconds
    say(f"  {title:38}{rate:9.2f}{seconds * 1000:10.1f}{memory:8.2f}{waits:7d}")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("step", choices=["probe", "smoke", "kernels", "model"])
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--detector", choices=DETECTORS, default=DETECTORS[-1])
    parser.add_argument("--size", type=int, nargs=2, default=(800, 1333), help="height and width in pixels")
    parser.add_argument("--batch", type=int, default=2, help="images of a training step")
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--compiled", action="store_true", help="inference through torch.compile, too")
    parser.add_argument("--small", action="store_true", help="kernels at the decoder's size")
    parser.add_argument("--opts", nargs="*", default=[], help="KEY VALUE pairs of the configuration")
    args = parser.parse_args()
    args.failed = False
    device = torch.device(args.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        sys.exit("gpu: torch sees no CUDA device")
    if args.step == "probe":
        say(json.dumps(probe(device)))
    elif args.step == "smoke":
        sys.exit(0 if smoke(device) else 1)
    elif args.step == "kernels":
        kernels(device, args.small)
    else:
        model(args.detector, device, args)
        sys.exit(1 if args.failed else 0)


if __name__ == "__main__":
    main()
