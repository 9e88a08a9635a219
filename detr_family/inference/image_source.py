"""What an image may be given as: files, addresses, arrays, tensors, Pillow's images, bytes, Detectron2's dicts."""

from __future__ import annotations

import http.client
import inspect
import io
import os
import urllib.error
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from detr_family.data.images import ImageError, check_mode, read_image, to_rgb, unreadable

# See `read`. A type that is not one of these may still have the methods of one, as an opened file has.
ImageSource = Any

KINDS = (
    "a path, an address (https://), an array (H, W, 3) of uint8, a tensor (3, H, W) in RGB, an image of Pillow, bytes, "
    "an opened file, or a dict of Detectron2 ({'image': tensor} or {'file_name': path})"
)
_TIMEOUT = 30  # seconds without a byte of an address
_LONGEST_PATH = 4096  # characters


@dataclass(frozen=True)
class Given:
    """An image as it was given, read.

    Attributes:
        source: what was given.
        pixels: (H, W, 3) uint8, RGB, at the size of the result.
        entry: where the detector's own input was given, that: "image", "height" and "width".
    """

    source: ImageSource
    pixels: np.ndarray
    entry: dict[str, Any] | None = None

    @property
    def key(self) -> tuple[Any, ...]:
        """Images of the same key can go through a detector together without padding."""
        return self.pixels.shape if self.entry is None else ("entry", *self.entry["image"].shape)


def is_one(images: object) -> bool:
    """Whether this is one image, not a sequence or stream of them."""
    if isinstance(images, (np.ndarray, Tensor)):
        return images.ndim != 4
    one = (str, bytes, bytearray, memoryview, os.PathLike, Image.Image, Mapping)
    if hasattr(images, "__array__") and getattr(images, "ndim", 1) in (2, 3):  # of another library, whose rows are none
        return True
    return isinstance(images, one) or hasattr(images, "read") or not hasattr(images, "__iter__")


def read(source: ImageSource, array_format: str, input_format: str) -> Given:
    """One image of any of the kinds.

    Args:
        source: one of

            - a path, an address with http:// or https://, which is fetched each time, or one with data:;
            - an array (H, W, 3), (H, W, 4), whose last channel is left out, (H, W, 1) or (H, W), which are grey: uint8,
              or of a floating type with values from 0 to 1;
            - a tensor (3, H, W), (4, H, W) or (1, H, W) in RGB, on any device, of the same types;
            - an image of Pillow, of any mode of 8 bits: turned by its EXIF orientation, transparency left out;
            - the bytes of a file, or a file opened for reading in binary;
            - a dict of Detectron2's: with "image", a tensor (C, H, W) in the detector's own channel order and resized
              already, and optionally "height" and "width" of the result; with an "image" of another of these kinds, or
              with "file_name".
        array_format: channel order of the arrays, "RGB" or "BGR" (with four channels "RGBA" or "BGRA").
        input_format: the detector's own (INPUT.FORMAT).

    Raises:
        ImageError: it is nothing of that, or it cannot be read.
    """
    if isinstance(source, Mapping):
        inner = source.get("image", source.get("file_name"))
        if isinstance(inner, Tensor):
            return _of_dict(source, inner, input_format)
        if inner is None or isinstance(inner, Mapping):
            raise ImageError(f"a dict with the keys {', '.join(map(repr, source)) or 'none'} is no image: give {KINDS}")
        return replace(read(inner, array_format, input_format), source=source)
    if isinstance(source, (str, os.PathLike)):
        path = os.fspath(source)
        if isinstance(path, bytes):
            path = os.fsdecode(path)
        if path.lower().startswith(("http://", "https://")):
            return Given(source, _decoded(_fetched(path), path, "Look at what the address gives: it is no image."))
        if path[:5].lower() == "data:":
            return Given(source, _decoded(_of_data_address(path), f"in the address {path[:60]}..."))
        if ("\n" in path and not os.path.exists(path)) or len(path) > _LONGEST_PATH:
            raise ImageError(
                f"a text of {len(path)} characters, {path[:40]!r}..., is no path: give the bytes that it stands for, "
                "base64.b64decode(text) for instance"
            )
        if any(sign in path for sign in "*?") and not os.path.exists(path):
            raise ImageError(f"there is no image {path}: give what it stands for, sorted(glob.glob({path!r}))")
        if os.path.isdir(path):
            raise ImageError(f"{path} is a folder: give the images in it, sorted(pathlib.Path({path!r}).iterdir())")
        return Given(source, read_image(path, "RGB"))
    if isinstance(source, Image.Image):
        return Given(source, _of_pillow(source, f"an image of Pillow, {source.size[0]}x{source.size[1]}"))
    if isinstance(source, (bytes, bytearray, memoryview)):
        return Given(source, _decoded(bytes(source), f"of {len(source)} bytes"))
    if hasattr(source, "read"):
        return Given(source, _of_file(source))
    if isinstance(source, Tensor):
        return Given(source, _of_tensor(source))
    if isinstance(source, np.ndarray) or hasattr(source, "__array__"):
        return Given(source, _of_array(np.asarray(source), array_format))
    raise ImageError(f"{_shown(source)} is no image: give {KINDS}; or a list of such")


def _of_data_address(address: str) -> bytes:
    """What an address holds in itself: data:image/png;base64,..."""
    try:
        with urllib.request.urlopen(address) as answer:
            content: bytes = answer.read()
            return content
    except (OSError, ValueError) as error:
        raise ImageError(f"the address {address[:60]}... holds no data in base64 ({error})") from error


def _of_dict(source: Mapping[str, Any], image: Tensor, input_format: str) -> Given:
    if image.ndim != 3 or not image.numel():
        raise ImageError(
            f"a dict whose 'image' is {_shown(image)} is no input of Detectron2: (C, H, W) is needed, in the "
            "detector's channel order and resized as it is to be seen"
        )
    height, width = int(source.get("height", image.shape[1])), int(source.get("width", image.shape[2]))
    seen = image.detach().cpu().permute(1, 2, 0)
    if seen.dtype != torch.uint8:
        seen = seen.float().round().clamp(0, 255).byte()
    pixels = np.ascontiguousarray(to_rgb(seen.numpy(), input_format))
    if pixels.shape[:2] != (height, width):
        pixels = np.asarray(Image.fromarray(pixels).resize((width, height), Image.Resampling.BILINEAR))
    return Given(source, pixels, {"image": image, "height": height, "width": width})


def _of_pillow(image: Image.Image, name: str) -> np.ndarray:
    check_mode(image.mode, name)
    try:
        return np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
    except Exception as error:  # whatever a damaged file makes the decoder raise, which works only now
        raise unreadable(name, error) from error


def _decoded(
    content: bytes, name: str, remedy: str = "Give the bytes of an image file, PNG or JPEG for instance, whole."
) -> np.ndarray:
    try:
        image = Image.open(io.BytesIO(content))
    except Exception as error:  # whatever damaged bytes make the decoder raise
        raise unreadable(name, error, remedy) from error
    return _of_pillow(image, name)


def _of_file(file: Any) -> np.ndarray:
    name = f"in the opened file {getattr(file, 'name', None) or type(file).__name__}"
    if inspect.iscoroutinefunction(file.read):
        raise ImageError(f"a {type(file).__name__} is read by awaiting it: give its bytes, await file.read()")
    content = file.read()
    if not isinstance(content, (bytes, bytearray)):
        raise ImageError(f"the image {name} is opened as text: open it for reading in binary, open(path, 'rb')")
    if not content:
        raise ImageError(f"the image {name} has no bytes left to read: open it anew, or file.seek(0)")
    return _decoded(bytes(content), name)


def _fetched(address: str) -> bytes:
    request = urllib.request.Request(address, headers={"User-Agent": "detr_family"})
    try:
        with urllib.request.urlopen(request, timeout=_TIMEOUT) as answer:
            content: bytes = answer.read()
            return content
    except (OSError, ValueError, http.client.HTTPException) as error:  # URLError and timeouts are OSErrors
        code = error.code if isinstance(error, urllib.error.HTTPError) else None
        remedy = "The server says so: look to the address." if code else "Look to the address and the network."
        raise unreadable(address, error, remedy) from error


def _of_tensor(tensor: Tensor) -> np.ndarray:
    if tensor.ndim == 2:
        tensor = tensor[None]
    if tensor.ndim != 3 or tensor.shape[0] not in (1, 3, 4) or not tensor.numel():
        raise ImageError(
            f"a tensor of shape {tuple(tensor.shape)} is no image: (3, height, width) in RGB is needed, uint8 or of a "
            "floating type from 0 to 1"
        )
    tensor = tensor.detach().cpu()
    if tensor.dtype in (torch.float16, torch.bfloat16):
        tensor = tensor.float()
    return _of_array(tensor.permute(1, 2, 0).numpy(), "RGB")


def _of_array(array: np.ndarray, array_format: str) -> np.ndarray:
    """(H, W), (H, W, 1), (H, W, 3) or (H, W, 4) -> (H, W, 3) uint8 in RGB."""
    if array.ndim == 2:
        array = array[:, :, None]
    if array.ndim != 3 or array.shape[2] not in (1, 3, 4) or not array.size:
        hint = "; transpose it, array.transpose(1, 2, 0)" if array.ndim == 3 and array.shape[0] in (1, 3) else ""
        raise ImageError(
            f"an array of shape {array.shape} and type {array.dtype} is no image: (height, width, 3) of uint8 is "
            f"needed{hint}"
        )
    array = _in_bytes(array)
    if array.shape[2] == 1:
        return array.repeat(3, axis=2)
    return array[:, :, :3] if array_format == "RGB" else array[:, :, 2::-1]


def _in_bytes(array: np.ndarray) -> np.ndarray:
    """Values of an array as uint8; those of a floating type are from 0 to 1.

    Raises:
        ImageError: another type, or values that are not so.
    """
    if array.dtype == np.uint8:
        return array
    if not np.issubdtype(array.dtype, np.floating):
        raise ImageError(
            f"an image of {array.dtype}, values {array.min()} to {array.max()}, cannot be taken: scale it to 0 to 255 "
            "and give uint8"
        )
    least, most = float(array.min()), float(array.max())
    if not (least >= 0 and most <= 1):
        why = "normalised ones are taken as they were before" if least < 0 else "for 0 to 255 give uint8"
        raise ImageError(
            f"an image of {array.dtype} has values from {least:.3g} to {most:.3g}; 0 to 1 is taken ({why})"
        )
    return (array * 255).round().astype(np.uint8)


def _shown(value: object) -> str:
    if isinstance(value, (np.ndarray, Tensor)):
        return f"a {type(value).__name__} of shape {tuple(value.shape)}"
    text = repr(value)
    return f"a {type(value).__name__} ({text if len(text) <= 40 else text[:40] + '...'})"
