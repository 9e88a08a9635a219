"""A dataset cut into tiles: boxes and pixels exact, pieces, empty tiles, names, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from detr_family.commands.convert_dataset import command
from detr_family.data import register_coco_format
from detr_family.data.datasets.coco import DatasetCatalog
from detr_family.data.datasets.labelled import Split
from detr_family.data.tiling import TiledForm, tiled_split, tiles


def scan(path: Path, width: int, height: int, **options: Any) -> np.ndarray:
    """An image whose every pixel says where it is."""
    y, x = np.mgrid[:height, :width]
    pixels = np.stack([x % 256, y % 256, (x // 256) * 16 + y // 256], 2).astype(np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, **options)
    return pixels


def split_of(folder: Path, images: list[dict[str, Any]], annotations: list[dict[str, Any]]) -> Split:
    annotations = [{"id": i, "category_id": 5, "iscrowd": 0, **a} for i, a in enumerate(annotations, start=1)]
    categories = [{"id": 5, "name": "cell"}]
    return Split({"images": images, "annotations": annotations, "categories": categories}, str(folder))


def test_boxes_and_pixels_are_those_of_the_image(tmp_path: Path) -> None:
    """Every piece lies where its object does, and an object that fits into the overlap is whole in a tile."""
    pixels = scan(tmp_path / "in" / "scans" / "a.png", 500, 260)
    rng = np.random.default_rng(0)
    boxes = [[*rng.uniform(0, (470, 230)).round(2), *rng.uniform(2, 30, 2).round(2)] for _ in range(40)]
    annotations = [{"image_id": 9, "bbox": box, "area": box[2] * box[3], "mark": i} for i, box in enumerate(boxes)]
    image = {"id": 9, "file_name": "scans/a.png", "width": 500, "height": 260}
    part = tiled_split(split_of(tmp_path / "in", [image], annotations), "train", tmp_path, TiledForm(200, 0.2, 0.4, 1))
    images = {entry["id"]: entry for entry in part.content["images"]}
    assert [(e["tile_x"], e["tile_y"]) for e in images.values()] == [t[:2] for t in tiles(260, 500, 200, 0.2)]
    for entry in images.values():
        assert entry["file_name"] == f"train/scans/a_{entry['tile_x']}_{entry['tile_y']}.png"
        own = np.asarray(Image.open(Path(part.image_root, entry["file_name"])))
        x, y = entry["tile_x"], entry["tile_y"]
        assert np.array_equal(own, pixels[y : y + entry["height"], x : x + entry["width"]])
    whole = set()
    for piece in part.content["annotations"]:
        entry, box = images[piece["image_id"]], boxes[piece["mark"]]
        left, top = max(box[0] - entry["tile_x"], 0), max(box[1] - entry["tile_y"], 0)
        right = min(box[0] + box[2] - entry["tile_x"], entry["width"])
        bottom = min(box[1] + box[3] - entry["tile_y"], entry["height"])
        assert piece["bbox"] == pytest.approx([left, top, right - left, bottom - top], abs=1e-9)
        assert piece["area"] == pytest.approx((right - left) * (bottom - top))
        share = piece["area"] / (box[2] * box[3])
        assert bool(piece.get("ignore")) == (share < 0.4)
        whole |= {piece["mark"]} if share > 1 - 1e-9 else set()
    assert whole == set(range(40)) and any(piece.get("ignore") for piece in part.content["annotations"])
    seen = {(p["image_id"], p["mark"]) for p in part.content["annotations"]}
    touching = {
        (number, i)
        for number, e in images.items()
        for i, (x, y, w, h) in enumerate(boxes)
        if x < e["tile_x"] + e["width"]
        and x + w > e["tile_x"]
        and y < e["tile_y"] + e["height"]
        and y + h > e["tile_y"]
    }
    assert seen == touching and [p["id"] for p in part.content["annotations"]] == list(range(1, len(seen) + 1))


def test_empty_tiles_are_kept_by_share_in_training_alone(tmp_path: Path) -> None:
    scan(tmp_path / "a.png", 1000, 1000)
    image = {"id": 1, "file_name": "a.png", "width": 1000, "height": 1000}
    one = [{"image_id": 1, "bbox": [10, 10, 20, 20]}, {"image_id": 1, "bbox": [900, 900, 50, 50], "iscrowd": 1}]
    counts = {}
    for share in (0.0, 0.3, 1.0):
        for name in ("train", "val"):
            form = TiledForm(50, 0.0, empty=share)
            part = tiled_split(split_of(tmp_path, [image], one), name, tmp_path / f"{share}", form)
            counts[name, share] = len(part.content["images"])
            assert len(list((tmp_path / f"{share}" / name).iterdir())) == counts[name, share]
    assert counts["train", 0.0] == 1 and 90 < counts["train", 0.3] < 150
    assert {counts["train", 1.0], *(counts["val", share] for share in (0.0, 0.3, 1.0))} == {400}


def test_turned_images_small_ones_and_those_of_other_places(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    scan(tmp_path / "in" / "turned.JPG", 300, 100, exif=exif, quality=100)  # shown standing: 100 x 300
    scan(tmp_path / "other" / "b.bmp", 60, 40)
    images = [
        {"id": 1, "file_name": "turned.JPG", "width": 100, "height": 300},
        {"id": 2, "file_name": str(tmp_path / "other" / "b.bmp"), "width": 60, "height": 40},
    ]
    annotations = [{"image_id": 1, "bbox": [0, 250, 100, 50]}, {"image_id": 2, "bbox": [-5, 0, 65, 40], "area": 7}]
    part = tiled_split(split_of(tmp_path / "in", images, annotations), "train", tmp_path, TiledForm(200, empty=0))
    shapes = [(e["file_name"].rsplit("/", 1)[-1], e["width"], e["height"]) for e in part.content["images"]]
    assert shapes == [("turned_0_100.jpg", 100, 200), ("b_0_0.png", 60, 40)]
    assert [a["bbox"] for a in part.content["annotations"]] == [[0, 150, 100, 50], [0, 0, 60, 40]]
    assert part.content["annotations"][1]["area"] == 7, "a box that is whole keeps its area"
    assert all(Path(part.image_root, e["file_name"]).resolve().is_relative_to(tmp_path / "train")
               for e in part.content["images"])  # fmt: skip


def test_the_command_writes_what_a_training_reads(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    scan(tmp_path / "cells" / "images" / "a.png", 400, 200)
    (tmp_path / "cells" / "train.json").write_text(
        json.dumps(split_of(tmp_path, [{"id": 1, "file_name": "a.png", "width": 400, "height": 200}],
                            [{"image_id": 1, "bbox": [150, 50, 100, 100]}]).content)
    )  # fmt: skip
    output = tmp_path / "tiled"
    arguments = [str(tmp_path / "cells"), "--output", str(output), "--tile", "220", "--overlap", "0.1"]
    assert command([*arguments, "--least-visible", "0.6"]) == 0
    assert "train: 2 tiles, 2 boxes" in capsys.readouterr().out
    register_coco_format("tiled", str(output / "train.json"), str(output))
    records = DatasetCatalog.get("tiled")
    assert [[a["bbox"] for a in r["annotations"]] for r in records] == [[[150, 50, 70, 100]], [[0, 50, 70, 100]]]
    assert command([*arguments, "--least-visible", "0.8"]) == 0  # all pieces are too small: no object is trained on
    ignored = json.loads((output / "train.json").read_text())["annotations"]
    assert all(entry["ignore"] == 1 for entry in ignored)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--tile", "-1"], "tile's side is -1"),
        (["--tile", "100", "--overlap", "1"], "overlap is 1.0"),
        (["--tile", "100", "--least-visible", "0"], "least visible share of a box is 0.0"),
        (["--tile", "100", "--empty-tiles", "1.5"], "empty tiles that are kept is 1.5"),
    ],
)
def test_what_cannot_be_meant(
    flags: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    scan(tmp_path / "cells" / "images" / "a.png", 40, 20)
    content = split_of(tmp_path, [{"id": 1, "file_name": "a.png", "width": 40, "height": 20}], []).content
    (tmp_path / "cells" / "train.json").write_text(json.dumps(content))
    assert command([str(tmp_path / "cells"), "--output", str(tmp_path / "out"), *flags]) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_tiles_of_one_name(tmp_path: Path) -> None:
    for name in ("a.png", "A.bmp"):
        scan(tmp_path / name, 30, 30)
    images = [{"id": i, "file_name": name, "width": 30, "height": 30} for i, name in enumerate(("a.png", "A.bmp"))]
    with pytest.raises(ValueError, match=r"a\.png and A\.bmp would have tiles of the same names"):
        tiled_split(split_of(tmp_path, images, []), "val", tmp_path, TiledForm(10))
