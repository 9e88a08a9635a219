"""Images in other formats than RGB, and files that cannot be read: the cause and its own remedy."""

from __future__ import annotations

import errno
import json
from pathlib import Path
from typing import Any

import numpy as np
import own_data
import pytest
import torch
from detectron2.data.detection_utils import read_image as detectron2_read
from detectron2.modeling import build_model
from engine_runs import run_cfg
from PIL import Image

from detr_family.analysis.loading import map_image
from detr_family.checkpoint.files import load as load_weights
from detr_family.commands.data_check import draw_training_images
from detr_family.config import load_config
from detr_family.contents import told_by_head
from detr_family.data.check import image_findings, read_part
from detr_family.data.dataset_mapper import DETRDatasetMapper
from detr_family.data.datasets.coco import check_images, register_coco_format
from detr_family.data.datasets.coco_json import read_coco_json, scan_coco_json
from detr_family.data.images import ImageError, read_image, to_format, to_rgb, unreadable
from detr_family.inference import Predictor
from detr_family.inference.image_source import read as read_source
from detr_family.visualization.draw import draw_detections

ROOT = Path(__file__).resolve().parents[2]
FORMATS = ["RGB", "BGR", "L", "YUV-BT.601", "HSV"]


@pytest.fixture
def photo(tmp_path: Path) -> str:
    pixels = np.random.default_rng(0).integers(256, size=(50, 70, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    return str(tmp_path / "a.png")


@pytest.mark.parametrize("image_format", FORMATS)
def test_an_rgb_array_becomes_what_an_evaluation_reads(photo: str, image_format: str) -> None:
    seen = to_format(read_image(photo, "RGB"), image_format)
    expected = detectron2_read(photo, image_format)
    assert np.array_equal(seen, expected) and seen.shape == expected.shape
    shown = to_rgb(np.ascontiguousarray(seen), image_format)
    assert shown.shape == (50, 70, 3) and shown.dtype == np.uint8
    if image_format in ("RGB", "BGR"):
        assert np.array_equal(shown, read_image(photo, "RGB"))


def test_an_unknown_format_is_told_and_more_channels_are_shown() -> None:
    with pytest.raises(ValueError, match=r"INPUT\.FORMAT is 'RBG'"):
        Predictor(torch.nn.Identity(), input_format="RBG")
    four = np.arange(48, dtype=np.uint8).reshape(3, 4, 4)
    assert np.array_equal(to_rgb(four, "RGBN"), four[:, :, :3])


def test_one_channel_from_prediction_to_contact_sheet(photo: str, tmp_path: Path) -> None:
    opts = ["MODEL.DEVICE", "cpu", "INPUT.FORMAT", "L", "MODEL.PIXEL_MEAN", "[120.0]", "MODEL.PIXEL_STD", "[60.0]"]
    cfg = load_config(str(ROOT / "configs" / "detr_quickstart.yaml"), [*opts, "MODEL.DETR.NUM_CLASSES", "3"])
    model = build_model(cfg)
    predictor = Predictor(model, input_format="L", min_size=96, max_size=128)
    prediction = next(predictor.stream([photo]))
    record = {"file_name": photo, "height": 50, "width": 70, "image_id": 1, "annotations": []}
    with torch.no_grad():
        expected = model([DETRDatasetMapper(cfg, False)(record)])[0]["instances"]
    assert torch.equal(prediction.instances.scores, expected.scores)
    array = predictor(read_image(photo, "RGB"), array_format="RGB")
    assert torch.equal(array.scores, expected.scores)
    assert draw_detections(prediction.image, prediction.instances, ["a", "b", "c"], 0.0).mode == "RGB"
    assert map_image(cfg, DETRDatasetMapper(cfg, False), record).image.shape[2] == 3

    shapes = run_cfg("DETR", tmp_path, "run")
    shapes.INPUT.FORMAT, shapes.INPUT.CROP.ENABLED = "L", False
    sheet = np.asarray(draw_training_images(shapes, 4, 0))
    assert sheet.shape[2] == 3 and len(np.unique(sheet)) > 20


def test_an_intact_image_above_pillows_limit_is_not_called_damaged(
    photo: str, monkeypatch: pytest.MonkeyPatch, coco_folder: Path, cfg: Any
) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 500)
    limit = r"PIL\.Image\.MAX_IMAGE_PIXELS, 500\. Cut it into tiles"
    record = {"file_name": photo, "height": 50, "width": 70, "image_id": 1, "annotations": []}
    for read in (lambda: read_image(photo, "RGB"), lambda: DETRDatasetMapper(cfg, False)(record)):
        with pytest.raises(ImageError, match=limit) as caught:
            read()
        assert "Restore" not in str(caught.value) and "damaged" not in str(caught.value)
    register_coco_format("large", own_data.write(coco_folder), str(coco_folder))
    told = [str(finding) for finding in image_findings([read_part("large", True)]) if finding.kind.startswith("unread")]
    assert len(told) == 1 and "MAX_IMAGE_PIXELS" in told[0] and "Restore" not in told[0]


@pytest.mark.parametrize(
    ("error", "remedy"),
    [
        (PermissionError(errno.EACCES, "Permission denied"), "the right to read it"),
        (OSError(errno.EMFILE, "Too many open files"), "may be intact"),
        (OSError(errno.ESTALE, "Stale file handle"), "may be intact"),
        (MemoryError(), "DATALOADER.NUM_WORKERS"),
        (FileNotFoundError(errno.ENOENT, "No such file"), "Restore the file"),
        (OSError("image file is truncated"), "Restore the file"),
        (SyntaxError("broken PNG file"), "Restore the file"),
    ],
    ids=lambda x: type(x).__name__ if isinstance(x, Exception) else "",
)
def test_each_cause_has_its_own_remedy(error: Exception, remedy: str) -> None:
    text = str(unreadable("a.png", error))
    assert remedy in text and ("Restore" in text) == ("Restore" in remedy)


def test_ids_that_are_whole_floats_are_integers(coco_folder: Path) -> None:
    whole = read_coco_json(own_data.write(coco_folder), str(coco_folder))
    keys = ("id", "image_id", "category_id", "width", "height")
    changes = {
        key: [{k: float(v) if k in keys else v for k, v in entry.items()} for entry in entries]
        for key, entries in (
            ("images", own_data.IMAGES), ("annotations", own_data.ANNOTATIONS), ("categories", own_data.CATEGORIES),
        )
    }  # fmt: skip
    path = own_data.write(coco_folder, changes, "floats.json")
    assert "21.0" in Path(path).read_text()
    records = read_coco_json(path, str(coco_folder))
    assert records == whole and all(type(record["image_id"]) is int for record in records)
    assert json.dumps([r["image_id"] for r in records]) == "[4, 9, 21]"
    for key, entries, wrong in (("images", own_data.IMAGES, 4.5), ("categories", own_data.CATEGORIES, "x7")):
        changes = {key: [{**entries[0], "id": wrong}, *entries[1:]]}
        with pytest.raises(ValueError, match=r"Ids must be integers"):
            read_coco_json(own_data.write(coco_folder, changes, "wrong.json"), str(coco_folder))


def test_numbers_between_quotation_marks(coco_folder: Path) -> None:
    """As exporters write them that know texts only."""

    def quoted(entries: list[dict[str, Any]], *keys: str) -> list[dict[str, Any]]:
        return [{k: str(v) if k in keys else v for k, v in entry.items()} for entry in entries]

    whole = read_coco_json(own_data.write(coco_folder), str(coco_folder))
    annotations = quoted(own_data.ANNOTATIONS, "image_id", "category_id", "iscrowd")
    changes = {
        "images": quoted(own_data.IMAGES, "id", "width", "height"),
        "categories": quoted(own_data.CATEGORIES, "id"),
        "annotations": [{**entry, "bbox": [str(x) for x in entry["bbox"]]} for entry in annotations],
    }
    assert read_coco_json(own_data.write(coco_folder, changes), str(coco_folder)) == whole
    wrong = [{**own_data.ANNOTATIONS[0], "iscrowd": "no"}]
    with pytest.raises(ValueError, match=r"\"iscrowd\" 'no'\. It must be 0 or 1"):
        read_coco_json(own_data.write(coco_folder, {"annotations": wrong}), str(coco_folder))


@pytest.mark.parametrize(
    "name, cause",
    [
        ("/home/other/data/a.png", r"a\.png is there, in the folder itself, without what file_name has before it"),
        ("images/a.png", r"a\.png is there, in the folder itself"),
        ("a.PNG", r"a\.png is there, with other capitals"),
        ("a.jpg", r"a\.png is there, with another ending"),
        (" a.png ", r"a\.png is there, with other spaces"),
        ("z.png", r"below/z\.png is there: write file_name into the annotation file"),
        ("http://images.org/a.png", r"File names are addresses of the network: fetch the images"),
        ("C:\\d\\a.png", r"File names have backslashes, .*; a\.png is there, in the folder itself"),
        ("gone.png", r"Restore them or correct the folder"),
    ],
)
def test_the_cause_of_a_missing_image(name: str, cause: str, coco_folder: Path) -> None:
    (coco_folder / "below").mkdir()
    (coco_folder / "below" / "z.png").write_bytes((coco_folder / "a.png").read_bytes())
    entries = [{**own_data.IMAGES[0], "file_name": name}, *own_data.IMAGES[1:]]
    records = read_coco_json(own_data.write(coco_folder, {"images": entries}), str(coco_folder))
    with pytest.raises(ValueError, match=rf"1 of 3 images looked for are missing .*{cause}") as told:
        check_images(records, str(coco_folder))
    assert "\n" not in str(told.value)
    with pytest.raises(ValueError, match=r"That folder is not there: correct the folder in DATASETS.COCO_FORMAT"):
        check_images([{"file_name": str(coco_folder / "elsewhere" / "a.png")}], str(coco_folder / "elsewhere"))


HEADS = [
    (b"", "empty", "Restore"),
    (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "a pointer of Git LFS", "git lfs pull"),
    (b"<!DOCTYPE html><html>403", "a web page, as of a download that was refused", "Fetch it again"),
    (b"\x1f\x8b\x08", "packed by gzip", "Unpack it"),
    (b"\x00" * 600, "nothing but zeros", "Restore"),
    (b"\x00\x00\x00\x1cftypheic", "in HEIC or AVIF", "Convert it to JPEG"),
    (b"%PDF-1.7", "a PDF document", "Make images of its pages"),
    (b"<svg xmlns='a'>", "SVG", "convert it"),
    (b"\x00\x00\x00\x20ftypisom", "a video", "Take its frames out"),
    (b"\x93NUMPY\x01", "an array of numpy", "Save it as an image"),
    (b"\x00" * 128 + b"DICM", "DICOM", "Convert its frames"),
]
OF_IMAGES = ("Convert it to JPEG", "Make images", "Take its frames out", "Save it as an image", "Convert its frames")


@pytest.mark.parametrize("head, what, remedy", HEADS, ids=[what for _, what, _ in HEADS])
def test_files_that_are_something_else_are_told_by_what_they_are(
    head: bytes, what: str, remedy: str, tmp_path: Path
) -> None:
    image, annotations = tmp_path / "a.jpg", tmp_path / "a.json"
    weights = tmp_path / "a.pth"
    other = remedy.startswith(OF_IMAGES)  # a remedy for images is none for what is no image
    for path, read, beginning, instead in (
        (image, lambda: read_image(str(image), "RGB"), f"The image {image} cannot be read: it is ", ""),
        (
            annotations,
            lambda: read_coco_json(str(annotations), str(tmp_path)),
            ".*the file is not JSON: it is ",
            "the annotation file",
        ),
        (weights, lambda: load_weights(str(weights)), "it is ", "the checkpoint"),
    ):
        path.write_bytes(head)
        helps = f"Name {instead}" if other and instead else remedy
        with pytest.raises(ValueError, match=f"^{beginning}{what}.*{helps}"):
            read()


def test_an_image_is_told_where_none_is_wanted(coco_folder: Path) -> None:
    image = str(coco_folder / "a.png")
    assert told_by_head(image) is None
    assert told_by_head(image, "the checkpoint") == ("a PNG image", "Name the checkpoint instead.")


def test_a_format_that_there_is_not_is_no_fault_of_the_file(coco_folder: Path) -> None:
    with pytest.raises(ValueError, match=r"^INPUT\.FORMAT is 'rgb', which no image can be read in"):
        read_image(str(coco_folder / "a.png"), "rgb")


def test_file_names_with_backslashes(coco_folder: Path) -> None:
    (coco_folder / "sub").mkdir()
    for image in own_data.IMAGES:
        (coco_folder / image["file_name"]).rename(coco_folder / "sub" / image["file_name"])
    windows = [{**image, "file_name": f"sub\\{image['file_name']}"} for image in own_data.IMAGES]
    path = own_data.write(coco_folder, {"images": windows})
    scan = scan_coco_json(path, str(coco_folder))
    assert scan.backslashes == [image["file_name"] for image in windows]
    check_images(scan.records)
    assert all(Path(record["file_name"]).is_file() for record in scan.records)

    (coco_folder / "sub\\a.png").write_bytes((coco_folder / "sub" / "a.png").read_bytes())  # a name that is meant so
    assert scan_coco_json(path, str(coco_folder)).records[0]["file_name"].endswith("sub\\a.png")

    elsewhere = [{**image, "file_name": f"C:\\data\\{image['file_name']}"} for image in own_data.IMAGES]
    path = own_data.write(coco_folder, {"images": elsewhere})
    with pytest.raises(ValueError, match=r"3 of 3 images.*File names have backslashes, as Windows writes them"):
        check_images(scan_coco_json(path, str(coco_folder)).records, str(coco_folder))


def test_folders_and_links_in_the_place_of_an_image(tmp_path: Path) -> None:
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "gone.png").symlink_to(tmp_path / "nowhere.png")
    (tmp_path / "round.png").symlink_to(tmp_path / "round.png")
    for name, remedy in (
        ("folder.png", "It is a folder: name the image in it"),
        ("gone.png", r"It is a link to .*nowhere\.png, which is not there"),
        ("round.png", r"It is a link to .*round\.png, which is not there or leads back to it"),
        (f"{'a' * 300}.png", "No name of a file can be so long"),
    ):
        with pytest.raises(ImageError, match=remedy) as told:
            read_image(str(tmp_path / name), "RGB")
        assert "Restore" not in str(told.value)


def test_dicom_is_told_and_line_breaks_in_names_are_not_taken_for_something_else(tmp_path: Path) -> None:
    (tmp_path / "a.dcm").write_bytes(b"\0" * 128 + b"DICM" + b"\0" * 40)
    with pytest.raises(ImageError, match=r"it is DICOM\. Convert its frames to PNG"):
        read_image(str(tmp_path / "a.dcm"), "RGB")
    Image.new("RGB", (5, 4)).save(tmp_path / "a\nb.png")
    assert read_source(str(tmp_path / "a\nb.png"), "RGB", "RGB").pixels.shape == (4, 5, 3)
