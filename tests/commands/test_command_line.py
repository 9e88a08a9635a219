"""What the commands share: which errors are the user's."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from torch._utils import ExceptionWrapper

from detr_family.analysis import command_line as analysis
from detr_family.commands import convert_checkpoint, convert_dataset, data_check, demo, export_model, predict, train
from detr_family.data.images import ImageError, read_image
from detr_family.engine import processes
from detr_family.errors import UserError, message_of, mistakes


def test_errors_of_files_and_settings_are_the_users() -> None:
    with pytest.raises(UserError, match="SEED is -3"), mistakes():
        raise ValueError("SEED is -3")
    with pytest.raises(UserError, match="No such file or directory: 'nowhere'"), mistakes():
        open("nowhere").close()
    with pytest.raises(ImageError), mistakes():
        raise ImageError("stays what it is")


def test_a_bug_keeps_its_traceback() -> None:
    with pytest.raises(ValueError, match="too many values"), mistakes():
        _height, _width = (3, 4, 5)
    with pytest.raises(ValueError, match="invalid literal"), mistakes():
        int("x")
    with pytest.raises(RuntimeError), mistakes():
        raise RuntimeError("shapes differ")


def test_a_data_workers_traceback_is_left_out() -> None:
    try:
        read_image("nowhere.png", "RGB")
    except ImageError as error:
        wrapped, alone = ExceptionWrapper(where="in DataLoader worker process 0"), str(error)
    with pytest.raises(ImageError, match="Original Traceback") as caught:
        wrapped.reraise()
    assert message_of(caught.value) == alone and "nowhere.png" in alone


WRITERS: dict[str, tuple[Callable[[Sequence[str]], object], list[str], str]] = {
    "demo": (demo.command, ["--config-file", "c", "--input", "a.jpg", "--output"], "folder"),
    "predict": (predict.command, ["--config-file", "c", "--input", "a.jpg", "--output"], "folder"),
    "convert-dataset": (convert_dataset.command, ["data", "--output"], "folder"),
    "analysis": (analysis.main, ["summary", "--config-file", "c", "--output"], "folder"),
    "train": (train.command, ["--config-file", "detr_r50", "OUTPUT_DIR"], "folder"),
    "evaluate": (train.command, ["--config-file", "detr_r50", "--eval-only", "OUTPUT_DIR"], "folder"),
    "transformers": (convert_checkpoint.command, ["--config-file", "c", "--output"], "folder"),
    "pth": (convert_checkpoint.command, ["--config-file", "c", "--format", "pth", "--output"], "file"),
    "export": (export_model.command, ["--config-file", "c", "--format", "onnx", "--output"], "file"),
    "check-dataset --sheet": (data_check.command, ["--sheet"], "file"),
    "check-dataset --json": (data_check.command, ["--json"], "file"),
}


@pytest.mark.parametrize("name", WRITERS)
def test_a_file_in_a_folders_place_is_told_before_the_work(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, arguments, kind = WRITERS[name]
    file = tmp_path / "file"
    file.write_text("")
    wrong = [file, file / "below"] if kind == "folder" else [tmp_path, file / "below.png"]
    for path in wrong:
        try:
            status = run([*arguments, str(path)])
        except SystemExit as ended:
            status = ended.code
        told = f"{status}\n{capsys.readouterr().err}"
        assert status and (f"{path} is a" in told or f"{path} cannot be made: {file} is a file" in told)


def test_formats_that_a_command_does_not_write_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert convert_checkpoint.command(["--config-file", "detr_r50", "--output", str(tmp_path / "x.onnx")]) == 2
    assert ".onnx is none of this command's formats" in capsys.readouterr().err
    for wrong, message in (
        (["--sheet", str(tmp_path / "sheet.txt")], "does not end as an image does"),
        (["--sheet", str(tmp_path / "sheet.png"), "--count", "-4"], "--count -4"),
        (["--sheet", str(tmp_path / "sheet.png"), "--seed", "-1"], "--seed -1"),
    ):
        assert data_check.command(wrong) == 2
        assert message in capsys.readouterr().err


def test_an_export_to_be_evaluated_needs_its_dataset_first(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = ["--config-file", "detr_r50", "--format", "onnx", "--output", str(tmp_path / "x.onnx"), "--evaluate"]
    assert export_model.command([*given, "--opts", "DATASETS.TEST", "()"]) == 1
    assert "--evaluate needs a dataset" in capsys.readouterr().err
    assert export_model.command([*given, "--opts", "DATASETS.TEST", "('nix',)"]) == 1
    assert "names 'nix', which is no registered dataset" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--num-gpus", "-1"], "--num-gpus is -1"),
        (["--num-machines", "0"], "--num-machines 0"),
        (["--num-machines", "2", "--machine-rank", "2"], "--machine-rank is 2; of 2 machines"),
        (["--num-machines", "2", "--dist-url", "auto"], "--dist-url auto is for one machine"),
    ],
    ids=str,
)
def test_counts_that_cannot_be_do_not_wait_for_processes(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def main(_: argparse.Namespace) -> None:
        raise AssertionError("it ran")

    with pytest.raises(SystemExit) as ended:
        processes.launch(main, processes.argument_parser().parse_args(arguments))
    assert ended.value.code == 2 and message in capsys.readouterr().err
