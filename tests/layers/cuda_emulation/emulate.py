"""cuda.cu and its kernels as C++ for a CPU: translation and compilers.

`translate` changes what C++ has no word for, line by line, so that compilers, sanitizers and gcov speak of the lines of
the sources themselves; where the sources take a form that it does not know, it raises Untranslated. What it leaves
(threadIdx, __shfl_xor_sync, atomicAdd, ...) cuda_on_cpu.h defines, and what that lacks does not compile.

`library` builds the operator for torch's CPU tensors out of it, `random_check` a program under sanitizers. FAULTS are
mistakes that the latter can be told to make, one at a time, to see whether it notices.
"""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

HERE = Path(__file__).resolve().parent
SOURCES = HERE.parents[2] / "detr_family" / "layers" / "csrc"
AS_THEY_ARE = ["checks.h", "cuda_params.h", "point.inl"]
COMMON = ["-std=c++17", "-fno-strict-aliasing", "-w", "-g"]
# g++ 12.2 at -O2 drops stores to shared memory that is passed by reference: its ivopts make a null pointer of the base.
OPTIMISED = ["-O2", "-fno-ivopts"]
SANITIZERS = {
    "thread": ["-O1", "-fsanitize=thread", "-DEMU_TSAN"],
    "address": ["-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"],
    "coverage": ["-O0", "--coverage"],
}


class Untranslated(Exception):
    """The sources took a form that this module does not translate."""


# What to change, and how often it must be there (None: at least once) in cuda.cu and in cuda_kernels.cuh.
_WORDS: list[tuple[str, str, int | None, int | None]] = [
    (r"#include <cuda_runtime\.h>", '#include "cuda_on_cpu.h"', 0, 1),
    (r"#include <cuda_(bf16|fp16)\.h>", "", 0, 2),
    (r"#include <torch/csrc/stable/accelerator\.h>", "", 1, 0),
    (r"\b__CUDA_ARCH__\b", "DETR_EMULATED_ARCH", 0, None),
    (r"torch::stable::accelerator::DeviceGuard guard\([^;]*\);", "", 2, 0),
    (r"\.is_cuda\(\)", ".is_cpu()", None, 0),
    (r"STABLE_TORCH_LIBRARY_IMPL\(detr_family, CUDA, m\)", "STABLE_TORCH_LIBRARY_IMPL(detr_family, CPU, m)", 1, 0),
    (r"\b65535\b", "emu::most_blocks", 1, 0),
    (
        r"(\w+)<<<((?:[^<>]|<[^<>]*>)*?), (\w+), (\w+), stream>>>\(([^;]*)\);",
        r"emu::launch_as([&](auto... x) { \1(x...); }, \2, \3, \4, \5);",
        None,
        0,
    ),
    (
        r"extern __shared__ (\w+) (\w+)\[\];",
        r"\1* const \2 = static_cast<\1*>(emu::shared(-1, 0, alignof(\1)));",
        0,
        None,
    ),
    (
        r'asm volatile\("red\.global\.add\.v4\.f32 \[%0\], \{%1, %2, %3, %4\};" ::"l"\((.*?)\), "f"\((.*?)\), '
        r'"f"\((.*?)\),\s*"f"\((.*?)\), "f"\((.*?)\)\s*: "memory"\);',
        r"red_add_v4(\1, \2, \3, \4, \5);",
        0,
        1,
    ),
    (r'asm volatile\("prefetch\.global\.L1 \[%0\];" ::"l"\(([^;]*)\)\);', r"prefetch_l1(\1);", 0, 2),
    (
        r'asm\("mad\.wide\.s32 %0, %1, %2, %3;" : "=l"\((\w+)\) : "r"\((\w+)\), "r"\((\w+)\), "l"\((\w+)\)\);',
        r"\1 = uint64_t(int64_t(\2) * \3) + \4;",
        0,
        1,
    ),
]
# Local arrays that are read 16 bytes at a time; g++ aligns them by itself, nvcc need not.
_WIDE_READ = re.compile(r"reinterpret_cast<(?:const )?(?:uint4|float4)\*>\((\w+)\)")

# (name, text, the same with the fault): FAULT(n) is true where that fault is on. The numbers are those of the list.
FAULTS = [
    (
        "forward: no __syncwarp before work_out",
        "C::own> points;\n        __syncwarp();",
        "C::own> points;\n        if (!FAULT) __syncwarp();",
    ),
    (
        "forward: no __syncwarp after work_out",
        "                    points);\n        __syncwarp();\n        if constexpr (through)",
        "                    points);\n        if (!FAULT) __syncwarp();\n        if constexpr (through)",
    ),
    (
        "backward: no __syncwarp before work_out",
        "      } else {\n        __syncwarp();",
        "      } else {\n        if (!FAULT) __syncwarp();",
    ),
    (
        "backward: no __syncwarp after work_out",
        "                    points);\n        __syncwarp();\n      }",
        "                    points);\n        if (!FAULT) __syncwarp();\n      }",
    ),
    ("set_up: no __syncthreads", "  __syncthreads();\n", "  if (!FAULT) __syncthreads();\n"),
    (
        "atomicAdd as a plain addition",
        "atomicAdd(to + i, by[i]);",
        "if (FAULT) to[i] += by[i]; else atomicAdd(to + i, by[i]);",
    ),
    (
        "backward: beyond the last query too",
        "const bool real = query[slot] >= 0;",
        "const bool real = FAULT || query[slot] >= 0;",
    ),
    (
        "forward: beyond the last query too",
        "if (query[slot] >= 0 && there)\n",
        "if ((FAULT || query[slot] >= 0) && there)\n",
    ),
    (
        "a lane leaves before the shuffle",
        "  const int64_t q = real ? query[slot] : 0;",
        "  const int64_t q = real ? query[slot] : 0; if (FAULT && !real) return;",
    ),
    (
        "a corner outside is read",
        "inside[c] = (place.token_and_mask >> c & 1) && there;",
        "inside[c] = (FAULT || (place.token_and_mask >> c & 1)) && there;",
    ),
    (
        "the groups' parts of the exchange overlap",
        "exchange.weights[slot * C::stride + i * C::group + lane] = corners;",
        "exchange.weights[slot * (C::stride - (FAULT ? 2 : 0)) + i * C::group + lane] = corners;",
    ),
    (
        "a sum over the whole warp",
        "x += __shfl_xor_sync(kWarp, x, step, group);",
        "x += FAULT ? __shfl_xor_sync(kWarp, x, 2 * step) : __shfl_xor_sync(kWarp, x, step, group);",
    ),
    (
        "a tile's columns wrong at the edge",
        "const int32_t columns = min(8, width - 8 * tile);",
        "const int32_t columns = FAULT ? 8 : min(8, width - 8 * tile);",
    ),
    (
        "another lane's gradients read for the softmax",
        "      for (int k = lane; k < count; k += C::group) {\n          const T attention",
        "      for (int k = FAULT ? lane ^ 1 : lane; k < count; k += C::group) {\n          const T attention",
    ),
    ("x and y scales swapped", "points.scale_x[i] = scale_x;", "points.scale_x[i] = FAULT ? scale_y : scale_x;"),
    ("deterministic: what is not finite is lost", "    to[i] += T(", "    to[i] = (FAULT ? T(0) : to[i]) + T("),
    (
        "the fourth corner left out",
        "for (int c = 0; c < 4; ++c) mask |=",
        "for (int c = 0; c < (FAULT ? 3 : 4); ++c) mask |=",
    ),
    *(
        (f"combined: no barrier: {what}", f"__syncthreads();  // {what}", f"if (!FAULT) __syncthreads();  // {what}")
        for what in ("nobody reads", "counts are whole", "slots have their places", "contributions are sorted")
    ),
    (
        "combined: what found no slot is forgotten",
        "if (entered[i][c] == kNowhere) continue;",
        "if (entered[i][c] == kNowhere || (FAULT && (entered[i][c] & 0xffffu) == kSlots)) continue;",
    ),
    (
        "combined: what found no slot is taken for one token",
        "rank == 0 || at == kSlots ? id",
        "rank == 0 || (!FAULT && at == kSlots) ? id",
    ),
    (
        "combined: two tokens in one slot",
        "if (found == -1 || found == token) return int(at);",
        "if (FAULT || found == -1 || found == token) return int(at);",
    ),
    (
        "combined: the table as the round before left it",
        "        clear(rows);\n        T* grad_base",
        "        if (!FAULT) clear(rows);\n        T* grad_base",
    ),
    (
        "combined: counted without an atomic addition",
        "unsigned(atomicAdd(&rows.count[at], 1))",
        "unsigned(FAULT ? rows.count[at]++ : atomicAdd(&rows.count[at], 1))",
    ),
    (
        "combined: the last run of a share is lost",
        "  if (id != kNowhere) leave();",
        "  if (!FAULT && id != kNowhere) leave();",
    ),
    (
        "through the heads: every other run left out",
        "int64_t(gridDim.y - 1) * (through ? kHeads : 1)",
        "int64_t(gridDim.y - (FAULT ? 0 : 1)) * (through ? kHeads : 1)",
    ),
]


def plant(text: str) -> str:
    """The kernels with all of FAULTS, each waiting for its number."""
    for number, (name, old, new) in enumerate(FAULTS, 1):
        if text.count(old) != 1:
            raise Untranslated(f"the fault {name!r} no longer fits the kernels: {text.count(old)} times {old!r}")
        text = text.replace(old, new.replace("FAULT", f"(emu::fault == {number})"))
    return text


def translate(text: str, name: str) -> str:
    """One source, cuda.cu or cuda_kernels.cuh, as C++."""
    for array in _WIDE_READ.findall(text):
        declared = re.findall(rf"^ *(.*)\b{array}\[\d+\];", text, re.M)
        if not all(line.startswith("alignas(16)") for line in declared):
            raise Untranslated(f"{name}: the array {array} is accessed 16 bytes at a time and not alignas(16)")
    column = 2 if name == "cuda.cu" else 3
    for word in _WORDS:

        def replaced(match: re.Match[str], by: str = word[1]) -> str:
            return match.expand(by) + "\n" * match[0].count("\n")  # lines keep their numbers

        text, count = re.subn(word[0], replaced, text, flags=re.S)
        if count != word[column] and not (word[column] is None and count):
            raise Untranslated(f"{name}: {count} times {word[0]!r}, expected {word[column] or 'some'}")
    number = 0

    def shared(match: re.Match[str]) -> str:
        nonlocal number
        number += 1
        kind = f"Shared{number}"
        place = f"emu::shared({number - 1}, sizeof({kind}), alignof({kind}))"
        return f"typedef {match[1]} {kind}{match[3] or ''}; auto& {match[2]} = *static_cast<{kind}*>({place});"

    text = re.sub(r"__shared__ ([\w<>: ]+) (\w+)(\[[^;\n]+\])?;", shared, text)
    for left in ("__shared__", "asm ", "asm(", "<<<", "cuda_runtime", "__constant__", "cooperative_groups"):
        if left in text:
            raise Untranslated(f"{name}: {left.strip()!r} in a form that is not translated")
    if number > 32:
        raise Untranslated(f"{name}: {number} shared arrays")
    return f'#line 1 "{name}"\n{text}'


def write(folder: Path, sources: Path = SOURCES, faults: bool = False) -> None:
    """The translated sources in `folder`, those with planted faults if asked for."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in AS_THEY_ARE:
        (folder / name).write_text((sources / name).read_text())
    kernels = (sources / "cuda_kernels.cuh").read_text()
    (folder / "cuda_kernels.cuh").write_text(translate(plant(kernels) if faults else kernels, "cuda_kernels.cuh"))
    (folder / "cuda.cpp").write_text(translate((sources / "cuda.cu").read_text(), "cuda.cu"))


def compile_(arguments: list[str], folder: Path) -> None:
    """One call of g++; its first errors become the exception's text."""
    result = subprocess.run(["g++", *COMMON, *arguments], cwd=folder, capture_output=True, text=True, check=False)
    if result.returncode:
        errors = [line for line in result.stderr.splitlines() if "error" in line]
        text = "\n".join(errors[:5] or [result.stderr[-500:]])
        raise Untranslated(f"g++ does not take the translated sources:\n{text}")


def library(folder: Path, torch_folder: Path, target: Path, arch: int = 900) -> None:
    """The operator for torch's CPU tensors, at `target`; kernels as they are for `arch` (900: sm_90)."""
    write(folder)
    ending = '\nextern "C" DETR_EXPORT const char* detr_family_cpu_instructions() { return "emulated"; }\n'
    (folder / "torch.cpp").write_text('#include "cuda.cpp"' + ending)
    flags = [*OPTIMISED, "-fPIC", "-shared", f"-DDETR_EMULATED_ARCH={arch}", '-DDETR_FAMILY_ARCHES="9.0"']
    flags += [f"-I{folder}", f"-I{HERE}", f"-I{torch_folder / 'include'}", "-DTORCH_TARGET_VERSION=0x020a000000000000"]
    links = [f"-L{torch_folder / 'lib'}", "-Wl,--no-as-needed", "-ltorch", "-ltorch_cpu"]
    compile_([*flags, "torch.cpp", str(HERE / "cuda_on_cpu.cpp"), *links, "-o", str(target)], folder)


def random_check(folder: Path, mode: str, faults: bool = False, arch: int = 900) -> Path:
    """The program random_check under one of SANITIZERS."""
    write(folder, faults=faults)
    for header in (
        *(f"torch/csrc/stable/{name}.h" for name in ("accelerator", "library", "ops", "tensor")),
        "torch/headeronly/core/ScalarType.h",
        "torch/headeronly/util/Exception.h",
    ):
        (folder / header).parent.mkdir(parents=True, exist_ok=True)
        (folder / header).write_text('#include "torch_on_cpu.h"\n')
    flags = SANITIZERS[mode]
    common = [f"-DDETR_EMULATED_ARCH={arch}", '-DDETR_FAMILY_ARCHES="9.0"', f"-I{folder}", f"-I{HERE}"]
    # the scheduler tells the thread sanitizer itself what orders what
    scheduler = ["-fno-sanitize=thread"] if mode == "thread" else []
    compile_([*flags, *common, *scheduler, "-c", str(HERE / "cuda_on_cpu.cpp"), "-o", "scheduler.o"], folder)
    compile_([*flags, *common, str(HERE / "random_check.cpp"), "scheduler.o", "-o", "random_check"], folder)
    return folder / "random_check"
