"""The generated dataset: reproducible, boxes tight, what it promises to hold."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from detr_family.data.datasets import shapes
from detr_family.data.datasets.coco_json import read_coco_json
from detr_family.data.datasets.shapes import draw_shapes, write_shapes


def contents(root):
    return {str(path.relative_to(root)): path.read_bytes() for path in Path(root).rglob("*") if path.is_file()}


def generator(seed):
    return np.random.Generator(np.random.PCG64(seed))


def test_same_seed_same_bytes_other_seed_other_images(tmp_path):
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        write_shapes(str(tmp_path / name), 5, 2, seed=seed)
    first, again, other = (contents(tmp_path / name) for name in "abc")
    assert first == again
    assert all(first[name] != other[name] for name in first if name.endswith(".png"))
    images = [content for name, content in first.items() if name.endswith(".png")]
    assert len(set(images)) == 7  # training and validation images differ


def test_more_images_begin_with_the_same(tmp_path):
    write_shapes(str(tmp_path / "few"), 3, 1)
    write_shapes(str(tmp_path / "many"), 5, 1)
    few, many = contents(tmp_path / "few"), contents(tmp_path / "many")
    assert all(few[name] == many[name] for name in few if name.endswith(".png"))


def test_is_a_sound_coco_dataset(tmp_path, caplog):
    entries = write_shapes(str(tmp_path), 12, 4, size=(88, 110))
    assert [name for name, _, _ in entries] == ["shapes_train", "shapes_val"]
    for (_, json_file, folder), count in zip(entries, (12, 4), strict=True):
        assert Path(json_file).is_absolute() and Path(folder).is_absolute()
        assert [entry["id"] for entry in json.loads(Path(json_file).read_text())["categories"]] == [1, 3, 7]
        records = read_coco_json(json_file, folder)
        assert len(records) == count
        for record in records:
            with Image.open(record["file_name"]) as image:
                assert image.size == (record["width"], record["height"]) and image.mode == "RGB"
            assert 88 <= record["width"] <= 110 and 88 <= record["height"] <= 110
    assert not caplog.messages  # no box at fault


def test_many_sizes_overlaps_all_classes_and_some_empty_images():
    images = [draw_shapes(generator(seed), (96, 112)) for seed in range(300)]
    counts = [len(objects) for _, objects in images]
    assert 5 <= counts.count(0) <= 30 and max(counts) == 6
    objects = [known for _, found in images for known in found]
    classes = [known["category_id"] for known in objects]
    assert set(classes) == {1, 3, 7} and min(classes.count(i) for i in (1, 3, 7)) > len(classes) / 4
    sides = np.array([max(known["bbox"][2:]) for known in objects])
    assert sides.min() < 13 and sides.max() > 45 and np.std(sides) > 8
    overlaps = 0
    for _, found in images:
        for i, (x, y, w, h) in enumerate(known["bbox"] for known in found):
            for left, top, width, height in (known["bbox"] for known in found[:i]):
                overlaps += min(x + w, left + width) > max(x, left) and min(y + h, top + height) > max(y, top)
    assert overlaps > 50


def test_boxes_and_areas_fit_the_drawn_shapes(monkeypatch):
    """On a flat ground without noise each image of one object shows where it really is."""
    monkeypatch.setattr(shapes, "_background", lambda rng, width, height: np.full((height, width, 3), 20.0))
    monkeypatch.setattr(shapes, "_far_from", lambda rng, colour: np.full(3, 220.0))
    monkeypatch.setattr(shapes, "_MOST_OBJECTS", 1)
    checked = 0
    for seed in range(40):
        image, objects = draw_shapes(generator(seed), (96, 112))
        if not objects:
            continue
        covered = np.clip((np.asarray(image)[..., 1].astype(float) - 20) / 200, 0, 1)
        rows, columns = np.where(covered > 0.02)
        x, y, w, h = objects[0]["bbox"]
        # The box reaches into the outermost pixels that the shape touches, corners of a sliver aside.
        assert math.floor(x) <= columns.min() <= x + 1.3 and x + w - 1.3 <= columns.max() + 1 <= math.ceil(x + w)
        assert math.floor(y) <= rows.min() <= y + 1.3 and y + h - 1.3 <= rows.max() + 1 <= math.ceil(y + h)
        assert covered.sum() == pytest.approx(objects[0]["area"], rel=0.15, abs=5)
        checked += 1
    assert checked > 30


def test_finished_dataset_is_used_again_and_an_interrupted_one_redone(tmp_path, monkeypatch):
    write_shapes(str(tmp_path), 4, 2)
    before = contents(tmp_path)
    (tmp_path / "train" / "000001.png").write_bytes(b"changed")
    write_shapes(str(tmp_path), 4, 2)
    assert (tmp_path / "train" / "000001.png").read_bytes() == b"changed"  # not drawn again

    drawn = []

    def interrupted(*arguments):
        drawn.append(arguments)
        if len(drawn) == 5:
            raise KeyboardInterrupt
        return draw_shapes(*arguments)

    monkeypatch.setattr(shapes, "draw_shapes", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_shapes(str(tmp_path), 4, 2, seed=1)
    monkeypatch.undo()
    write_shapes(str(tmp_path), 4, 2, seed=1)  # the interrupted one does not pass for complete
    write_shapes(str(tmp_path / "fresh"), 4, 2, seed=1)
    redone = contents(tmp_path)
    assert all(redone[name] == content for name, content in contents(tmp_path / "fresh").items())
    write_shapes(str(tmp_path), 4, 2)
    assert all(contents(tmp_path)[name] == content for name, content in before.items())


def test_another_dataset_is_not_overwritten(tmp_path):
    (tmp_path / "train.json").write_text("mine")
    with pytest.raises(ValueError, match=r"train\.json is there and was not made by this tool"):
        write_shapes(str(tmp_path), 2, 1)
    assert (tmp_path / "train.json").read_text() == "mine"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_train": 0}, "num_train 0"),
        ({"size": (112, 96)}, "size"),
        ({"size": (8, 12)}, "at least 32"),
        ({"seed": -1}, "seed -1"),
    ],
)
def test_arguments_out_of_range(tmp_path, arguments, message):
    with pytest.raises(ValueError, match=message):
        write_shapes(str(tmp_path), **{"num_train": 2, "num_val": 1, **arguments})
