"""Builds the libraries with C++ and CUDA: deformable attention's two, Winograd's convolutions, gradients of weights.

setup.py passes its classes to setuptools. They are plain shared libraries against torch's stable ABI
(torch/csrc/stable): no pybind, no Python headers, one build for every Python and for torch 2.10 and later. So the
compilers are called as they are, without torch's own machinery, which would refuse a toolkit of another version or a
machine without a GPU for no need of ours.

Nothing here ends an installation: what is missing is said in one line, and the package works without it,
more slowly. FORCE_CUDA=1 makes a missing or failing CUDA toolkit an error. Other variables: CXX, CUDA_HOME,
TORCH_CUDA_ARCH_LIST (default 7.5;8.0;9.0+PTX), NVCC_FLAGS.
"""

import logging
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

from setuptools import Extension
from setuptools.command.build_ext import build_ext

SOURCES = Path("detr_family", "layers", "csrc")
PACKAGE = "detr_family.layers"
DEFAULT_ARCHES = "7.5;8.0;9.0+PTX"
TARGET = "0x020a000000000000"  # torch 2.10, the oldest whose ABI is asked for
AGAIN = "pip install -e . --no-build-isolation"


class Missing(Exception):
    """What keeps a library from being built, in one line."""


def extensions() -> list[Extension]:
    """All are optional, so that setuptools takes their absence."""
    of_attention = ["checks.h", "point.inl"]
    on_cpu = ["every_instruction_set.inl", "instructions.h", "pages.h", "stored.h", "vectors.inl"]
    parts = {
        "_ms_deform_attn_cpu": ("cpu.cpp", [*of_attention, *on_cpu, "cpu_kernels.inl", "cpu_problem.h"]),
        "_ms_deform_attn_cuda": ("cuda.cu", [*of_attention, "cuda_kernels.cuh", "cuda_params.h"]),
        "_winograd_cpu": ("winograd.cpp", [*on_cpu, "tensors.h", "winograd_kernels.inl", "winograd_problem.h"]),
        "_outer_products_cpu": (
            "outer_products.cpp",
            [*on_cpu, "tensors.h", "outer_products_kernels.inl", "outer_products_problem.h"],
        ),
    }
    return [
        Extension(
            f"{PACKAGE}.{name}",
            [str(SOURCES / source)],
            depends=[str(SOURCES / other) for other in depends],
            py_limited_api=True,
            optional=True,
        )
        for name, (source, depends) in parts.items()
    ]


WITHOUT = {
    "_ms_deform_attn_cpu": "ms_deform_attn on CPU will take the slow pure-torch path",
    "_ms_deform_attn_cuda": "ms_deform_attn on CUDA will take the slow pure-torch path",
    "_winograd_cpu": "3x3 convolutions on CPU will be slower",
    "_outer_products_cpu": "training on CPU will be slower",
}


def torch_folder() -> Path:
    """Where torch is installed (without importing it).

    A build in isolation, as `pip wheel .` is, does not see it: then it is that of the environment that pip runs in,
    or of the active one. Any torch will do whose stable ABI is the one asked for.
    """
    folder = next((place for place in torch_places() if (place / "include").is_dir()), None)
    if folder is None:
        raise Missing(f"torch is not there while building; install it first and run {AGAIN}")
    if not (folder / "include" / "torch" / "csrc" / "stable" / "ops.h").exists():
        raise Missing("torch is older than 2.10, or came without its headers; install torch 2.10 or later")
    return folder


def torch_places() -> Iterator[Path]:
    """Where it may be, the first is meant."""
    spec = find_spec("torch")
    if spec is not None and spec.origin is not None:
        yield Path(spec.origin).parent
    yield Path(sysconfig.get_path("platlib"), "torch")
    for name in ("VIRTUAL_ENV", "CONDA_PREFIX"):
        if os.environ.get(name):
            yield from Path(os.environ[name]).glob("lib/python*/site-packages/torch")


def torch_flags() -> tuple[list[str], list[str]]:
    """Compiler's and linker's flags."""
    folder = torch_folder()
    link = [f"-L{folder / 'lib'}"]
    if sys.platform == "linux":
        link.append("-Wl,--no-as-needed")  # libtorch brings libtorch_cuda along where torch has that
    return [f"-I{folder / 'include'}", f"-DTORCH_TARGET_VERSION={TARGET}"], [*link, "-ltorch", "-ltorch_cpu"]


def find_compiler() -> list[str]:
    """The C++ compiler's command."""
    if sys.platform == "win32":
        raise Missing("there is no recipe for Windows yet")
    named = shlex.split(os.environ.get("CXX", ""))
    for command in [named] if named else [["g++"], ["c++"], ["clang++"]]:
        if shutil.which(command[0]):
            return command
    raise Missing(f"no C++ compiler found; install g++ 9 or later (or name one in CXX) and run {AGAIN}")


def find_nvcc() -> str:
    """The path of nvcc."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    places = [Path(home, "bin", "nvcc")] if home else []
    on_path = shutil.which("nvcc")
    if on_path and not home:
        places.append(Path(on_path))
    places.append(Path("/usr/local/cuda/bin/nvcc"))
    for place in places if not home else places[:1]:
        if place.exists():
            return str(place)
    where = f"in CUDA_HOME={home}" if home else "on PATH or in /usr/local/cuda"
    raise Missing(f"no nvcc {where}; install the CUDA toolkit (or set CUDA_HOME) and run {AGAIN}")


def cuda_arches() -> list[str]:
    """TORCH_CUDA_ARCH_LIST as a list: ["7.5", "8.0", "9.0+PTX"]."""
    named = os.environ.get("TORCH_CUDA_ARCH_LIST") or DEFAULT_ARCHES
    arches = named.replace(",", ";").replace(" ", ";").split(";")
    arches = [arch.strip() for arch in arches if arch.strip()]
    for arch in arches:
        if not re.fullmatch(r"\d+\.\d[af]?(\+PTX)?", arch):
            raise Missing(f"TORCH_CUDA_ARCH_LIST={named}: {arch!r} is no architecture such as 9.0, 10.0f or 9.0+PTX")
    return arches


def arch_flags(arches: list[str]) -> list[str]:
    """nvcc's flags for them."""
    flags = []
    for arch in arches:
        number = arch.removesuffix("+PTX").replace(".", "")
        flags += ["-gencode", f"arch=compute_{number},code=sm_{number}"]
        if arch.endswith("+PTX"):
            flags += ["-gencode", f"arch=compute_{number},code=compute_{number}"]
    return flags


def run(command: list[str], what: str) -> None:
    """Runs a compiler; its first error becomes the one line."""
    logging.info(" ".join(command))
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    sys.stderr.write(result.stderr)
    if result.returncode:
        lines = (result.stderr + result.stdout).splitlines()
        errors = [line for line in lines if "error" in line.lower() or "fatal" in line.lower()]
        raise Missing(f"{what} failed: {(errors or lines or ['no message'])[0].strip()}")


class BuildExt(build_ext):
    """Compiles each library with one call of its compiler, or says why not."""

    def build_extension(self, ext: Extension) -> None:
        """Replaces setuptools' own way."""
        kind = ext.name.rsplit("_", 1)[1]
        target = Path(self.get_ext_fullpath(ext.name))
        kept = SOURCES.parent / target.name  # in the source tree: what an earlier build in place or editable one left
        newest = max(Path(name).stat().st_mtime for name in [*ext.sources, *ext.depends, __file__])
        stamp = Path("build", f"{ext.name}.command")
        try:
            command = self.command(kind, ext.sources[0])
            target.parent.mkdir(parents=True, exist_ok=True)
            fresh = kept.exists() and kept.stat().st_mtime > newest and not self.force
            if fresh and stamp.exists() and stamp.read_text() == " ".join(command):
                if target.resolve() != kept.resolve():
                    shutil.copy2(kept, target)
                return
            kept.unlink(missing_ok=True)
            stamp.parent.mkdir(parents=True, exist_ok=True)
            run([*command, "-o", str(target)], f"compiling {ext.sources[0]}")
            stamp.write_text(" ".join(command))
        except (Missing, OSError) as error:
            kept.unlink(missing_ok=True)  # so that none of older sources stays
            if kind == "cuda" and os.environ.get("FORCE_CUDA", "0") not in ("", "0"):
                raise RuntimeError(f"FORCE_CUDA is set, but: {error}") from error
            print(f"detr_family: {WITHOUT[ext.name.rsplit('.', 1)[1]]}: {error}", file=sys.stderr)

    def command(self, kind: str, source: str) -> list[str]:
        """The one command that makes a library, but for where to."""
        compile_flags, link_flags = torch_flags()
        if kind == "cpu":
            flags = ["-O3", "-std=c++17", "-fPIC", "-shared", "-fvisibility=hidden"]
            flags += [
                "-Wall",
                "-Wno-attributes",
                "-Wno-ignored-attributes",
                "-Wno-psabi",
                "-Wno-unknown-pragmas",
            ]
            if sys.platform == "darwin":
                flags += ["-undefined", "dynamic_lookup"]
            return [*find_compiler(), *flags, *compile_flags, source, *link_flags]
        if sys.platform != "linux" or platform.machine() not in ("x86_64", "aarch64"):
            raise Missing(f"there is no CUDA for {sys.platform} on {platform.machine()}")
        arches = cuda_arches()
        flags = ["-O3", "-std=c++17", "-shared", "-cudart=static", "--threads=2", "--expt-relaxed-constexpr"]
        flags += ["-Xcompiler=-fPIC,-fvisibility=hidden", "-diag-suppress=20012,128", *arch_flags(arches)]
        flags += [
            f'-DDETR_FAMILY_ARCHES="{";".join(arches)}"',
            *shlex.split(os.environ.get("NVCC_FLAGS", "")),
        ]
        links = [flag.replace("-Wl,", "-Xlinker=") for flag in link_flags]
        return [find_nvcc(), *flags, *compile_flags, source, *links]
