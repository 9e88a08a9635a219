"""What a bug report needs, in a few lines: python -m detr_family.collect_env

torch, CUDA, Detectron2, and which paths multi-scale deformable attention and convolutions take here and why.
"""

import platform
import sys
from importlib.metadata import PackageNotFoundError, version

import torch

from detr_family.layers import deformable_attention_ops as ops
from detr_family.layers import outer_products, winograd


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _detectron2() -> str:
    """Detectron2 goes by several names on package registries, so it is asked itself."""
    try:
        import detectron2
    except ImportError as error:
        return f"not importable ({error})"
    return f"{getattr(detectron2, '__version__', 'unknown')}"


def collect_env() -> dict[str, str]:
    """Name -> text, in the order to be read."""
    lines = {
        "python": f"{platform.python_version()} on {platform.system()} {platform.machine()}",
        "detr_family": _version("detr_family"),
        "torch": f"{torch.__version__}, {torch.get_num_threads()} threads",
        "torch's CUDA": torch.version.cuda or "none (a torch for CPUs)",
    }
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            major, minor = torch.cuda.get_device_capability(index)
            lines[f"CUDA device {index}"] = f"{torch.cuda.get_device_name(index)}, {major}.{minor}"
    else:
        lines["CUDA device"] = "none"
    lines["torchvision"] = _version("torchvision")
    lines["detectron2"] = _detectron2()
    lines.update(ops.describe())
    lines["3x3 convolutions on CPU"] = (
        f"without Winograd's in C++: {winograd.missing_reason}" if winograd.missing_reason else "Winograd's in C++"
    )
    lines["gradients of weights on CPU"] = (
        f"torch's alone: {outer_products.missing_reason}" if outer_products.missing_reason else "in C++, too"
    )
    files = {"cpu": ops.library_file("cpu"), "cuda": ops.library_file("cuda"), "winograd": winograd.library_file()}
    files["outer products"] = outer_products.library_file()
    lines.update({f"{kind} library": file for kind, file in files.items() if file})
    devices = ["cpu"] + [f"cuda:{index}" for index in range(torch.cuda.device_count())]
    for name in devices:
        device = torch.device(name)
        reason = ops.missing_reason(device.type, device.index, torch.float32)
        lines[f"path taken on {name}"] = f"pure torch, slow: {reason}" if reason else "native"
    return lines


def main() -> None:
    """Prints collect_env's lines."""
    lines = collect_env()
    width = max(map(len, lines))
    for name, text in lines.items():
        sys.stdout.write(f"{name:{width}}  {text}\n")


if __name__ == "__main__":
    main()
