"""Flags and KEY VALUE pairs on one command line, in any order."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import pytest

from detr_family.analysis import command_line as analysis
from detr_family.commands import data_check, demo
from detr_family.engine import processes

PAIRS = ["OUTPUT_DIR", "out", "SOLVER.BASE_LR", "-0.5", "MODEL.DETR.FREEZE", "-x", "SEED", "-1"]
Parser = Callable[[], argparse.ArgumentParser]


@pytest.mark.parametrize("place", range(0, len(PAIRS) + 1, 2))
def test_train_nets_flags_are_found_between_and_after_the_pairs(place: int) -> None:
    flags = ["--resume", "--num-gpus", "2", "--eval-only", "--machine-rank=3", "--local_rank=0", "--dist-u", "auto"]
    args = processes.argument_parser().parse_args(["--config-file", "x.yaml", *PAIRS[:place], *flags, *PAIRS[place:]])
    assert (args.config_file, args.resume, args.eval_only) == ("x.yaml", True, True)
    assert (args.num_gpus, args.machine_rank, args.local_rank, args.dist_url) == (2, 3, 0, "auto")
    assert args.opts == PAIRS


@pytest.mark.parametrize("last", [["--resume"], ["--eval-only"], ["--num-gpus", "2"]], ids=str)
def test_one_flag_last_as_the_pages_print_it(last: list[str]) -> None:
    args = processes.argument_parser().parse_args(["--config-file", "x.yaml", "OUTPUT_DIR", "out", *last])
    assert args.opts == ["OUTPUT_DIR", "out"]
    assert (args.resume, args.eval_only, args.num_gpus) == (
        last == ["--resume"], last == ["--eval-only"], 2 if len(last) == 2 else 1
    )  # fmt: skip


@pytest.mark.parametrize(
    ("parser", "flags", "expected"),
    [
        (lambda: data_check.parser(), ["--train", "a.json", "images", "--no-pictures"],
         {"train": ["a.json", "images"], "no_images": True}),
        (lambda: demo.parser(), ["--config-file", "c.yaml", "--input", "a.jpg", "b.jpg", "--output", "out"],
         {"config_file": "c.yaml", "input": ["a.jpg", "b.jpg"], "output": Path("out")}),
        (analysis.parser, ["--config-file", "c.yaml", "--output", "out", "--untrained"],
         {"config_file": "c.yaml", "output": Path("out"), "untrained": True}),
    ],
    ids=["check_dataset", "demo", "analysis"],
)  # fmt: skip
def test_the_other_commands_too(parser: Parser, flags: list[str], expected: dict[str, object]) -> None:
    if parser is analysis.parser:
        orders = [["layers", *PAIRS, *flags], ["layers", *PAIRS[:4], *flags, *PAIRS[4:]]]
    else:
        opts = [] if "a.json" in flags else ["--opts"]
        orders = [[*opts, *PAIRS, *flags], [*flags, *opts, *PAIRS]]
        orders += [[*flags[:2], *opts, *PAIRS, *flags[2:]]] if opts else []
    for order in orders:
        args = parser().parse_args(order)
        assert args.opts == PAIRS, order
        assert {key: getattr(args, key) for key in expected} == expected


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["OUTPUT_DIR", "out", "--resum-it"], "unrecognized arguments: --resum-it; similar: --resume"),
        (["OUTPUT_DIR", "--resume"], "OUTPUT_DIR has no value before --resume"),
        (["--nonsense", "OUTPUT_DIR", "out"], "unrecognized arguments: --nonsense"),
        (["OUTPUT_DIR", "out", "--num-gpus"], "--num-gpus: expected 1 argument"),
        (["--config_file", "x", "SEED", "1"], "unrecognized arguments: --config_file; similar: --config-file"),
        (["SEED", "1", "OUTPUT_DIR=out"], "give KEY VALUE pairs with a blank between, OUTPUT_DIR out"),
        (["--resume", "True", "SEED", "1"], "--resume: it takes no value, 'True'"),
        (["SEED", "1", "--resume=1"], "--resume: it takes no value, '1'"),
        (["SEED", "1", "\u2014resume"], "begins with a long dash"),
        (["--opts", "SEED", "1"], "KEY VALUE pairs stand here without it"),
    ],
    ids=str,
)
def test_what_is_no_flag_is_told(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        processes.argument_parser().parse_args(arguments)
    assert ended.value.code == 2 and message in capsys.readouterr().err


def test_two_dashes_end_the_flags_as_in_any_command() -> None:
    args = processes.argument_parser().parse_args(["--config-file", "x", "--", "SEED", "1"])
    assert (args.config_file, args.opts) == ("x", ["SEED", "1"])
