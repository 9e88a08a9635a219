"""Weights from addresses: fetched once, compared with their checksum, and what is said where that fails."""

from __future__ import annotations

import hashlib
import io
import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
import tiny
import torch
from detectron2.utils.file_io import PathManager
from serving import Server, serving

from detr_family.checkpoint import DETRCheckpointer, downloads
from detr_family.checkpoint.downloads import checksum_of, is_address
from detr_family.checkpoint.formats import read_config
from detr_family.inference import Predictor

PATH = "/weights/detr.pth"


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("FVCORE_CACHE", str(tmp_path / "cache"))
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with serving() as served:
        buffer = io.BytesIO()
        torch.save({"model": {k: v + 1 for k, v in tiny.build("DETR").state_dict().items()}}, buffer)
        served.files[PATH] = buffer.getvalue()
        yield served


def cached(tmp_path: Path) -> list[str]:
    return sorted(p.name for p in (tmp_path / "cache").rglob("*") if p.is_file() and not p.name.endswith(".lock"))


def load(path: str) -> bool:
    """Load into a detector; whether it has what the server has."""
    model = tiny.build("DETR")
    before = model.query_embed.weight.detach().clone()
    DETRCheckpointer(model, whole=True).load(path)
    return torch.equal(model.query_embed.weight, before + 1)


def test_an_address_is_fetched_once(server: Server, tmp_path: Path) -> None:
    sha256 = hashlib.sha256(server.files[PATH]).hexdigest()
    assert load(server.address + PATH)
    assert load(f"{server.address}{PATH}#sha256={sha256}")
    assert load(f"{server.address}{PATH}#sha256={sha256[:8]}")
    assert server.asked == [("GET", PATH)] and cached(tmp_path) == ["detr.pth"]


def test_a_predictor_takes_an_address(server: Server) -> None:
    cfg = tiny.cfg_of("DETR")
    assert Predictor.from_config(cfg, server.address + PATH).model.num_classes == 3


def test_a_download_that_ends_too_early_leaves_nothing_and_starts_anew(server: Server, tmp_path: Path) -> None:
    server.cut[PATH] = 1000
    with pytest.raises(FileNotFoundError, match=r"detr\.pth cannot be fetched \(.*1000 out of \d+ bytes"):
        load(server.address + PATH)
    assert cached(tmp_path) == []
    server.cut.clear()
    assert load(server.address + PATH)


def test_a_wrong_checksum_is_an_error_and_the_file_goes(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ValueError, match=r"sha256 begins with [0-9a-f]{8}, not with 00000000\. The file was removed"):
        load(f"{server.address}{PATH}#sha256=00000000")
    assert cached(tmp_path) == []
    server.files["/weights/detr-r50-e632da11.pth"] = server.files[PATH]
    monkeypatch.setattr(downloads, "HASHED_NAMES", (f"{server.address}/weights/",))
    with pytest.raises(ValueError, match="not with e632da11"):
        load(f"{server.address}/weights/detr-r50-e632da11.pth")
    assert cached(tmp_path) == []


def test_checksums_are_known_from_publishers_names_alone() -> None:
    assert checksum_of("https://dl.fbaipublicfiles.com/detr/detr-r50-e632da11.pth") == "e632da11"
    assert checksum_of("https://download.pytorch.org/models/resnet50-0676ba61.pth") == "0676ba61"
    assert checksum_of("https://example.com/model-20240115.pth") == ""
    with pytest.raises(ValueError, match="'#md5=1' is no checksum"):
        checksum_of("https://example.com/x.pth#md5=1")
    assert is_address("hf://a/b") and is_address("zoo://a") and not is_address("C:/x.pth") and not is_address("a/b")


def test_without_a_network_the_place_for_the_file_is_named(server: Server, tmp_path: Path) -> None:
    with socket.socket() as taken:  # a port where nobody listens
        taken.bind(("127.0.0.1", 0))
        nobody = f"http://127.0.0.1:{taken.getsockname()[1]}{PATH}"
    with pytest.raises(FileNotFoundError, match=r"cannot be fetched \(.*refused\): download it .* put it at") as error:
        load(nobody)
    place = Path(str(error.value).split("put it at ")[1].split(", or name")[0])
    place.parent.mkdir(parents=True, exist_ok=True)
    place.write_bytes(server.files[PATH])
    assert load(nobody)
    with pytest.raises(FileNotFoundError, match=r"cannot be fetched \(HTTP Error 404: Not Found\)"):
        load(f"{server.address}/nothing.pth")


def test_a_file_fetched_is_not_trusted_more_than_one_that_is_here(server: Server) -> None:
    server.files["/bomb.pth"] = b"cos\nsystem\n(S'true'\ntR."
    with pytest.raises(ValueError, match=r"bomb\.pth is not a checkpoint that can be loaded safely"):
        load(f"{server.address}/bomb.pth")


@pytest.fixture
def hub(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Server:
    """The server as the Hub with a model tiny/detr, whose only file is pytorch_model.bin."""
    constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.setenv("HF_ENDPOINT", server.address)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    sha256 = hashlib.sha256(server.files[PATH]).hexdigest()
    file = "/tiny/detr/resolve/main/pytorch_model.bin"
    server.files[file] = server.files[PATH]
    server.headers[file] = {"ETag": f'"{sha256}"', "X-Repo-Commit": "c" * 40}
    server.headers["/tiny/detr/resolve/main/model.safetensors"] = {"X-Error-Code": "EntryNotFound"}
    for name in ("best.pth", "config.json"):
        server.headers[f"/tiny/detr/resolve/main/{name}"] = {"X-Error-Code": "EntryNotFound"}
    return server


def test_a_model_of_the_hub(hub: Server, tmp_path: Path) -> None:
    assert load("hf://tiny/detr") and load("hf://tiny/detr/pytorch_model.bin")
    assert sum(method == "GET" for method, _ in hub.asked) == 1
    assert list((tmp_path / "hub").rglob("pytorch_model.bin"))
    with pytest.raises(FileNotFoundError, match=r"tiny/detr on the Hub has no best\.pth: name a file"):
        load("hf://tiny/detr/best.pth")


def test_the_settings_of_a_model_of_the_hub_come_along(hub: Server) -> None:
    file = "/tiny/detr/resolve/main/config.json"
    hub.files[file] = b'{"model_type": "detr"}'
    hub.headers[file] = {"ETag": '"1234"', "X-Repo-Commit": "c" * 40}
    weights = PathManager.get_local_path("hf://tiny/detr")
    assert read_config(os.path.dirname(weights)) == {"model_type": "detr"}


def test_the_hub_out_of_reach(hub: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(FileNotFoundError, match=r"hf://tiny/other cannot be fetched \(.*name your copy in place"):
        load("hf://tiny/other")
    with pytest.raises(ValueError, match="hf://tiny is no address on the Hub"):
        load("hf://tiny")


def test_a_model_that_torchvision_has_not() -> None:
    with pytest.raises(ValueError, match="torchvision://resnet51: torchvision has no ImageNet weights"):
        PathManager.get_local_path("torchvision://resnet51")
