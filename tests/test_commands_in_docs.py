"""Every command that README and docs print is one that its program takes: flags, keys, values and files are there.

What a command does is run by the tests of its program; here stands that it is written right. One that cannot be looked
at so has its reason in OTHERS.
"""

from __future__ import annotations

import importlib
import re
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest
from printed_commands import COMMANDS, ROOT

from detr_family.analysis import command_line as analysis
from detr_family.commands import convert_checkpoint, convert_dataset, data_check, demo, export_model, predict
from detr_family.config import load_config
from detr_family.engine.processes import argument_parser
from detr_family.inference.exported import is_exported

# First words of commands that are not ours to check, and why.
OTHERS = {
    "pip": "needs the network",
    "uv": "needs the network",
    "git": "needs the network",
    "cd": "moves",
    "export": "sets a variable",
    "uvicorn": "starts a server: projects/serving/tests/test_serving.py does",
    "curl": "asks a server: the same",
}


def check_config(path: str, opts: list[str]) -> None:
    """The configuration can be read with these keys; one of the user's own stands for any of ours."""
    if path.isupper() or path.startswith(("output/", "my")):
        path = "configs/dino_r50_4scale.yaml"
    load_config(path, [*[word for word in opts if word != "..."], "MODEL.DEVICE", "cpu"])


def check_training(words: list[str]) -> None:
    args = argument_parser().parse_args(words)
    check_config(args.config_file, args.opts)


def check_analysis(words: list[str]) -> None:
    args = analysis.parser().parse_args(words)
    configs = getattr(args, "config_file", None) or []
    for config in [configs] if isinstance(configs, str) else configs:
        check_config(config, getattr(args, "opts", []))
    if getattr(args, "spec", None):
        assert (ROOT / args.spec).is_file(), args.spec


def check_demo(words: list[str]) -> None:
    args = demo.parser().parse_args(words)
    assert args.config_file or is_exported(args.weights)
    if args.config_file:
        check_config(args.config_file, args.opts)


def check_predict(words: list[str]) -> None:
    args = predict.parser().parse_args(words)
    assert args.config_file or is_exported(args.weights) or args.merge
    if args.config_file:
        check_config(args.config_file, args.opts)


def check_export(words: list[str]) -> None:
    args = export_model.parser().parse_args(words)
    check_config(args.config_file, args.opts)


def check_checkpoint(words: list[str]) -> None:
    args = convert_checkpoint.parser().parse_args(words)
    check_config(args.config_file, args.opts)


def check_data(words: list[str]) -> None:
    data_check.parser().parse_args(words)


def check_conversion(words: list[str]) -> None:
    convert_dataset.parser().parse_args(words)


def check_make(words: list[str]) -> None:
    targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert words[0] in targets, f"the Makefile has {targets}"


def has_help(script: str) -> Callable[[list[str]], None]:
    """For a script whose parser is its own: the flags are in its source."""

    def check(words: list[str]) -> None:
        source = (ROOT / script).read_text()
        for word in words:
            if word.startswith("--"):
                assert f'"{word}"' in source, f"{script} has no {word}"

    return check


PROGRAMS: dict[str, Callable[[list[str]], None]] = {
    "train_net.py": check_training,
    "projects/deformable/train_net.py": check_training,
    "demo.py": check_demo,
    "tools/predict.py": check_predict,
    "tools/check_dataset.py": check_data,
    "tools/convert_dataset.py": check_conversion,
    "tools/export_model.py": check_export,
    "tools/convert_checkpoint.py": check_checkpoint,
    "-m detr_family.analysis": check_analysis,
    "tools/gpu_check.sh": has_help("detr_family/benchmarks/gpu_check.py"),  # which it ends with
    "make": check_make,
}


def check(command: str) -> None:
    words = shlex.split(command)
    while words and re.fullmatch(r"[A-Z_]+=\S*", words[0]):  # a variable of the environment
        words.pop(0)
    if words[0] in OTHERS:
        return
    if re.fullmatch(r"[A-Z_]+(\.[A-Z_]+)+", words[0]):  # a key with its value, for the end of a command
        return check_config("configs/detr_r50.yaml", words)
    if words[0] == "torchrun":
        words = ["python", *words[next(i for i, word in enumerate(words) if word.endswith(".py")) :]]
    if words[0] == "python":
        words.pop(0)
    if words[:1] == ["-m"]:
        words = [" ".join(words[:2]), *words[2:]]
    program, rest = words[0], words[1:]
    if program in PROGRAMS:
        PROGRAMS[program](rest)
    elif program.startswith("-m detr_family"):
        name = program.removeprefix("-m ")
        module = importlib.import_module(name)
        has_help(str(Path(str(module.__file__)).relative_to(ROOT)))(rest)
    else:
        assert (ROOT / program).is_file(), f"{command}: there is no {program}, and no reason in OTHERS"
        has_help(program)(rest)


@pytest.mark.parametrize(("page", "command"), COMMANDS, ids=[f"{p.name}-{i}" for i, (p, _) in enumerate(COMMANDS)])
def test_it_is_a_command(page: Path, command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    if "projects/deformable" in command or "projects.deformable" in command:
        importlib.import_module("projects.deformable")
    try:
        check(command)
    except SystemExit as error:
        pytest.fail(f"{page.name}: {command}: exit status {error.code}")


@pytest.mark.parametrize(
    "command",
    [
        "python train_net.py --config-file configs/detr_r50.yaml --resumes",
        "python train_net.py --config-file configs/detr_r51.yaml",
        "python train_net.py --config-file configs/detr_r50.yaml SOLVER.BASE_LRR 1",
        "python demo.py --config-file output/a/config.yaml --wait a.pth --input images",
        "python -m detr_family.analysis matchin",
        "python tools/nothing.py",
        "make nothing",
    ],
)
def test_the_check_sees_what_is_wrong(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    with pytest.raises((SystemExit, ValueError, FileNotFoundError, AssertionError)):
        check(command)
