"""Configurations and weights by name."""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch
from detectron2.utils.file_io import PathManager
from serving import serving

from detr_family import model_zoo
from detr_family.checkpoint import DETRCheckpointer
from detr_family.config import config_names, find_config, load_config
from detr_family.config.files import plain_name
from detr_family.inference import Predictor
from detr_family.model_zoo import listing, weights
from detr_family.model_zoo.weights import TABLE, Checkpoint, backbones, checkpoints

ROOT = Path(__file__).resolve().parents[2]


def test_a_configuration_by_name_from_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    file = model_zoo.get_config_file("dn_detr_r50")
    assert file == model_zoo.get_config_file("dn_detr_r50.yaml") and os.path.isabs(file)
    assert load_config("dn_detr_r50") == load_config(file) == model_zoo.get_config("dn_detr_r50")
    assert load_config("dn_detr_r50@transformers").MODEL.META_ARCHITECTURE == "DNDETR"
    assert {p.stem for p in (ROOT / "configs").glob("*.yaml") if "Base" not in p.name} <= set(config_names())


def test_a_file_wins_over_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("detr_r50.yaml").write_text("MODEL: {META_ARCHITECTURE: DINO}")
    assert load_config("detr_r50.yaml").MODEL.META_ARCHITECTURE == "DINO"
    assert load_config("detr_r50").MODEL.META_ARCHITECTURE == "DETR"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("detr_r5", "there is no config file 'detr_r5', and no configuration.*similar: detr_r50"),
        ("configs/dn_detr_r5.yaml", "similar: dn_detr_r50"),
        ("../secret", "there is no config file '../secret'"),
    ],
)
def test_a_wrong_name(name: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match=message):
        model_zoo.get(name)


def test_addresses_are_those_of_the_table() -> None:
    assert model_zoo.get_checkpoint_url("detr_r50.yaml") == "https://dl.fbaipublicfiles.com/detr/detr-r50-e632da11.pth"
    assert model_zoo.get_checkpoint_url("detr_r50@transformers") == "hf://facebook/detr-resnet-50"
    cfg = model_zoo.get_config("detr_r101", trained=True)
    assert cfg.MODEL.WEIGHTS == "https://dl.fbaipublicfiles.com/detr/detr-r101-2c7b67e5.pth"
    assert model_zoo.get_config("detr_r101").MODEL.WEIGHTS != cfg.MODEL.WEIGHTS


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("dn_detr_r50", r"have them in https://drive\.google.* cannot fetch: .*name the file.*: detrex/dn_detr_r50"),
        ("detr_quickstart", "no weights of 'detr_quickstart' are known to be published"),
        ("detr_r51", r"'detr_r51' is no file, and no weights of that name.*similar: detr_r50"),
        ("detrex/dab_detr_r101_dc5", "no address is known"),
    ],
)
def test_weights_without_an_address(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        model_zoo.get_checkpoint_url(name)
    with pytest.raises(ValueError, match=message):
        DETRCheckpointer(tiny.build("DETR")).load(name)


def test_the_table_is_whole() -> None:
    entries = list(checkpoints())
    assert len(entries) == 123 and len({entry.name for entry in entries}) == 123 and len(list(backbones())) == 22
    for entry in (*entries, *backbones()):
        assert re.match(r"https://|hf://", entry.address) or (not entry.address and entry.note), entry
        assert entry.source and entry.format, entry
    assert all(entry.detector and entry.backbone for entry in entries)
    assert sum(entry.fetchable for entry in entries) > 80
    assert set(json.loads(TABLE.read_text())["checkpoints"][0]) <= set(Checkpoint.__dataclass_fields__)


def test_weights_named_as_ours_go_into_that_architecture() -> None:
    known, checked = set(config_names()), 0
    for entry in checkpoints():
        if plain_name(entry.name) not in known:
            continue
        cfg = load_config(entry.name)
        name = cfg.MODEL.META_ARCHITECTURE.removeprefix("TwoStage")  # a class of its own only where detrex has one
        assert re.sub("[ -]", "", entry.detector).startswith(name), entry
        assert name == cfg.MODEL.META_ARCHITECTURE or "two-stage" in entry.detector, entry
        assert ("DC5" in entry.backbone) == (cfg.MODEL.RESNETS.RES5_DILATION == 2), entry
        if entry.backbone.startswith("R1"):
            assert cfg.MODEL.RESNETS.DEPTH == 101, entry
        if name == "DABDETR" and entry.format == "transformers":  # whose config.json is asked for the temperature
            assert cfg.MODEL.DETR.INVERSE_SIGMOID_EPS == 1e-5, entry
            temperature = 10.0 if "temperature 10" in entry.note else 20.0
            assert temperature == cfg.MODEL.DETR.SPATIAL_ENCODING.TEMPERATURE, entry
        checked += 1
    assert checked > 30


def test_weights_by_name_are_fetched_and_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """get, MODEL.WEIGHTS and Predictor: the table's name, the loopback's file, a recipe of the test's own."""
    monkeypatch.setenv("FVCORE_CACHE", str(tmp_path / "cache"))
    cfg = tiny.cfg_of("DNDETR")
    cfg.MODEL.DETR.NUM_CLASSES = 3
    recipe = tmp_path / "configs" / "tiny_dn_detr.yaml"
    recipe.parent.mkdir()
    recipe.write_text(cfg.dump())
    monkeypatch.setattr("detr_family.config.files._project_folders", [recipe.parent])
    buffer = io.BytesIO()
    expected = {k: v + 1 for k, v in tiny.build("DNDETR").state_dict().items()}
    torch.save({"model": expected}, buffer)
    with serving() as server:
        server.files["/dn.pth"] = buffer.getvalue()
        row = {"name": "tiny_dn_detr", "format": "detr_family", "backbone": "patches", "detector": "DN-DETR"}
        address = f"{server.address}/dn.pth#sha256={hashlib.sha256(buffer.getvalue()).hexdigest()}"
        monkeypatch.setattr(weights, "_table", lambda: {"checkpoints": [{**row, "address": address}], "backbones": []})
        model = model_zoo.get("tiny_dn_detr", trained=True, device="cpu")
        assert model.training and all(torch.equal(v, expected[k]) for k, v in model.state_dict().items())
        predictor = Predictor.from_config("tiny_dn_detr", "tiny_dn_detr", optimize=False)
        assert torch.equal(predictor.model.state_dict()["refpoint_embed.weight"], expected["refpoint_embed.weight"])
        assert model_zoo.get("tiny_dn_detr").training  # MODEL.WEIGHTS is empty
        with pytest.raises(ValueError, match="does not fit DETR as configured"):
            DETRCheckpointer(tiny.build("DETR"), whole=True).load("tiny_dn_detr")
    assert os.path.isfile(PathManager.get_local_path("zoo://tiny_dn_detr"))


def test_a_project_has_names_too() -> None:
    import projects.deformable  # noqa: F401

    assert "deformable_detr_r50" in config_names()
    assert find_config("deformable_detr_r50").endswith("deformable/configs/deformable_detr_r50.yaml")


def test_the_listing(capsys: pytest.CaptureFixture[str]) -> None:
    assert listing.main(["dn_detr_r50", "dino_focal"]) == 0
    printed = capsys.readouterr().out
    (row,) = [line for line in printed.splitlines() if line.startswith("dn_detr_r50 ")]
    assert row.split() == ["dn_detr_r50", "44.4", "50", "44", "94", "release", "Apache-2.0", "by", "hand"]
    assert re.search(r"detrex/dino_focal_l_3level_4scale \(no configuration here\) .* yes", printed)
    assert len(listing.rows()) >= len(config_names())
    listing.main(["--addresses", "detr_r50@transformers"])
    assert "hf://facebook/detr-resnet-50" in capsys.readouterr().out
    listing.main(["--backbones"])
    assert "swin_large_patch4_window12_384_22k" in capsys.readouterr().out


def test_as_a_module(tmp_path: Path) -> None:
    run = subprocess.run(
        [sys.executable, "-m", "detr_family.model_zoo", "detr_r50"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert not run.returncode and "detr_r50 " in run.stdout, run.stderr
