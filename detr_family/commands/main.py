"""`detr-family COMMAND ...`, one console command with the scripts of a checkout as its subcommands."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

# What each runs, as a script whose command line it reads itself.
COMMANDS = {
    "train": ("detr_family.commands.train:command", "train or evaluate a detector (train_net.py)"),
    "demo": ("detr_family.commands.demo:command", "find objects in images and videos (demo.py)"),
    "predict": ("detr_family.commands.predict:command", "the same for any number, over processes (tools/predict.py)"),
    "export": ("detr_family.commands.export_model:command", "write a detector as ONNX ... (tools/export_model.py)"),
    "check-dataset": ("detr_family.commands.data_check:command", "look at a dataset (tools/check_dataset.py)"),
    "convert-dataset": ("detr_family.commands.convert_dataset:command", "any dataset as COCO files"),
    "convert-checkpoint": ("detr_family.commands.convert_checkpoint:command", "weights as another format"),
    "zoo": ("detr_family.model_zoo.listing:main", "list configurations and published weights"),
    "analysis": ("detr_family.analysis.command_line:main", "the papers' tables and figures over a model and data"),
    "complexity": ("detr_family.benchmarks.complexity:main", "parameters and GFLOPs of configurations"),
    "env": ("detr_family.collect_env:main", "what is installed, and which operator is native"),
}


def usage() -> str:
    """What there is."""
    lines = [f"  {name:18} {text}" for name, (_, text) in COMMANDS.items()]
    return "\n".join(["usage: detr-family COMMAND ... (detr-family COMMAND --help says more)", "", *lines])


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        arguments: by default the command line's.

    Returns:
        The exit status: the command's, or 2 where there is none of that name.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(usage())
        return 0 if arguments else 2
    name, rest = arguments[0], arguments[1:]
    if name not in COMMANDS:
        print(f"detr-family: there is no command {name!r}\n\n{usage()}", file=sys.stderr)
        return 2
    module, function = COMMANDS[name][0].split(":")
    before = sys.argv
    sys.argv = [f"detr-family {name}", *rest]  # what help and messages call the command
    try:
        status = getattr(importlib.import_module(module), function)()
    finally:
        sys.argv = before
    return status if isinstance(status, int) else 0
