"""The CUDA sources run on a CPU (cuda_emulation/): the operator's own tests, and random ones under sanitizers."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from layers.cuda_emulation import emulate

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
pytestmark = pytest.mark.skipif(not emulate.SOURCES.exists(), reason="the sources are not here")
can_compile = pytest.mark.skipif(
    not shutil.which("g++") or sys.platform != "linux" or platform.machine() != "x86_64",
    reason="the emulation needs g++ on Linux on x86-64",
)
# What is about the CPU's kernels and no others.
ONLY_CPU = [
    "test_results_of_megabytes",
    "test_every_set_of_instructions",
    "test_copies_of_no_levels",
    "test_threads_change_nothing",
    "test_16_bits_are_float32_rounded",  # to the last bit, for which the order of the sums has to be the same
    "test_backward_on_the_cpu_is_deterministic",
    "test_bad_input_to_the_operator_itself",  # a kernel that stops says why on the terminal
    "onnx",
]
KERNELS = (emulate.SOURCES / "cuda_kernels.cuh").read_text()
WRAPPER = (emulate.SOURCES / "cuda.cu").read_text()


def test_lines_keep_their_numbers() -> None:
    for name, text in (("cuda_kernels.cuh", KERNELS), ("cuda.cu", WRAPPER)):
        translated = emulate.translate(text, name).splitlines()[1:]
        assert len(translated) == len(text.splitlines())
        for old, new in zip(text.splitlines(), translated, strict=True):
            if "template <" in old or "constexpr" in old:
                assert old == new


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [
        ("cuda_kernels.cuh", 'asm volatile("red.global.add.v4.f32', 'asm volatile("red.relaxed.add.v4.f32'),
        ("cuda_kernels.cuh", "prefetch.global.L1 [%0]", "prefetch.global.L2 [%0]"),
        ("cuda_kernels.cuh", "extern __shared__ Level level_of_point[];", "extern __shared__ __align__(16) Level l[];"),
        ("cuda_kernels.cuh", "__shared__ Exchange<C> exchange;", "__shared__ Exchange<C> exchange, other;"),
        ("cuda_kernels.cuh", "alignas(16) __half2 pairs[4];", "__half2 pairs[4];"),
        ("cuda_kernels.cuh", "#include <cuda_fp16.h>", "#include <cuda_fp8.h>"),
        ("cuda.cu", "kThreads, shared, stream>>>", "kThreads, shared, 0>>>"),
        ("cuda.cu", "DeviceGuard guard(", "DeviceGuard one("),
        ("cuda.cu", "detr_family, CUDA, m", "detr_family, PrivateUse1, m"),
    ],
)
def test_a_form_that_is_not_translated_is_an_error(name: str, old: str, new: str) -> None:
    text = KERNELS if name.endswith("cuh") else WRAPPER
    assert old in text
    with pytest.raises(emulate.Untranslated, match=name):
        emulate.translate(text.replace(old, new, 1), name)


def test_every_fault_fits_the_kernels() -> None:
    assert emulate.plant(KERNELS).count("emu::fault == ") == len(emulate.FAULTS)
    with pytest.raises(emulate.Untranslated, match="no __syncthreads"):
        emulate.plant(KERNELS.replace("__syncthreads", "__syncwarp"))


@can_compile
@pytest.mark.extension
@pytest.mark.parametrize("arch", [900, 800])
def test_operator_on_the_cuda_code(arch: int, tmp_path: Path) -> None:
    """The operator's own tests, with the emulated library in the place of the CPU's; of sm_80 what is its own."""
    shutil.copytree(
        ROOT / "detr_family", tmp_path / "detr_family", ignore=shutil.ignore_patterns("*.so", "__pycache__")
    )
    target = tmp_path / "detr_family" / "layers" / "_ms_deform_attn_cpu.emulated.so"
    emulate.library(tmp_path / "build", Path(torch.__file__).parent, target, arch)
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    shutil.copy(HERE / "test_deformable_attention.py", tmp_path)
    shutil.copy(HERE / "cuda_emulation" / "operator_checks.py", tmp_path)
    files = ["operator_checks.py", "test_deformable_attention.py"]
    chosen = "not (" + " or ".join(ONLY_CPU) + ")" if arch == 900 else "equals_float64 or operator_checks"
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "-k", chosen, *files],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-2000:]
    assert int(result.stdout.split(" passed")[0].split()[-1]) > (100 if arch == 900 else 40)
    for step in (["smoke"], ["kernels", "--small"]):  # what is run first on a GPU
        command = [sys.executable, "-m", "detr_family.benchmarks.gpu", *step, "--device", "cpu"]
        environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
        result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
        assert result.returncode == 0, result.stdout + result.stderr[-2000:]


MINUTE = int(os.environ.get("DETR_FAMILY_CHECK_SECONDS", "60"))  # of the random check


def check(program: Path, seconds: int, seed: int, fault: int = 0) -> subprocess.CompletedProcess[str]:
    options = {
        "TSAN_OPTIONS": "halt_on_error=1",
        # fibers leave their stacks behind when their block ends
        "ASAN_OPTIONS": "detect_stack_use_after_return=0:detect_leaks=0",
        "UBSAN_OPTIONS": "halt_on_error=1:print_stacktrace=1",
    }
    return subprocess.run(
        [str(program), str(seconds), str(seed), "-1", str(fault)],
        env={**os.environ, **options},
        capture_output=True,
        text=True,
        check=False,
    )


@can_compile
@pytest.mark.slow
@pytest.mark.extension
def test_random_configurations_under_the_thread_sanitizer(tmp_path: Path) -> None:
    """A minute of them; then each planted fault is noticed, or this test would notice nothing."""
    program = emulate.random_check(tmp_path, "thread", faults=True)
    result = check(program, MINUTE, torch.seed() % 10**6)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[:5000]
    assert int(result.stdout.split(" configurations")[0].split()[-1]) >= MINUTE / 3, result.stdout
    names = [name for name, *_ in emulate.FAULTS]
    assert [name for n, name in enumerate(names, 1) if check(program, 60, 5, n).returncode == 0] == []


@can_compile
@pytest.mark.slow
@pytest.mark.extension
def test_random_configurations_under_the_address_sanitizer(tmp_path: Path) -> None:
    """And that of undefined behaviour: a minute of the kernels as they are for sm_80, without 16-byte reductions."""
    program = emulate.random_check(tmp_path, "address", arch=800)
    result = check(program, MINUTE, torch.seed() % 10**6)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[:5000]
    assert int(result.stdout.split(" configurations")[0].split()[-1]) >= MINUTE / 3, result.stdout


@can_compile
@pytest.mark.skipif(not shutil.which("gcov"), reason="gcov is not here")
@pytest.mark.slow
@pytest.mark.extension
def test_random_configurations_reach_the_kernels_lines(tmp_path: Path) -> None:
    """All but what stops a kernel, which operator_checks.py reaches: the share that the documentation gives."""
    program = emulate.random_check(tmp_path, "coverage")
    assert check(program, MINUTE // 3, 5).returncode == 0
    command = ["gcov", "-o", str(tmp_path), "random_check-random_check.gcda"]
    report = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    found = re.search(r"File 'cuda_kernels\.cuh'\nLines executed:([\d.]+)% of (\d+)", report)
    assert found and float(found[1]) >= 97 and int(found[2]) > 400, report
