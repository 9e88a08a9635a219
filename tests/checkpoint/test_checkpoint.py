"""Which files load, and what is said of those that do not."""

from __future__ import annotations

import argparse
import pickle
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from detectron2.utils.file_io import PathManager
from torch import nn
from torchvision.models import resnet50

from detr_family.checkpoint import DETRCheckpointer
from detr_family.checkpoint.releases import COCO_IDS, convert_released, released_name, resnet_name


class Resnet(nn.Module):
    """A model of a backbone alone, with Detectron2's names."""

    num_classes = 80

    def __init__(self, cfg: CfgNode) -> None:
        super().__init__()
        from detectron2.modeling import build_backbone

        cfg.MODEL.BACKBONE.NAME = "build_torchvision_resnet_backbone"
        cfg.MODEL.RESNETS.OUT_FEATURES = ["res5"]
        cfg.MODEL.RESNETS.STRIDE_IN_1X1 = False
        self.backbone = build_backbone(cfg)


def test_names() -> None:
    assert released_name("backbone.0.body.conv1.weight") == "backbone.stem.conv1.weight"
    assert released_name("backbone.0.body.bn1.running_var") == "backbone.stem.conv1.norm.running_var"
    assert released_name("backbone.0.body.layer4.2.bn3.bias") == "backbone.res5.2.conv3.norm.bias"
    assert released_name("backbone.0.body.layer1.0.downsample.0.weight") == "backbone.res2.0.shortcut.weight"
    assert released_name("backbone.0.body.layer1.0.downsample.1.bias") == "backbone.res2.0.shortcut.norm.bias"
    assert released_name("backbone.1.row_embed.weight") == "position_encoding.row_embed.weight"
    assert released_name("transformer.decoder.norm.bias") == "transformer.decoder.norm.bias"
    assert resnet_name("layer3.5.conv2.weight") == "res4.5.conv2.weight"


def test_coco_rows_are_picked() -> None:
    rows = torch.arange(92.0)
    state = {"class_embed.bias": rows, "label_enc.weight": rows[:, None], "class_embed.weight": rows[:91, None]}
    converted = convert_released(state, num_classes=80)
    assert converted["class_embed.bias"].tolist() == [*COCO_IDS, 91]  # no-object last
    assert converted["label_enc.weight"][:, 0].tolist() == [*COCO_IDS, 91]
    assert converted["class_embed.weight"][:, 0].tolist() == COCO_IDS
    assert COCO_IDS[0] == 1 and COCO_IDS[-1] == 90 and len(COCO_IDS) == 80
    assert convert_released(state, num_classes=91)["class_embed.bias"].equal(rows)


def test_torchvision_resnet_loads(cfg: CfgNode, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(1)
    source = resnet50(weights=None)
    torch.save(source.state_dict(), tmp_path / "resnet50-0676ba61.pth")
    real = PathManager.get_local_path
    asked = []

    def fetch(path: str, *args: object, **kwargs: object) -> str:
        if path.startswith("https://"):
            asked.append(path)
            return str(tmp_path / path.rsplit("/", 1)[-1])
        return real(path, *args, **kwargs)

    monkeypatch.setattr(PathManager, "get_local_path", fetch)
    model = Resnet(cfg)
    DETRCheckpointer(model).load("torchvision://resnet50")
    assert asked and all(x.endswith("/resnet50-0676ba61.pth") for x in asked)
    assert model.backbone.res5[1].conv2.weight.equal(source.layer4[1].conv2.weight)
    assert model.backbone.stem.conv1.norm.bias.equal(source.bn1.bias)


def test_model_zoo_pickle_loads(cfg: CfgNode, tmp_path: Path) -> None:
    model = Resnet(cfg)
    state = {k.removeprefix("backbone."): v.numpy() + 1 for k, v in model.state_dict().items()}
    blob = {"model": state, "__author__": "torchvision", "matching_heuristics": True}
    (tmp_path / "R-50.pkl").write_bytes(pickle.dumps(blob))
    DETRCheckpointer(model).load(str(tmp_path / "R-50.pkl"))
    assert np.array_equal(model.backbone.res3[0].conv1.weight.detach().numpy(), state["res3.0.conv1.weight"])


def test_another_detector_is_refused_before_anything_is_loaded(tmp_path: Path) -> None:
    model = tiny.build("DETR")
    before = {k: v.clone() for k, v in model.state_dict().items()}
    state = {k: v + 1 for k, v in before.items() if not k.startswith("query_embed")}
    state["refpoint_embed.weight"] = torch.zeros(7, 4)
    state["input_proj.bias"] = torch.zeros(9)
    torch.save({"model": state}, tmp_path / "other.pth")
    with pytest.raises(ValueError) as error:
        DETRCheckpointer(model).load(str(tmp_path / "other.pth"))
    for part in (
        "1 missing (query_embed.weight)",
        "1 unexpected (refpoint_embed.weight)",
        "1 of another shape (input_proj.bias (9,) here (16,))",
        "other.pth does not fit DETR",
    ):
        assert part in str(error.value)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_every_key_that_differs_is_in_the_log(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = tiny.build("DETR")
    state = {k: v for k, v in model.state_dict().items() if "decoder" not in k}
    torch.save({"model": state}, tmp_path / "headless.pth")
    with pytest.raises(ValueError, match=r"missing \(.* more\)"):
        DETRCheckpointer(model).load(tmp_path / "headless.pth")
    assert all(k in caplog.text for k in model.state_dict() if "decoder" in k)


def test_what_differs_is_only_logged_when_not_strict(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = tiny.build("DETR")
    state = {k: v + 1 for k, v in model.state_dict().items() if not k.startswith("query_embed")}
    torch.save({"model": state}, tmp_path / "part.pth")
    DETRCheckpointer(model, strict=False).load(str(tmp_path / "part.pth"))
    assert "1 missing (query_embed.weight)" in caplog.text
    assert torch.equal(model.input_proj.bias, state["input_proj.bias"])


def test_another_class_count_is_named_with_its_classes(tmp_path: Path) -> None:
    DETRCheckpointer(tiny.build("DETR", NUM_CLASSES=2), str(tmp_path), class_names=["cat", "dog"]).save("pets")
    with pytest.raises(ValueError, match=r"pets\.pth was trained with.*3 rows there and 4 here.*cat, dog.*NUM_CLASSES"):
        DETRCheckpointer(tiny.build("DETR")).load(str(tmp_path / "pets.pth"))


def test_weights_of_nothing_here_are_refused(cfg: CfgNode, tmp_path: Path) -> None:
    blob = {"model": {"conv9.weight": np.zeros((2, 3), np.float32)}, "__author__": "x", "matching_heuristics": True}
    (tmp_path / "odd.pkl").write_bytes(pickle.dumps(blob))
    with pytest.raises(ValueError, match=r"no weight in .*odd\.pkl belongs"):
        DETRCheckpointer(Resnet(cfg)).load(str(tmp_path / "odd.pkl"))


def test_evaluation_wants_a_whole_detector(cfg: CfgNode, tmp_path: Path) -> None:
    model = Resnet(cfg)
    state = {k.removeprefix("backbone."): v.numpy() for k, v in model.state_dict().items()}
    blob = {"model": state, "__author__": "torchvision", "matching_heuristics": True}
    (tmp_path / "R-50.pkl").write_bytes(pickle.dumps(blob))
    with pytest.raises(ValueError, match=r"R-50\.pkl holds a backbone without a detector"):
        DETRCheckpointer(model, whole=True).load(str(tmp_path / "R-50.pkl"))
    with pytest.raises(ValueError, match=r"MODEL\.WEIGHTS is empty"):
        DETRCheckpointer(model, whole=True).load("")


class Bomb:
    """Touches a file when unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return (Path.touch, (self.path,))


@pytest.mark.parametrize("suffix", [".pth", ".pkl"])
def test_a_malicious_pickle_is_refused(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"bomb{suffix}"
    content = {"model": {"a": Bomb(tmp_path / "exploded")}}
    torch.save(content, path) if suffix == ".pth" else path.write_bytes(pickle.dumps(content))
    with pytest.raises(ValueError, match="is not a checkpoint that can be loaded safely"):
        DETRCheckpointer(tiny.build("DETR")).load(str(path))
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", b"\x80\x02}q\x00.", b"PK\x03\x04 half a zip"], ids=repr)
@pytest.mark.parametrize("suffix", [".pth", ".pkl"])
def test_what_is_not_a_checkpoint_is_named(content: bytes, suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"odd{suffix}"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"odd\{suffix}"):
        DETRCheckpointer(tiny.build("DETR")).load(str(path))


@pytest.mark.parametrize("content", [[1, 2], {"model": {}}, {"model": 5}, torch.zeros(3)], ids=repr)
def test_a_file_without_weights_is_named(content: object, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "odd.pth")
    with pytest.raises(ValueError, match=r"odd\.pth (holds no weights|is not a checkpoint)"):
        DETRCheckpointer(tiny.build("DETR")).load(str(tmp_path / "odd.pth"))


def test_a_missing_file_is_named() -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere/model\.pth.*MODEL\.WEIGHTS"):
        DETRCheckpointer(tiny.build("DETR")).load("nowhere/model.pth")


def test_what_cannot_be_fetched_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*_: object, **__: object) -> str:
        raise OSError("no route to host")

    monkeypatch.setattr(PathManager, "get_local_path", offline)
    with pytest.raises(FileNotFoundError, match=r"detectron2://x\.pkl cannot be fetched.*MODEL\.WEIGHTS"):
        DETRCheckpointer(tiny.build("DETR")).load("detectron2://x.pkl")


def test_the_next_file_loads_after_one_that_failed(tmp_path: Path) -> None:
    model = tiny.build("DETR")
    checkpointer = DETRCheckpointer(model, str(tmp_path))
    checkpointer.save("good")
    with pytest.raises(FileNotFoundError):
        checkpointer.load("nowhere.pth")
    checkpointer.load(str(tmp_path / "good.pth"))


def test_a_namespace_may_stand_beside_the_weights_and_nothing_else_may(tmp_path: Path) -> None:
    model = tiny.build("DETR")
    torch.save({"model": model.state_dict(), "args": argparse.Namespace(lr=1e-4)}, tmp_path / "release.pth")
    DETRCheckpointer(model).load(str(tmp_path / "release.pth"))
    torch.save({"model": model.state_dict(), "args": Path("x")}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match="loaded safely"):
        DETRCheckpointer(model).load(str(tmp_path / "other.pth"))


def test_a_model_saved_under_data_parallel_loads(tmp_path: Path) -> None:
    model = tiny.build("DETR")
    state = {f"module.{k}": v + 1 for k, v in model.state_dict().items()}
    torch.save(state, tmp_path / "bare.pth")
    DETRCheckpointer(model).load(str(tmp_path / "bare.pth"))
    assert torch.equal(model.input_proj.bias, state["module.input_proj.bias"])


def test_learned_encoding_of_a_release_loads(tmp_path: Path) -> None:
    cfg = tiny.cfg_of("DETR")
    cfg.MODEL.DETR.SPATIAL_ENCODING.TYPE = "learned"
    model = build_model(cfg)
    state = {k.replace("position_encoding.", "backbone.1."): v + 1 for k, v in model.state_dict().items()}
    state["backbone.0.body.bn1.num_batches_tracked"] = torch.tensor(3)
    torch.save({"model": state}, tmp_path / "release.pth")
    DETRCheckpointer(model).load(str(tmp_path / "release.pth"))
    assert torch.equal(model.position_encoding.row_embed.weight, state["backbone.1.row_embed.weight"])


def test_a_folder_in_place_of_the_checkpoint_in_it_is_told(tmp_path: Path) -> None:
    model = tiny.build("DETR")
    with pytest.raises(FileNotFoundError, match=r"is a folder: .* none in it is a checkpoint"):
        DETRCheckpointer(model).load(str(tmp_path))
    torch.save({"model": model.state_dict()}, tmp_path / "model_final.pth")
    with pytest.raises(FileNotFoundError, match=r"is a folder: .*the file in it, model_final\.pth"):
        DETRCheckpointer(model).load(str(tmp_path))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "it is empty. Restore it"),
        (b"<!DOCTYPE html><html>", "it is a web page, as of a download that was refused. Fetch it again"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n", "it is a pointer of Git LFS.* git lfs pull"),
        (b"hello", "it is no file of torch.save, or damaged"),
        (b"{}", "it is no file of torch.save, or damaged"),
    ],
    ids=str,
)
def test_a_file_that_is_something_else_is_told_by_what_it_is(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "a.pth").write_bytes(content)
    with pytest.raises(ValueError, match=message) as told:
        DETRCheckpointer(tiny.build("DETR")).load(str(tmp_path / "a.pth"))
    assert "weights_only" not in str(told.value)  # torch's advice to run what is in it


def test_a_pickled_detector_is_told_by_what_it_holds(tmp_path: Path) -> None:
    model = tiny.build("DETR")
    torch.save(model, tmp_path / "a.pth")
    with pytest.raises(
        ValueError, match=r"holds objects of detr_family\S+, .*: save weights alone, model\.state_dict"
    ) as told:
        DETRCheckpointer(model).load(str(tmp_path / "a.pth"))
    assert "weights_only" not in str(told.value)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", "model.", "detector."])
def test_names_that_wrappers_put_before_a_models_own(prefix: str, tmp_path: Path) -> None:
    """Those of DDP, torch.compile, and trainers of other packages."""
    model, other = tiny.build("DETR"), tiny.build("DETR")
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(1)
    torch.save({"state_dict": {prefix + k: v for k, v in other.state_dict().items()}}, tmp_path / "a.ckpt")
    DETRCheckpointer(model, whole=True).load(f"file://{tmp_path}/a.ckpt")
    assert all(torch.equal(v, other.state_dict()[k]) for k, v in model.state_dict().items())
