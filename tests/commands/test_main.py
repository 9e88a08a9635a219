"""`detr-family COMMAND ...`."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest
from PIL import Image

from detr_family.commands.main import COMMANDS, main


def test_every_command_is_there() -> None:
    for target, _ in COMMANDS.values():
        module, function = target.split(":")
        assert callable(getattr(importlib.import_module(module), function))


def test_help_and_a_wrong_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    printed = capsys.readouterr().out
    assert all(name in printed for name in COMMANDS)
    assert main([]) == 2
    assert main(["trian"]) == 2 and "there is no command 'trian'" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    assert "usage: detr-family train" in capsys.readouterr().out


def test_commands_take_names_of_configurations(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (40, 30)).save("a.png")
    assert main(["zoo", "detr_r101_dc5"]) == 0 and "detr-r101" not in capsys.readouterr().out
    demo = ["demo", "--input", "a.png", "--config-file"]
    assert main([*demo, "detr_r5"]) == 2 and "similar: detr_r50" in capsys.readouterr().err
    assert main([*demo, "detr_r50", "--weights", "detr_r5"]) == 2
    assert "no weights of that name are in the model zoo; similar: detr_r50" in capsys.readouterr().err
    assert main(["check-dataset", "--config-file", "dn_detr_r50", "DATASETS.TRAIN", "()", "DATASETS.TEST", "()"]) == 2
    assert "No dataset to check" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["train", "--config-file", "dn_detr_r5"])
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("detr-family train: there is no config file 'dn_detr_r5'")
