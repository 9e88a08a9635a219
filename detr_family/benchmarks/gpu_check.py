"""Everything that is to be known about this GPU, in minutes that are counted: tools/gpu_check.sh

Steps run one after another, each in a process of its own under a time limit, so that neither a kernel that stops nor
one that hangs costs more than its own step. What each prints goes to the terminal and to a file in the folder of
results as it comes; summary.txt there is complete after every step. What no longer fits into --minutes is left out.

    library   the one that is there, else the one carried in .gpu/, else built by nvcc for this GPU
    smoke     every type of kernel on a few numbers; where this fails, nothing long is begun
    tests     those marked gpu (if pytest is installed)
    check     random configurations against float64, from a fixed seed; again with the variants of the kernels
    speed     the operator and its variants against grid_sample and whatever peers are installed, three types
    models    inference and training step of the five detectors: time, memory, waits for the device
    sanitizer, profile, compiled, train    only if named: compute-sanitizer, ncu, torch.compile, a short training
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
LAYERS = ROOT / "detr_family" / "layers"
CARRIED = ROOT / ".gpu"
DEFAULT = ["library", "smoke", "tests", "check", "speed", "models"]
EXTRA = ["sanitizer", "profile", "compiled", "train"]
MODELS = ["dino_r50_4scale", "detr_r50", "conditional_detr_r50", "dab_detr_r50", "dn_detr_r50"]  # DINO first
VARIANTS = ["combine", "heads"]  # of the operator's kernels
PROFILED = ["SpeedOfLight", "MemoryWorkloadAnalysis", "LaunchStats", "Occupancy"]


@dataclass(frozen=True)
class Step:
    """A command and how long it may take."""

    name: str
    command: list[str]
    seconds: float


class Checker:
    """Runs steps, keeps their results and the time."""

    def __init__(self, folder: Path, minutes: float, patience: float = 1) -> None:
        self.folder = folder
        self.patience = patience
        self.folder.mkdir(parents=True, exist_ok=True)
        self.end = time.monotonic() + 60 * minutes
        self.lines: list[str] = []
        self.failed = False

    def note(self, name: str, text: str) -> None:
        """A line of the summary, written at once."""
        self.lines.append(f"{name:28} {text}")
        (self.folder / "summary.txt").write_text("\n".join(self.lines) + "\n")

    def run(self, step: Step, environment: dict[str, str] | None = None) -> bool:
        """Runs a step; False where it failed, ran out of time or no longer fits."""
        left = self.end - time.monotonic()
        if left < min(step.seconds, 10):
            self.note(step.name, "left out: no time")
            return False
        limit = min(step.seconds * self.patience, left)
        print(f"\n== {step.name} (at most {limit:.0f} s)", flush=True)
        file = self.folder / f"{step.name.replace(' ', '_')}.txt"
        begin = time.monotonic()
        with file.open("wb") as output, file.open("rb") as shown:
            process = subprocess.Popen(
                step.command,
                cwd=ROOT,
                env={**os.environ, "PYTHONUNBUFFERED": "1", **(environment or {})},
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # so that what it starts ends with it
            )
            status: int | None = None
            while status is None and time.monotonic() - begin < limit:
                time.sleep(0.1)
                status = process.poll()
                self.show(shown.read())
            if status is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
            self.show(shown.read())
        seconds = time.monotonic() - begin
        said = "ok" if status == 0 else f"TIMED OUT after {limit:.0f} s" if status is None else f"FAILED ({status})"
        self.note(step.name, f"{said}, {seconds:.1f} s")
        self.failed |= status != 0
        return status == 0

    def show(self, text: bytes) -> None:
        """Hands on what a step has printed."""
        sys.stdout.write(text.decode(errors="replace"))
        sys.stdout.flush()


def probe(device: str) -> dict[str, str]:
    """What `gpu probe` says; it ends the whole with one line where there is no device."""
    command = [sys.executable, "-m", "detr_family.benchmarks.gpu", "probe", "--device", device]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    if result.returncode:
        lines = (result.stderr or result.stdout).strip().splitlines()
        sys.exit(f"gpu_check: {lines[-1] if lines else 'the device does not answer'}")
    return json.loads(result.stdout.splitlines()[-1])


def find_library(checker: Checker, device: str) -> dict[str, str]:
    """Makes sure, as cheaply as can be, of a library that serves the device; says what there is."""
    found = probe(device)
    if found["missing"] and device == "cuda":
        for carried in sorted(CARRIED.glob("_ms_deform_attn_cuda*.so")):
            shutil.copy(carried, LAYERS / carried.name)
            found = probe(device)
            if not found["missing"]:
                checker.note("library", f"carried: {carried.name}")
                break
    if found["missing"] and device == "cuda":
        build = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
        arch = os.environ.get("TORCH_CUDA_ARCH_LIST", found["capability"])
        checker.run(Step("build", build, 240), {"FORCE_CUDA": "1", "TORCH_CUDA_ARCH_LIST": arch})
        found = probe(device)
    for key, text in found.items():
        if text:
            checker.note(key, text)
            print(f"{key}: {text}", flush=True)
    return found


def find_tool(name: str) -> str | None:
    """A tool of the CUDA toolkit."""
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    return shutil.which(name) or shutil.which(name, path=f"{home}/bin")


def training(device: str, iterations: int, output: Path) -> list[str]:
    """The command of a short training of DINO on the carried images, from the carried backbone if there is one."""
    backbone = CARRIED / "data" / "backbone" / "R-50.pkl"
    return [
        *(sys.executable, "train_net.py", "--config-file", "configs/finetune_dino_r50.yaml"),
        *("--data", str(CARRIED / "data" / "bccd"), "MODEL.DEVICE", device, "SEED", "1", "OUTPUT_DIR", str(output)),
        *("MODEL.WEIGHTS", str(backbone) if backbone.exists() else ""),
        *("SOLVER.EPOCHS", "0", "SOLVER.DROP_EPOCHS", "()", "SOLVER.MAX_ITER", str(iterations), "SOLVER.STEPS", "()"),
    ]


def last_ap(folder: Path) -> str:
    """The last AP that a training wrote down."""
    file = folder / "metrics.json"
    lines = file.read_text().splitlines() if file.exists() else []
    found = [record for record in map(json.loads, lines) if "bbox/AP" in record]
    return "no AP" if not found else f"AP {found[-1]['bbox/AP']:.1f}, AP50 {found[-1]['bbox/AP50']:.1f}"


def steps(chosen: list[str], args: argparse.Namespace) -> list[Step]:
    """The steps after the library and the smoke test, most telling first."""
    python, device = sys.executable, ["--device", args.device]
    gpu = [python, "-m", "detr_family.benchmarks.gpu"]
    operator = [python, "-m", "detr_family.benchmarks.deformable_attention", *device]
    found: list[Step] = []
    if "tests" in chosen and importlib.util.find_spec("pytest"):
        pytest = [python, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-m", "gpu"]
        found.append(Step("tests operator", [*pytest, "tests/layers/test_deformable_attention.py"], 60))
        found.append(Step("tests detectors", [*pytest, "tests/test_gpu.py"], 60))
    if "check" in chosen:
        found.append(Step("check", [*operator, "--check", str(args.rounds), "--seed", "1"], 45))
        if args.device == "cuda":
            half = ["--check", str((args.rounds + 1) // 2), "--seed", "2", "--variants", *VARIANTS]
            found.append(Step("check variants", [*operator, *half], 30))
    small = ["--size", str(args.size[0]), str(args.size[1]), "--repeats", str(args.repeats)]
    opts = ["--opts", *args.opts] if args.opts else []
    if "speed" in chosen:
        for dtype in ("float32", "bfloat16", "float16"):
            found.append(Step(f"speed {dtype}", [*operator, "--dtype", dtype, "--repeats", str(args.repeats)], 40))
    if "models" in chosen:
        for name in MODELS:
            found.append(Step(f"model {name}", [*gpu, "model", *device, *small, "--detector", name, *opts], 45))
    if "compiled" in chosen:
        compiled = [*gpu, "model", *device, *small, "--compiled", "--detector"]
        found += [Step(f"compiled {name}", [*compiled, name, *opts], 150) for name in MODELS]
    if "sanitizer" in chosen and (sanitizer := find_tool("compute-sanitizer")):
        for tool in ("memcheck", "racecheck", "synccheck"):
            command = [sanitizer, "--tool", tool, "--error-exitcode", "9", *gpu, "smoke", *device]
            found.append(Step(f"sanitizer {tool}", command, 90))
    if "profile" in chosen and (profiler := find_tool("ncu")):
        sections = [word for section in PROFILED for word in ("--section", section)]
        names = ["--kernel-name", "regex:(forward|backward)_kernel", "--launch-count", "4"]
        found.append(Step("profile", [profiler, *names, *sections, *gpu, "kernels", *device], 90))
    if "train" in chosen:
        found.append(Step("train", training(args.device, args.iterations, Path(args.output, "training")), 200))
    return found


def main() -> None:
    """Command line; ends with 1 where a step failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=6)
    parser.add_argument("--patience", type=float, default=1, help="times the limits of the steps")
    parser.add_argument("--only", nargs="+", choices=[*DEFAULT, *EXTRA], help="these, after library and smoke")
    parser.add_argument("--also", nargs="+", choices=EXTRA, default=[], help="these steps after the usual ones")
    parser.add_argument("--skip", nargs="+", choices=DEFAULT[2:], default=[])
    parser.add_argument("--output", default=os.environ.get("OUT") or "output/gpu_check", help="folder ($OUT)")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"], help="cpu: a rehearsal")
    parser.add_argument("--rounds", type=int, default=12, help="of the random check")
    parser.add_argument("--repeats", type=int, default=7, help="of every measurement")
    parser.add_argument("--size", type=int, nargs=2, default=(800, 1333), help="of the detectors' images")
    parser.add_argument("--iterations", type=int, default=300, help="of the short training")
    parser.add_argument("--opts", nargs="*", default=[], help="KEY VALUE pairs of the configuration")
    args = parser.parse_args()
    chosen = args.only or [name for name in [*DEFAULT, *args.also] if name not in args.skip]
    checker = Checker(Path(args.output), args.minutes, args.patience)
    found = find_library(checker, args.device)
    smoke = [sys.executable, "-m", "detr_family.benchmarks.gpu", "smoke", "--device", args.device]
    if found["missing"] or not checker.run(Step("smoke", smoke, 20)):
        checker.note("given up", found["missing"] or "the smoke test failed")
        checker.failed = True
    else:
        for step in steps(chosen, args):
            checker.run(step)
            if step.name == "train":
                checker.note("train result", last_ap(Path(args.output, "training")))
    print("\n== summary\n" + "\n".join(checker.lines), flush=True)
    sys.exit(1 if checker.failed else 0)


if __name__ == "__main__":
    main()
