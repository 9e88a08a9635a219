"""DETR's augmentation, and images that cannot be used."""

import numpy as np
import pytest
import torch
from detectron2.config import get_cfg
from detectron2.data import MetadataCatalog
from detectron2.data import transforms as T
from detectron2.structures import BoxMode
from PIL import Image

from detr_family import add_detr_family_config
from detr_family.data.dataset_mapper import DETRDatasetMapper
from detr_family.data.images import ImageError

WIDTH, HEIGHT = 90, 60
BOX = [30.0, 20.0, 24.0, 18.0]


@pytest.fixture
def cfg():
    cfg = get_cfg()
    add_detr_family_config(cfg)
    cfg.INPUT.FORMAT = "RGB"
    cfg.INPUT.MIN_SIZE_TRAIN, cfg.INPUT.MAX_SIZE_TRAIN = (48, 72), 100
    cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST = 80, 110
    cfg.INPUT.CROP.ENABLED = False
    cfg.INPUT.CROP.TYPE, cfg.INPUT.CROP.SIZE, cfg.INPUT.CROP.RESIZE = "absolute_range", [38, 50], [44, 56]
    return cfg


def annotation(box, category=1, **more):
    return {"bbox": box, "bbox_mode": BoxMode.XYWH_ABS, "category_id": category, "iscrowd": 0, **more}


def record(tmp_path, *annotations, image=None, name="a.png", **changes):
    """An image, black but for white where the first box is."""
    if image is None:
        pixels = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
        x, y, w, h = (int(value) for value in BOX)
        pixels[y : y + h, x : x + w] = 255
        image = Image.fromarray(pixels)
    image.save(tmp_path / name)
    return {
        "file_name": str(tmp_path / name),
        "height": HEIGHT,
        "width": WIDTH,
        "image_id": 5,
        "annotations": list(annotations),
        **changes,
    }


def white_box(image):
    """Where the image is white: x1, y1, x2, y2."""
    rows, columns = torch.where(image[0] > 127)
    return torch.stack([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]).float()


def test_output_in_training(cfg, tmp_path):
    source = record(tmp_path, annotation(BOX, 2), annotation([0, 0, 9, 9], 1, iscrowd=1))
    output = DETRDatasetMapper(cfg, is_train=True)(source)
    assert output["image"].dtype == torch.uint8 and output["image"].shape[0] == 3
    assert {key: output[key] for key in ("file_name", "height", "width", "image_id")} == {
        "file_name": str(tmp_path / "a.png"),
        "height": HEIGHT,
        "width": WIDTH,
        "image_id": 5,
    }
    assert output["instances"].image_size == tuple(output["image"].shape[1:])
    assert output["instances"].gt_classes.tolist() == [2]  # crowds are gone
    assert len(source["annotations"]) == 2 and "image" not in source  # the dataset stays as it was


def test_output_in_evaluation(cfg, tmp_path):
    cfg.INPUT.CROP.ENABLED = True
    output = DETRDatasetMapper(cfg, is_train=False)(record(tmp_path, annotation(BOX)))
    assert tuple(output["image"].shape) == (3, 73, 110)  # shorter side 80 would make the longer 120
    assert "instances" not in output and "annotations" not in output
    assert (output["height"], output["width"]) == (HEIGHT, WIDTH)


def test_boxes_follow_the_image_through_flip_crop_and_resize(cfg, tmp_path):
    cfg.INPUT.CROP.ENABLED = True
    mapper = DETRDatasetMapper(cfg, is_train=True)
    source = record(tmp_path, annotation(BOX))
    sizes = set()
    for _ in range(60):
        output = mapper(source)
        sizes.add(tuple(output["image"].shape[1:]))
        if len(output["instances"]):
            found = output["instances"].gt_boxes.tensor[0]
            assert (found - white_box(output["image"])).abs().max() <= 1.5
    assert len(sizes) > 10


@pytest.mark.parametrize("enabled", [False, True])
def test_crop_is_for_half_of_the_images_where_enabled(cfg, tmp_path, enabled):
    cfg.INPUT.CROP.ENABLED = enabled
    mapper = DETRDatasetMapper(cfg, is_train=True)
    source = record(tmp_path)
    whole = {(48, 72), (67, 100)}  # the uncropped image at either size
    cropped = sum(tuple(mapper(source)["image"].shape[1:]) not in whole for _ in range(200))
    assert 60 <= cropped <= 140 if enabled else cropped == 0


def test_crop_comes_from_the_image_resized_without_limit(cfg, monkeypatch, tmp_path):
    seen = []
    plain = T.RandomCrop.get_transform

    def spy(self, image):
        crop = plain(self, image)
        seen.append((image.shape[:2], crop.h, crop.w))
        return crop

    monkeypatch.setattr(T.RandomCrop, "get_transform", spy)
    cfg.INPUT.CROP.ENABLED, cfg.INPUT.MAX_SIZE_TRAIN = True, 60
    mapper = DETRDatasetMapper(cfg, is_train=True)
    source = record(tmp_path)
    for _ in range(100):
        assert max(mapper(source)["image"].shape[1:]) <= 60
    assert {shape for shape, _, _ in seen} == {(44, 66), (56, 84)}
    assert all(38 <= h <= 50 and 38 <= w <= 50 for _, h, w in seen)


def test_flip_can_be_switched_off(cfg, tmp_path):
    source = record(tmp_path, annotation([0, 20, 24, 18]))
    for direction, places in (("none", 1), ("horizontal", 2), ("vertical", 2)):
        cfg.INPUT.RANDOM_FLIP, cfg.INPUT.MIN_SIZE_TRAIN = direction, (60,)
        mapper = DETRDatasetMapper(cfg, is_train=True)
        boxes = {tuple(mapper(source)["instances"].gt_boxes.tensor[0].tolist()) for _ in range(40)}
        assert len(boxes) == places, direction


def test_no_annotations_give_empty_instances(cfg, tmp_path):
    instances = DETRDatasetMapper(cfg, is_train=True)(record(tmp_path))["instances"]
    assert tuple(instances.gt_boxes.tensor.shape) == (0, 4)
    assert instances.gt_classes.dtype == torch.int64 and len(instances) == 0


def test_boxes_that_the_crop_left_empty_are_gone(cfg, tmp_path):
    cfg.INPUT.CROP.ENABLED = True
    mapper = DETRDatasetMapper(cfg, is_train=True)
    source = record(tmp_path, annotation([0, 0, 4, 4]))
    counts = set()
    for _ in range(80):
        boxes = mapper(source)["instances"].gt_boxes
        counts.add(len(boxes))
        assert bool((boxes.area() > 0).all())
    assert counts == {0, 1}


def test_empty_crop_sizes_are_refused(cfg):
    cfg.INPUT.CROP.ENABLED, cfg.INPUT.CROP.RESIZE = True, []
    with pytest.raises(ValueError, match=r"INPUT.CROP.RESIZE is empty"):
        DETRDatasetMapper(cfg, is_train=True)


def noise(mode="RGB"):
    pixels = np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)
    return Image.fromarray(pixels).convert(mode)


@pytest.mark.parametrize("is_train", [True, False])
@pytest.mark.parametrize("name", ["a.png", "a.jpg"])
def test_truncated_image(cfg, tmp_path, name, is_train):
    source = record(tmp_path, image=noise(), name=name)
    path = tmp_path / name
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(ValueError, match=f"image .*{name} cannot be read .*DATASETS.COCO_FORMAT"):
        DETRDatasetMapper(cfg, is_train)(source)


def test_image_that_is_missing_empty_or_none(cfg, tmp_path):
    source = record(tmp_path)
    mapper = DETRDatasetMapper(cfg, is_train=True)
    for content, said in (
        (b"", "it is empty. Restore it"),
        (b"<html>not found</html>", "it is a web page, .* Fetch it again"),
        (b"neither", "Restore the file"),
        (None, "Restore the file"),
    ):
        (tmp_path / "a.png").unlink() if content is None else (tmp_path / "a.png").write_bytes(content)
        with pytest.raises(ValueError, match=rf"image .*a\.png cannot be read.*{said}"):
            mapper(source)


def test_image_of_another_size_than_the_annotation_file_says(cfg, tmp_path):
    source = record(tmp_path, width=HEIGHT, height=WIDTH)
    with pytest.raises(ValueError, match=r"a\.png: Mismatched image shape .*\(90, 60\), expect \(60, 90\)"):
        DETRDatasetMapper(cfg, is_train=True)(source)


@pytest.mark.parametrize(
    ("mode", "name"), [("P", "a.png"), ("L", "a.png"), ("RGBA", "a.png"), ("1", "a.png"), ("CMYK", "a.jpg")]
)
def test_other_modes_of_image_are_read_as_rgb(cfg, tmp_path, mode, name):
    output = DETRDatasetMapper(cfg, is_train=False)(record(tmp_path, image=noise(mode), name=name))
    assert output["image"].shape[0] == 3 and output["image"].dtype == torch.uint8
    assert 90 < output["image"].float().mean() < 165


@pytest.mark.parametrize("is_train", [True, False])
def test_sixteen_bits_are_refused(cfg, tmp_path, is_train):
    image = Image.fromarray(np.full((HEIGHT, WIDTH), 1000, np.uint16))
    with pytest.raises(ValueError, match=r"a\.png has more than 8 bits a channel \(PIL mode 'I"):
        DETRDatasetMapper(cfg, is_train)(record(tmp_path, image=image))


def test_image_is_turned_by_its_exif_orientation(cfg, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (HEIGHT, WIDTH)).save(tmp_path / "turned.jpg", exif=exif)
    source = {"file_name": str(tmp_path / "turned.jpg"), "height": HEIGHT, "width": WIDTH, "image_id": 1}
    assert tuple(DETRDatasetMapper(cfg, is_train=False)(source)["image"].shape) == (3, 73, 110)


def test_what_is_no_fault_of_the_file_is_not_called_one(cfg, tmp_path):
    given = record(tmp_path, annotation(BOX))
    cfg.MODEL.MASK_ON = cfg.INPUT.CROP.ENABLED = True
    with pytest.raises(ImageError, match=r"a\.png can be read.* not prepared: MODEL\.MASK_ON is on.*set it to False"):
        DETRDatasetMapper(cfg, True)(given)
    cfg.MODEL.MASK_ON = cfg.INPUT.CROP.ENABLED = False
    given["annotations"][0]["bbox_mode"] = BoxMode.XYXY_REL
    with pytest.raises(ImageError, match=r"a\.png can be read.* not prepared: look to its annotations.*Relative"):
        DETRDatasetMapper(cfg, True)(given)


def test_keypoints_that_the_datasets_do_not_have(cfg):
    MetadataCatalog.get("boxes alone").thing_classes = ["a"]
    cfg.DATASETS.TRAIN, cfg.MODEL.KEYPOINT_ON = ("boxes alone",), True
    with pytest.raises(ValueError, match=r"MODEL\.KEYPOINT_ON is True, and the datasets have no keypoints"):
        DETRDatasetMapper(cfg, True)
