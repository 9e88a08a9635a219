"""Fine-tuning to other classes: rows go by the classes' names."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import tiny
import torch
from detectron2.data.datasets.builtin_meta import COCO_CATEGORIES
from engine_runs import run_cfg, train
from torch import Tensor, nn

from detr_family.checkpoint import DETRCheckpointer
from detr_family.checkpoint.releases import COCO_IDS, COCO_NAMES
from detr_family.engine import Trainer

ROWS = ("class_embed", "label_enc", "enc_out_class_embed")


def row_tensors(model: nn.Module) -> dict[str, Tensor]:
    return {k: v for k, v in model.state_dict().items() if set(k.split(".")) & set(ROWS)}


def numbered(model: nn.Module) -> None:
    """Every row of classes is told by its value: 1000 plus its number."""
    for tensor in row_tensors(model).values():
        tensor.copy_((1000.0 + torch.arange(len(tensor))).view(-1, *[1] * (tensor.dim() - 1)).expand_as(tensor))


@pytest.mark.parametrize("name", tiny.DETECTORS)
def test_rows_of_the_same_names_are_kept_and_others_start_anew(
    name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    old = tiny.build(name, NUM_CLASSES=5)
    numbered(old)
    names = ["cat", "Traffic Light", "owl", "dog", "newt"]
    DETRCheckpointer(old, str(tmp_path), class_names=names).save("old")

    ours = ["traffic_light", "emu", "CAT"]
    new, fresh = tiny.build(name, NUM_CLASSES=3), tiny.build(name, NUM_CLASSES=3)
    DETRCheckpointer(new, class_names=ours, class_rows="match").load(str(tmp_path / "old.pth"))
    assert row_tensors(new)
    for key, tensor in row_tensors(new).items():
        first, middle, last = tensor[:3].flatten(1).unbind() if tensor.dim() > 1 else tensor[:3, None].unbind()
        assert first.unique().item() == 1001 and last.unique().item() == 1000, key
        assert torch.equal(middle, fresh.state_dict()[key][1].flatten()), key
        if len(tensor) == 4:  # no-object, or the unknown label
            assert tensor[3].unique().item() == 1005, key
    for key, tensor in new.state_dict().items():
        if key not in row_tensors(new):
            assert torch.equal(tensor, old.state_dict()[key]), key
    assert "2 rows are kept (traffic_light, CAT), 1 start as in a new model (emu)" in caplog.text


def test_without_the_setting_it_is_an_error_that_names_it(tmp_path: Path) -> None:
    DETRCheckpointer(tiny.build("DETR", NUM_CLASSES=5), str(tmp_path), class_names=list("abcde")).save("old")
    with pytest.raises(ValueError, match=r"its classes are a, b, c, d, e.*MODEL\.DETR\.CLASS_ROWS match"):
        DETRCheckpointer(tiny.build("DETR"), class_names=["a", "b", "x"]).load(str(tmp_path / "old.pth"))


def test_as_many_classes_of_other_names_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    DETRCheckpointer(tiny.build("DETR"), str(tmp_path), class_names=["a", "b", "c"]).save("old")
    DETRCheckpointer(tiny.build("DETR"), class_names=["a", "c", "b"]).load(str(tmp_path / "old.pth"))
    assert "has classes a, b, c, this dataset has as many of other names" in caplog.text


def test_names_must_be_known(tmp_path: Path) -> None:
    DETRCheckpointer(tiny.build("DETR"), str(tmp_path)).save("nameless")
    with pytest.raises(ValueError, match=r"nameless\.pth does not name its classes"):
        DETRCheckpointer(tiny.build("DETR"), class_names=["a", "b", "c"], class_rows="match").load(
            str(tmp_path / "nameless.pth")
        )


@pytest.mark.parametrize("name", tiny.DETECTORS)
def test_none_is_kept_where_so_asked(name: str, tmp_path: Path) -> None:
    """As from a file that does not name its classes."""
    old = tiny.build(name, NUM_CLASSES=6)
    for parameter in old.parameters():
        parameter.data.fill_(0.5)
    torch.save({"model": old.state_dict()}, tmp_path / "old.pth")
    new, fresh = tiny.build(name), tiny.build(name)
    DETRCheckpointer(new, class_names=["a", "b", "c"], class_rows="new").load(str(tmp_path / "old.pth"))
    for key, tensor in new.state_dict().items():
        expected = fresh if key in row_tensors(new) else old
        assert torch.equal(tensor, expected.state_dict()[key]), key


def as_released(model: nn.Module) -> dict[str, Tensor]:
    """A detector of 80 classes in a release's form: 91 rows by category id, torchvision's names are not needed."""
    state = {}
    for key, value in model.state_dict().items():
        if key in row_tensors(model):
            rows = torch.full((91 + len(value) - 80, *value.shape[1:]), -7.0)
            rows[COCO_IDS], rows[91:] = value[:80], value[80:]
            value = rows
        state["backbone.0." + key[len("backbone.") :] if key.startswith("backbone.") else key] = value
    return state


@pytest.mark.parametrize("name", tiny.DETECTORS)
def test_a_release_has_cocos_names(name: str, tmp_path: Path) -> None:
    released = tiny.build(name, NUM_CLASSES=80)
    numbered(released)
    torch.save({"model": as_released(released)}, tmp_path / "release.pth")
    ours = ["zebra", "wombat", "person", "toothbrush"]
    assert next(c["id"] for c in COCO_CATEGORIES if c["name"] == "zebra") == 24  # not its row here
    model = tiny.build(name, NUM_CLASSES=4)
    DETRCheckpointer(model, class_names=ours, class_rows="match").load(str(tmp_path / "release.pth"))
    for key, tensor in row_tensors(model).items():
        values = tensor.flatten(1)[:, 0] if tensor.dim() > 1 else tensor
        assert values[[0, 2, 3]].tolist() == [1000 + COCO_NAMES.index(ours[i]) for i in (0, 2, 3)], key
        assert abs(values[1]) < 100, key
    # The same file still loads whole where the classes are COCO's.
    whole = tiny.build(name, NUM_CLASSES=80)
    DETRCheckpointer(whole, class_names=COCO_NAMES, class_rows="match").load(str(tmp_path / "release.pth"))
    for key, tensor in row_tensors(whole).items():
        assert torch.equal(tensor, released.state_dict()[key]), key


def test_a_training_begins_from_a_release_of_other_classes(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    torch.save({"model": as_released(tiny.build("DETR", NUM_CLASSES=80))}, tmp_path / "release.pth")
    weights = ["MODEL.WEIGHTS", str(tmp_path / "release.pth"), "SOLVER.MAX_ITER", 1]
    with pytest.raises(ValueError, match=r"another number of classes.*MODEL\.DETR\.CLASS_ROWS match"):
        train(run_cfg("DETR", tmp_path, "exact", weights))
    train(run_cfg("DETR", tmp_path, "match", [*weights, "MODEL.DETR.CLASS_ROWS", "match"]))
    assert "0 rows are kept (none), 3 start as in a new model (circle, square, triangle)" in caplog.text
    trained = train(run_cfg("DETR", tmp_path, "match", ["SOLVER.MAX_ITER", 1])).model.class_embed.weight
    resumed = Trainer(run_cfg("DETR", tmp_path, "match", [*weights, "MODEL.DETR.CLASS_ROWS", "new"]))
    resumed.resume_or_load(True)
    assert torch.equal(resumed.model.class_embed.weight, trained)  # the run's own rows are not made anew
    with pytest.raises(ValueError, match=r"CLASS_ROWS is 'names'; it may be 'exact', 'match' or 'new'"):
        train(run_cfg("DETR", tmp_path, "other", [*weights, "MODEL.DETR.CLASS_ROWS", "names"]))
