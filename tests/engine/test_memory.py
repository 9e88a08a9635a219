"""What a training on the CPU frees stays with its process."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

PROGRAM = """
import resource, torch
from detr_family.engine.memory import keep_freed_memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        torch.ones(12_000_000), torch.ones(3_000_000)  # 46 and 11 MiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

first = faults()
print(keep_freed_memory())
faults()
print(faults() < first / 10)
"""

glibc = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")


def run(**variables: str) -> list[str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    command = [sys.executable, "-c", PROGRAM]
    result = subprocess.run(command, env={**environment, **variables}, capture_output=True, text=True, check=True)
    return result.stdout.split()


@glibc
def test_freed_memory_is_used_again() -> None:
    assert run() == ["True", "True"]


@glibc
@pytest.mark.parametrize(
    "said", [{"MALLOC_TRIM_THRESHOLD_": "131072"}, {"GLIBC_TUNABLES": "glibc.malloc.trim_threshold=131072"}]
)
def test_user_decides(said: dict[str, str]) -> None:
    assert run(**said) == ["False", "False"]


@glibc
def test_huge_pages_are_another_matter() -> None:  # docs/dino.md recommends them
    assert run(GLIBC_TUNABLES="glibc.malloc.hugetlb=1") == ["True", "True"]
