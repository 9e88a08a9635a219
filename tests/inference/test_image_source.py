"""An image of any kind that people hold in their hands is the same to the predictor; the rest is one clear line."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from detectron2.structures import Boxes, Instances
from PIL import Image
from serving import serving
from torch import nn

from detr_family.data.images import ImageError
from detr_family.inference import Predictor

PIXELS = np.random.default_rng(0).integers(0, 256, (10, 16, 3), dtype=np.uint8)  # RGB


class Recorder(nn.Module):
    """A detector that keeps what it is given, and finds the whole image."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[dict[str, Any]] = []
        self.batches: list[int] = []

    def forward(self, inputs: list[dict[str, Any]]) -> list[dict[str, Instances]]:
        self.seen += inputs
        self.batches.append(len(inputs))
        results = []
        for x in inputs:
            found = Instances((x["height"], x["width"]))
            found.pred_boxes = Boxes(torch.tensor([[0.0, 0.0, x["width"], x["height"]]]))
            found.scores, found.pred_classes = torch.tensor([0.9]), torch.tensor([0])
            results.append({"instances": found})
        return results


@pytest.fixture
def predictor() -> Predictor:
    return Predictor(Recorder(), min_size=0)


def seen(predictor: Predictor, source: Any, **keys: Any) -> np.ndarray:
    """(H, W, 3) RGB: what the detector was given last; the image of the prediction is the same."""
    (prediction,) = predictor.stream([source], **keys)
    assert prediction.source is source
    image: np.ndarray = predictor.model.seen[-1]["image"].permute(1, 2, 0).numpy()
    np.testing.assert_array_equal(prediction.image, image)
    assert prediction.instances.image_size == image.shape[:2]
    return image


def png(pixels: np.ndarray = PIXELS, **options: Any) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG", **options)
    return file.getvalue()


class Uploaded:
    """As web frameworks wrap what was sent."""

    def __init__(self, content: bytes) -> None:
        self.file = io.BytesIO(content)

    def read(self) -> bytes:
        return self.file.read()


class Array:
    """Of another library, with numpy's protocol."""

    def __array__(self, dtype: Any = None, copy: Any = None) -> np.ndarray:
        return PIXELS[:, :, ::-1]


class Rows(Array):
    """The same where it can be gone through row by row, as arrays of jax and TensorFlow."""

    ndim = 3

    def __iter__(self) -> Iterator[np.ndarray]:
        return iter(self.__array__())


ALPHA = np.full((10, 16, 1), 77, np.uint8)
CHW = torch.from_numpy(PIXELS).permute(2, 0, 1)
SAME: dict[str, Callable[[], Any]] = {
    "BGR": lambda: PIXELS[:, :, ::-1],
    "BGRA": lambda: np.concatenate([PIXELS[:, :, ::-1], ALPHA], 2),
    "array of floats": lambda: (PIXELS[:, :, ::-1] / 255).astype(np.float32),
    "another library's": Array,
    "Pillow": lambda: Image.fromarray(PIXELS),
    "Pillow RGBA": lambda: Image.fromarray(np.concatenate([PIXELS, ALPHA], 2)),
    "bytes": png,
    "bytearray": lambda: bytearray(png()),
    "memoryview": lambda: memoryview(png()),
    "opened file": lambda: io.BytesIO(png()),
    "upload": lambda: Uploaded(png()),
    "tensor": lambda: CHW,
    "tensor RGBA": lambda: torch.cat([CHW, torch.from_numpy(ALPHA).permute(2, 0, 1)]),
    "tensor of floats": lambda: CHW / 255,
    "tensor of float16": lambda: (CHW / 255).half(),
    "tensor with a gradient": lambda: (CHW / 255).requires_grad_(),
    "dict with a tensor": lambda: {"image": CHW},
    "dict of floats": lambda: {"image": CHW.float()},
    "dict of integers": lambda: {"image": CHW.long()},
    "dict with Pillow's": lambda: {"image": Image.fromarray(PIXELS), "label": 3},
}


@pytest.mark.parametrize("kind", SAME)
def test_it_is_the_same_image(kind: str, predictor: Predictor) -> None:
    np.testing.assert_array_equal(seen(predictor, SAME[kind]()), PIXELS)


def test_arrays_may_be_rgb(predictor: Predictor) -> None:
    np.testing.assert_array_equal(seen(predictor, PIXELS, array_format="RGB"), PIXELS)
    rgba = np.concatenate([PIXELS, ALPHA], 2)
    np.testing.assert_array_equal(seen(predictor, rgba, array_format="RGB"), PIXELS)
    np.testing.assert_array_equal(seen(predictor, CHW, array_format="BGR"), PIXELS)  # of arrays alone


@pytest.mark.parametrize(
    "source",
    [PIXELS[:, :, 1], PIXELS[:, :, 1, None], CHW[1], CHW[1, None], Image.fromarray(PIXELS[:, :, 1])],
    ids=["array", "array of one channel", "tensor", "tensor of one channel", "Pillow L"],
)
def test_grey_images(source: Any, predictor: Predictor) -> None:
    np.testing.assert_array_equal(seen(predictor, source), PIXELS[:, :, [1, 1, 1]])


@pytest.mark.parametrize("mode", ["P", "1", "LA", "CMYK", "YCbCr"])
def test_pillows_other_modes_are_as_in_a_file(mode: str, predictor: Predictor, tmp_path: Path) -> None:
    image = Image.fromarray(PIXELS).convert(mode)
    path = tmp_path / ("a.tiff" if mode in ("CMYK", "YCbCr") else "a.png")
    image.save(path)
    np.testing.assert_array_equal(seen(predictor, image), seen(predictor, path))


def test_files_by_path(predictor: Predictor, tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(png())
    record = {"file_name": str(path), "image_id": 3, "height": 10, "width": 16}
    for source in (path, str(path), record):
        np.testing.assert_array_equal(seen(predictor, source), PIXELS)
    with path.open("rb") as file:
        np.testing.assert_array_equal(seen(predictor, file), PIXELS)


def test_an_address_is_fetched_each_time(predictor: Predictor) -> None:
    with serving() as server:
        server.files["/a.png"] = png()
        np.testing.assert_array_equal(seen(predictor, f"{server.address}/a.png?key=1"), PIXELS)
        server.files["/a.png"] = png(255 - PIXELS)
        np.testing.assert_array_equal(seen(predictor, f"{server.address}/a.png?key=1"), 255 - PIXELS)
        with pytest.raises(ImageError, match=r"http://127.*/b\.png cannot be read \(HTTPError: .*404.*look to the"):
            predictor(f"{server.address}/b.png")
        server.files["/c.png"] = b"<html>"
        with pytest.raises(
            ImageError, match=r"/c\.png cannot be read \(UnidentifiedImageError.*what the address gives"
        ):
            predictor(f"{server.address}/c.png")
        server.files["/d.png"], server.cut["/d.png"] = png(), 60
        with pytest.raises(ImageError, match=r"/d\.png cannot be read \(IncompleteRead.*Look to the address and the"):
            predictor(f"{server.address}/d.png")
        with pytest.raises(ImageError, match=r"/my image\.png cannot be read \(InvalidURL"):
            predictor(f"{server.address}/my image.png")
        address = server.address
    with pytest.raises(ImageError, match=r"/a\.png cannot be read .*Look to the address and the network"):
        predictor(f"{address}/a.png")


@pytest.mark.parametrize("orientation", [3, 6, 8])
def test_all_that_has_exif_is_turned(orientation: int, predictor: Predictor, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    content = png(exif=exif)
    (tmp_path / "a.png").write_bytes(content)
    expected = np.rot90(PIXELS, {3: 2, 6: 3, 8: 1}[orientation])
    for source in (tmp_path / "a.png", content, io.BytesIO(content), Image.open(io.BytesIO(content))):
        np.testing.assert_array_equal(seen(predictor, source), expected)


def test_several_of_them(predictor: Predictor, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png())
    mixed = [str(tmp_path / "a.png"), png(), PIXELS, CHW, Image.fromarray(PIXELS), {"image": CHW}]
    assert len(predictor(mixed)) == len(predictor(tuple(mixed))) == len(predictor(iter(mixed))) == 6
    assert len(predictor(tmp_path.iterdir())) == 1
    assert len(predictor(torch.stack([CHW] * 3))) == len(predictor(np.stack([PIXELS] * 3))) == 3
    assert predictor([]) == [] and predictor(iter([])) == []
    assert isinstance(predictor(CHW), Instances)
    assert isinstance(predictor(Rows()), Instances)


def test_detectron2s_own_input_is_seen_as_it_is() -> None:
    resized = Predictor(Recorder(), min_size=20, max_size=40, input_format="BGR", batch_size=4)
    entry = {"image": CHW.flip(0), "height": 30, "width": 48, "file_name": "elsewhere.jpg"}
    one, two, other = resized.stream([entry, dict(entry, height=20, width=32), CHW])
    assert resized.model.batches == [2, 1]  # the resized tensor, of another size, goes on its own
    assert torch.equal(resized.model.seen[0]["image"], entry["image"])
    assert one.instances.image_size == one.image.shape[:2] == (30, 48)
    assert two.instances.image_size == two.image.shape[:2] == (20, 32)
    assert abs(one.image.mean((0, 1)) - PIXELS.mean((0, 1))).max() < 6  # RGB to look at
    assert other.instances.image_size == (10, 16) and resized.model.seen[2]["image"].shape == (3, 20, 32)


class Unread:
    async def read(self) -> bytes:
        return b""


@pytest.mark.parametrize(
    ("source", "said"),
    [
        (None, r"a NoneType \(None\) is no image: give a path.*a tensor \(3, H, W\) in RGB.*list of such"),
        (7, r"a int \(7\) is no image"),
        ([[1, 2], [3, 4]], r"a list \(\[1, 2\]\) is no image"),
        ({"pixels": 3}, r"a dict with the keys 'pixels' is no image: give a path"),
        ({"image": CHW[0]}, r"a dict whose 'image' is a Tensor of shape \(10, 16\) is no input of Detectron2"),
        (np.zeros((4, 5, 2), np.uint8), r"an array of shape \(4, 5, 2\) .* is no image: \(height, width, 3\) of uint8"),
        (np.zeros((3, 40, 50), np.uint8), r"\(3, 40, 50\) .*transpose it, array\.transpose\(1, 2, 0\)"),
        (np.zeros((0, 5, 3), np.uint8), r"an array of shape \(0, 5, 3\)"),
        (np.full((4, 5, 3), 200.0), r"float64 has values from 200 to 200; 0 to 1 is taken \(for 0 to 255 give uint8\)"),
        (np.full((4, 5, 3), np.nan), r"float64 has values from nan"),
        (np.full((4, 5, 3), 300, np.uint16), r"an image of uint16, values 300 to 300, .*scale it to 0 to 255"),
        (torch.zeros(5, 40, 50), r"a tensor of shape \(5, 40, 50\) is no image: \(3, height, width\)"),
        (torch.zeros(40, 50, 3), r"a tensor of shape \(40, 50, 3\) is no image"),
        (CHW / 128 - 1, r"float32 has values from -1 to .*normalised ones are taken as they were before"),
        (torch.zeros(3, 4, 5, dtype=torch.int64), "an image of int64"),
        (Image.fromarray(np.zeros((4, 5), np.uint16)), r"an image of Pillow, 5x4 has more than 8 bits"),
        (b"", r"of 0 bytes cannot be read.*whole"),
        (png()[:60], r"of 60 bytes cannot be read"),
        (io.StringIO("a"), r"in the opened file StringIO is opened as text: open it .*'rb'"),
        (io.BytesIO(), r"has no bytes left to read: open it anew"),
        (Unread(), r"a Unread is read by awaiting it: give its bytes, await file\.read\(\)"),
        ("nothing/here.jpg", r"The image nothing/here\.jpg cannot be read"),
        ("tests", r"tests is a folder: give the images in it"),
    ],
)  # fmt: skip
def test_the_rest_is_refused_in_one_line(
    source: Any, said: str, predictor: Predictor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(Path(__file__).resolve().parents[2])
    with pytest.raises(ImageError, match=said) as caught:
        predictor(source)
    assert "\n" not in str(caught.value)
    failed = []
    if not isinstance(source, list):
        assert len(list(predictor.stream([source, CHW], on_error=lambda s, e: failed.append((s, e))))) == 1
        assert failed[0][0] is source


class Choosy(Recorder):
    """Refuses images that are less than 8 pixels high, as an exported detector may."""

    def forward(self, inputs: list[dict[str, Any]]) -> list[dict[str, Instances]]:
        if any(x["image"].shape[1] < 8 for x in inputs):
            raise ImageError("too small")
        return super().forward(inputs)


def test_what_the_detector_refuses_is_told_and_the_rest_goes_on() -> None:
    predictor = Predictor(Choosy(), min_size=0, batch_size=2)
    small, failed = PIXELS[:4], []
    images = [PIXELS, small, small, PIXELS]
    found = list(predictor.stream(images, on_error=lambda source, error: failed.append((source, str(error)))))
    assert len(found) == 2
    assert [said for _, said in failed] == ["too small"] * 2 and all(source is small for source, _ in failed)
    entries = [{"image": CHW}, {"image": CHW[:, :4]}]
    assert len(list(predictor.stream(entries, on_error=lambda *_: None))) == 1
    with pytest.raises(ImageError, match="too small"):
        list(predictor.stream(images))


def test_texts_that_are_no_paths(predictor: Predictor, tmp_path: Path) -> None:
    text = base64.b64encode(png()).decode()
    np.testing.assert_array_equal(seen(predictor, f"data:image/png;base64,{text}"), PIXELS)
    for source, message in (
        (text * 20, r"a text of \d+ characters, 'iVBOR.*'\.\.\., is no path: .*base64\.b64decode"),
        ("data:image/png;base64,AAAA", r"cannot be read .*whole"),
        ("data:image/png;base64,A", "holds no data in base64"),
        (str(tmp_path / "*.png"), r"there is no image .*\*\.png: give what it stands for, sorted\(glob\.glob\("),
    ):
        with pytest.raises(ImageError, match=message) as told:
            predictor(source)
        assert len(str(told.value)) < 400 and "\n" not in str(told.value)
