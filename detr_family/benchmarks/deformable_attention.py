"""Speed and memory of multi-scale deformable attention: python -m detr_family.benchmarks.deformable_attention

Compares this package's operator with the pure-torch path (grid_sample) and with peers that happen to be
installed (torch-ms-deform-attn and deformops from PyPI) at the sizes of DINO's encoder and decoder on an 800
x 1333 image: levels 100x167, 50x84, 25x42, 13x21; 8 heads of 32 channels, 4 points. The encoder's queries
are all 22223 tokens, each at its own pixel; the decoder's are 900 boxes anywhere. Points lie on the ring of
MSDeformAttn's start plus a pixel of noise.

On the CPU all contestants run in one process, in turn, `--repeats` rounds, and the table holds the medians
of the process's CPU time (so only ratios of one run mean something, and with --threads N it is the sum over
threads: for scaling see --scaling, which uses wall-clock time). On CUDA it is the time of a replayed CUDA
graph where the contestant can be captured, else of calls in a row.
"""

import argparse
import math
import statistics
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from detr_family.benchmarks.measure import Run, peak_of, time_on_cpu
from detr_family.layers import deformable_attention_ops as ops
from detr_family.layers.deformable_attention import ms_deform_attn
from detr_family.layers.deformable_attention_torch import fused_inputs, ms_deform_attn_torch

LEVELS = [(100, 167), (50, 84), (25, 42), (13, 21)]
HEADS, CHANNELS, POINTS = 8, 32, 4
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass
class Inputs:
    """One case: what the linear layers give (offsets, logits), and the locations and weights made of it."""

    value: Tensor  # B x S x M x D
    shapes: Tensor
    starts: Tensor
    reference: Tensor  # B x Q x L x (2 or 4)
    offsets: Tensor  # B x Q x M x L x P x 2
    logits: Tensor  # B x Q x M x L x P
    locations: Tensor
    weights: Tensor
    grad_output: Tensor  # B x Q x M*D


def make_inputs(case: str, batch: int, dtype: torch.dtype, device: str) -> Inputs:
    """Inputs of the "encoder" or the "decoder", from a fixed seed."""
    generator = torch.Generator().manual_seed(0)
    levels = len(LEVELS)
    sizes = [height * width for height, width in LEVELS]
    if case == "encoder":
        centres = []
        for height, width in LEVELS:
            y, x = torch.meshgrid(
                (torch.arange(height) + 0.5) / height, (torch.arange(width) + 0.5) / width, indexing="ij"
            )
            centres.append(torch.stack((x, y), -1).view(-1, 2))
        reference = torch.cat(centres)[None, :, None].expand(batch, -1, levels, -1).contiguous()
    else:
        box = torch.rand(batch, 900, 4, generator=generator)
        box[..., 2:] = box[..., 2:] * 0.3 + 0.02
        reference = box[:, :, None].expand(-1, -1, levels, -1).contiguous()
    queries = reference.shape[1]
    angle = torch.arange(HEADS) * (2 * math.pi / HEADS)
    ring = torch.stack((angle.cos(), angle.sin()), -1)
    ring = ring / ring.abs().amax(-1, keepdim=True)
    ring = ring[:, None, None] * torch.arange(1, POINTS + 1)[:, None]  # M x 1 x P x 2
    offsets = ring + torch.randn(batch, queries, HEADS, levels, POINTS, 2, generator=generator)
    logits = torch.randn(batch, queries, HEADS, levels, POINTS, generator=generator)
    shapes = torch.tensor(LEVELS)
    starts = torch.tensor([sum(sizes[:index]) for index in range(levels)])
    locations, weights = fused_inputs(shapes, reference, offsets, logits)
    value = torch.randn(batch, sum(sizes), HEADS, CHANNELS, generator=generator)
    grad_output = torch.randn(batch, queries, HEADS * CHANNELS, generator=generator)
    return Inputs(
        value=value.to(device, dtype),
        shapes=shapes.to(device),
        starts=starts.to(device),
        reference=reference.to(device),
        offsets=offsets.to(device, dtype),
        logits=logits.to(device, dtype),
        locations=locations.to(device),
        weights=weights.to(device),
        grad_output=grad_output.to(device, dtype),
    )


Forward = Callable[[Inputs], Tensor]


def contestants(inputs: Inputs) -> dict[str, tuple[Forward, bool]]:
    """Name -> (forward, whether it starts from offsets and logits)."""
    found: dict[str, tuple[Forward, bool]] = {}

    def from_offsets(x: Inputs) -> tuple[Tensor, Tensor]:
        return fused_inputs(x.shapes, x.reference, x.offsets, x.logits)

    def grid_sample_from_offsets(x: Inputs) -> Tensor:
        return ms_deform_attn_torch(x.value, LEVELS, *from_offsets(x))

    def unfused(x: Inputs) -> Tensor:
        return ms_deform_attn(x.value, x.shapes, x.starts, *from_offsets(x))

    def fused(x: Inputs) -> Tensor:
        return torch.ops.detr_family.ms_deform_attn_fused_forward(
            x.value, x.shapes, x.starts, x.reference, x.offsets, x.logits
        )

    found["grid_sample"] = (lambda x: ms_deform_attn_torch(x.value, LEVELS, x.locations, x.weights), False)
    native = not ops.missing_reason(inputs.value.device.type, inputs.value.device.index, inputs.value.dtype)
    if native:
        found["detr_family"] = (
            lambda x: ms_deform_attn(x.value, x.shapes, x.starts, x.locations, x.weights),
            False,
        )
        dtype = inputs.value.dtype
        if dtype.itemsize == 2 and not inputs.value.is_cuda:

            def through_float32(x: Inputs) -> Tensor:
                return ms_deform_attn(x.value.float(), x.shapes, x.starts, x.locations, x.weights).to(dtype)

            found["detr_family, through float32"] = (through_float32, False)
    try:
        from torch_ms_deform_attn import ms_deform_attn as peer

        if inputs.value.dtype == torch.float32:
            found["torch-ms-deform-attn"] = (
                lambda x: peer(x.value, x.shapes, x.starts, x.locations, x.weights),
                False,
            )
    except ImportError:
        pass
    if inputs.value.is_cuda:
        try:
            from deformops.registry import Backend, msda  # 3.0; its wheel has no CUDA path

            found["deformops triton"] = (
                lambda x: msda(
                    x.value, x.shapes, x.starts, x.locations, x.weights.to(x.value.dtype), backend=Backend.TRITON
                ),
                False,
            )
        except ImportError:
            pass
    found["grid_sample, with softmax and locations"] = (grid_sample_from_offsets, True)
    if native:
        found["detr_family, with softmax and locations"] = (unfused, True)
        found["detr_family fused"] = (fused, True)
    return found


def prepare(forward: Forward, raw: bool, inputs: Inputs, backward: bool) -> Run:
    """A call of one contestant, with the gradients of all that has one if `backward`."""
    if not backward:

        def run_forward() -> object:
            with torch.no_grad():
                return forward(inputs)

        return run_forward
    names = ("value", "offsets", "logits") if raw else ("value", "locations", "weights")
    fields = dict(vars(inputs))
    fields.update({name: fields[name].detach().clone().requires_grad_() for name in names})
    own = Inputs(**fields)
    leaves = [fields[name] for name in names]
    return lambda: torch.autograd.grad(forward(own), leaves, own.grad_output)


def with_variants(runs: dict[str, Run], backward: bool) -> dict[str, Run]:
    """The same, and beside each of the CUDA operator's forms those by its variants that change something."""
    variants = [["heads"], ["combine"], ["combine", "heads"]] if backward else [["heads"]]
    found: dict[str, Run] = {}
    for name, run in runs.items():
        found[name] = run
        if name in ("detr_family", "detr_family fused"):
            for chosen in variants:
                found[f"{name}, {' + '.join(chosen)}"] = by_variants(run, *chosen)
    return found


def by_variants(run: Run, *chosen: str) -> Run:
    """The call with these variants of the kernels; captured in a graph, they stay there."""

    def chosen_run() -> object:
        with ops.cuda_variants(*chosen):
            return run()

    return chosen_run


def time_on_cuda(runs: dict[str, Run], repeats: int, calls: int = 20) -> dict[str, float]:
    """Median seconds per call, of a replayed graph where that can be captured."""
    steps: dict[str, Run] = {}
    for name, run in runs.items():
        try:
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for _ in range(3):
                    run()
            torch.cuda.current_stream().wait_stream(side)
            torch.cuda.synchronize()
        except Exception as error:
            print(f"  {name}: does not run ({type(error).__name__}: {str(error).splitlines()[0][:120]})")
            continue
        try:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                run()
            steps[name] = graph.replay
        except Exception:
            torch.cuda.synchronize()
            steps[name] = run
            print(f"  {name}: no graph, calls in a row")
    times: dict[str, list[float]] = {name: [] for name in steps}
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    for round_number in range(repeats + 1):
        for name, step in steps.items():
            begin.record()
            for _ in range(calls):
                step()
            end.record()
            torch.cuda.synchronize()
            if round_number:
                times[name].append(begin.elapsed_time(end) / 1000 / calls)
    return {name: statistics.median(values) for name, values in times.items()}


def print_tables(arguments: argparse.Namespace) -> None:
    """The tables of times and ratios."""
    for name in arguments.cases:
        for backward in (False, True):
            inputs = make_inputs(name, arguments.batch, DTYPES[arguments.dtype], arguments.device)
            chosen = contestants(inputs)
            runs = {key: prepare(forward, raw, inputs, backward) for key, (forward, raw) in chosen.items()}
            if arguments.device == "cuda" and name == "encoder":  # where the queries are the tokens
                runs = with_variants(runs, backward)
            title = f"{name} {'forward + backward' if backward else 'forward'}"
            print(f"\n{title}, batch {arguments.batch}, {arguments.dtype}, {arguments.device}")
            times = (
                time_on_cpu(runs, arguments.repeats, wall=False)
                if arguments.device == "cpu"
                else time_on_cuda(runs, arguments.repeats)
            )
            print(f"  {'':44}{'ms':>10}{'x grid_sample':>15}")
            for key, seconds in times.items():
                raw = chosen[key if key in chosen else key.rsplit(", ", 1)[0]][1]
                base = times["grid_sample, with softmax and locations" if raw else "grid_sample"]
                print(f"  {key:44}{seconds * 1000:10.3f}{base / seconds:15.1f}")
            if "torch-ms-deform-attn" in times and "detr_family" in times:
                ratio = times["torch-ms-deform-attn"] / times["detr_family"]
                print(f"  detr_family over torch-ms-deform-attn: {ratio:.1f}x")


def on_threads(run: Run, threads: int) -> Run:
    """`run`, on so many threads."""

    def threaded() -> object:
        torch.set_num_threads(threads)
        return run()

    return threaded


def print_scaling(arguments: argparse.Namespace) -> None:
    """Wall-clock time on one thread and on more; says something only where those cores are idle."""
    for name in arguments.cases:
        for backward in (False, True):
            inputs = make_inputs(name, arguments.batch, DTYPES[arguments.dtype], "cpu")
            forward = contestants(inputs)["detr_family"][0]
            run = prepare(forward, False, inputs, backward)
            runs = {str(threads): on_threads(run, threads) for threads in (1, arguments.threads)}
            times = time_on_cpu(runs, arguments.repeats * 3, wall=True)
            ratio = times["1"] / times[str(arguments.threads)]
            title = f"{name} {'forward + backward' if backward else 'forward'}"
            print(f"{title}: {arguments.threads} threads {ratio:.2f}x as fast as one")


def peak_memory(name: str, contestant: str, batch: int) -> int:
    """Bytes that one forward + backward takes beyond its inputs, on the CPU; run in a process of its own."""
    inputs = make_inputs(name, batch, torch.float32, "cpu")
    small = make_inputs("decoder", 1, torch.float32, "cpu")
    forward, raw = contestants(inputs)[contestant]
    prepare(forward, raw, small, True)()  # loads code
    run = prepare(forward, raw, inputs, True)
    return peak_of(run)


def print_memory(arguments: argparse.Namespace) -> None:
    """Peak memory of a forward + backward, each contestant in a fresh process."""
    for name in arguments.cases:
        inputs = make_inputs(name, 1, torch.float32, "cpu")
        print(f"\n{name} forward + backward, batch {arguments.batch}, float32: peak beyond inputs, MiB")
        for contestant in contestants(inputs):
            code = (
                "from detr_family.benchmarks.deformable_attention import peak_memory; "
                f"print(peak_memory({name!r}, {contestant!r}, {arguments.batch}))"
            )
            result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
            print(f"  {contestant:44}{int(result.stdout.split()[-1]) / 2**20:10.0f}")


def check(device: str, seed: int, rounds: int) -> bool:
    """Compares outputs and gradients with float64 on the CPU for fresh random sizes; says what differs."""
    random = torch.Generator().manual_seed(seed)

    def pick(*choices: int) -> int:
        return choices[int(torch.randint(len(choices), (), generator=random))]

    tolerances = {torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 1e-2, torch.float64: 1e-11}
    worst = dict.fromkeys(tolerances, 0.0)
    for round_number in range(rounds):
        batch, heads, channels = pick(1, 2, 3, 24), pick(1, 3, 8), pick(32, 32, 32, 16, 64, 5, 20)
        points, levels = pick(4, 4, 3, 7), pick(1, 3, 4, 5)
        shapes = [(pick(1, 7, 19, 32), pick(1, 9, 16, 33)) for _ in range(levels)]
        sizes = [height * width for height, width in shapes]
        queries = pick(1, 37, 130, sum(sizes))
        starts = [sum(sizes[:index]) for index in range(levels)]
        scale = torch.tensor([(width, height) for height, width in shapes], dtype=torch.float64)[:, None]
        shape = (batch, queries, heads, levels, points, 2)
        # off the knots of the interpolation, where derivatives jump; some pixels outside
        whole = (torch.rand(shape, generator=random) * 1.4 * scale - 0.2 * scale).floor()
        pixels = whole + 0.1 + 0.8 * torch.rand(shape, generator=random)
        value = torch.randn(batch, sum(sizes), heads, channels, generator=random)
        numbers = torch.randn(shape[:-1], generator=random)
        grad = torch.randn(batch, queries, heads * channels, generator=random)
        for dtype, tolerance in tolerances.items():
            wide = torch.float64 if dtype == torch.float64 else torch.float32
            locations = ((pixels + 0.5) / scale).to(wide)
            for fused in (False, True):
                # offsets and logits of 16 bits, too: rounded, the points still keep off the knots
                narrow = dtype if fused and round_number % 2 else wide
                anchors = torch.full((batch, queries, levels, 2), 0.5)
                offsets = (pixels + 0.5 - 0.5 * scale).to(wide)
                second = offsets if fused else locations
                for deterministic in (False, True):
                    inputs = [value.to(dtype), second.to(narrow), numbers.to(narrow)]
                    leaves = [item.to(device).requires_grad_() for item in inputs]
                    exact = [item.double().requires_grad_() for item in inputs]
                    sizes_there = torch.tensor(shapes, device=device)
                    starts_there = torch.tensor(starts, device=device)
                    if fused:
                        output = torch.ops.detr_family.ms_deform_attn_fused_forward(
                            leaves[0],
                            sizes_there,
                            starts_there,
                            anchors.to(device),
                            leaves[1],
                            leaves[2],
                            deterministic,
                        )
                        made = fused_inputs(torch.tensor(shapes), anchors.double(), exact[1], exact[2])
                        expected = ms_deform_attn_torch(exact[0], shapes, made[0], made[1])
                    else:
                        output = ms_deform_attn(
                            leaves[0],
                            sizes_there,
                            starts_there,
                            leaves[1],
                            leaves[2],
                            deterministic=deterministic,
                        )
                        expected = ms_deform_attn_torch(exact[0], shapes, exact[1], exact[2])
                    grads = torch.autograd.grad(output, leaves, grad.to(output))
                    exact_grads = torch.autograd.grad(expected, exact, grad.to(dtype).double())
                    pairs = zip((output, *grads), (expected, *exact_grads), strict=True)
                    for name, (result, other) in zip(("output", "value", "second", "third"), pairs, strict=True):
                        difference = (result.detach().double().cpu() - other.detach()).abs().max()
                        error = float(difference / other.detach().abs().max().clamp(min=1e-3))
                        worst[dtype] = max(worst[dtype], error)
                        if not error <= tolerance:
                            print(
                                f"DIFFERS by {error:.1e} in {name}: round {round_number}, {dtype}, "
                                f"fused {fused}, deterministic {deterministic}, B={batch} Q={queries} "
                                f"M={heads} D={channels} P={points} levels {shapes}"
                            )
    fine = all(worst[dtype] <= tolerance for dtype, tolerance in tolerances.items())
    errors = ", ".join(f"{str(dtype).removeprefix('torch.')} {error:.1e}" for dtype, error in worst.items())
    print(f"{'all within tolerance' if fine else 'NOT ALL WITHIN TOLERANCE'} on {device}, seed {seed}: {errors}")
    return fine


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--dtype", default="float32", choices=list(DTYPES))
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--cases", nargs="+", default=["encoder", "decoder"], choices=["encoder", "decoder"])
    parser.add_argument("--check", type=int, metavar="ROUNDS", help="compare with float64 on random inputs")
    parser.add_argument(
        "--variants", nargs="+", default=[], choices=list(ops.VARIANTS), help="of the CUDA kernels, in --check"
    )
    parser.add_argument("--seed", type=int, default=None, help="of --check; fresh unless given")
    parser.add_argument("--scaling", action="store_true", help="one thread against --threads, wall-clock")
    parser.add_argument("--memory", action="store_true", help="peak memory on the CPU")
    arguments = parser.parse_args()
    for key, text in ops.describe().items():
        print(f"{key}: {text}")
    if arguments.check:
        seed = torch.seed() % 2**31 if arguments.seed is None else arguments.seed
        with ops.cuda_variants(*arguments.variants):
            sys.exit(0 if check(arguments.device, seed, arguments.check) else 1)
    if arguments.scaling:
        print_scaling(arguments)
    elif arguments.memory:
        print_memory(arguments)
    else:
        torch.set_num_threads(arguments.threads)
        print_tables(arguments)


if __name__ == "__main__":
    main()
