"""Attention drawn where it is: tokens under points, maps that sum to one, messages where nothing is to be seen."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import tiny
from PIL import Image

from detr_family.analysis import attention, loading
from detr_family.analysis.attention_weights import DenseCall
from detr_family.analysis.command_line import main


@pytest.mark.parametrize("name", tiny.DETECTORS)
def test_command(name: str, work: Any) -> None:
    written = work.call("attention", name, "--point", "0.2,0.3", "--point", "0.9,0.9", "--score", "0", "--objects", "3")
    assert [p.name for p in written if p.suffix == ".png"] == ["attention_encoder.png", "attention_decoder.png"]
    data = json.loads(written[-1].read_text())
    assert len(data["encoder"]) == 2 and data["decoder"][0]["class"] in ("circle", "square", "triangle")
    assert len({look["query"] for look in data["decoder"]}) == 3  # each query once, whatever classes it speaks for
    for look in (*data["encoder"], *data["decoder"]):
        assert np.sum(look.get("attention", look.get("weights"))) == pytest.approx(1, abs=1e-3)


def test_points_are_on_the_tokens_that_they_lie_on(work: Any) -> None:
    cfg = loading.load_cfg(work.config("DETR"))
    model = loading.load_detector(cfg, untrained=True)
    Image.new("RGB", (96, 64)).save(work.folder / "mine.png")
    looks, _ = attention.looks_of(model, loading.choose_image(cfg, str(work.folder / "mine.png")))
    assert looks.grids == [(4, 6, 16.0, 16.0)] and isinstance(looks.encoder, DenseCall)
    assert looks.token((0, 0)) == 0 and looks.token((0.5, 0)) == 3 and looks.token((0.99, 0.3)) == 11
    assert looks.token((1.0, 1.0)) == 23
    assert attention.heat_map(looks, looks.encoder, 5).shape == (4, 6)


def test_nothing_found_is_told_and_drawn(work: Any, capsys: pytest.CaptureFixture[str]) -> None:
    written = work.call("attention", "DABDETR", "--score", "0.999")
    assert "nothing scores 0.999 or more, the best" in capsys.readouterr().out
    data = json.loads(written[-1].read_text())
    assert data["decoder"] == [] and data["points"] == [[0.5, 0.5]]


def test_without_encoder_layers_the_decoder_is_drawn(work: Any, capsys: pytest.CaptureFixture[str]) -> None:
    written = work.call("attention", "DETR", "--untrained", opts=("MODEL.DETR.ENC_LAYERS", "0"))
    assert "no encoder layer" in capsys.readouterr().out
    assert [p.stem for p in written] == ["attention_decoder", "attention_decoder", "attention"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--point", "0.5"), "'0.5' is no x,y"),
        (("--point", "0.5,1.5"), "outside of the image"),
        (("--layer", "7"), "--layer 7: the encoder has layers 0 to 0"),
        (("--image", "none.png"), "there is no image 'none.png'"),
    ],
)
def test_mistakes(arguments: tuple[str, ...], message: str, work: Any) -> None:
    with pytest.raises(SystemExit, match=message):
        work.call("attention", "DETR", *arguments)


def test_a_module_that_cannot_be_imported_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--import", "no_such_module", "attention", "--config-file", "x.yaml"])
    assert "no_such_module cannot be imported" in capsys.readouterr().err
