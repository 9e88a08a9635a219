"""Reading one image, with every fault of a file turned into one error that names it."""

from __future__ import annotations

import errno
import os

import numpy as np
from detectron2.data import detection_utils
from detectron2.utils.file_io import PathManager
from PIL import Image

from detr_family.contents import told_by_head
from detr_family.errors import UserError

_ORIENTATION_TAG = 0x0112


class ImageError(UserError, ValueError):
    """An image that cannot be used; the message names the file and says what to do."""


def read_image(path: str, image_format: str) -> np.ndarray:
    """An image as the detectors see it: turned by its EXIF orientation, 8 bits a channel.

    Args:
        path: the file.
        image_format: "RGB", "BGR" or another of Detectron2's INPUT.FORMAT.

    Returns:
        (H, W, C) uint8.

    Raises:
        ImageError: the file is missing, damaged, no image, or has more than 8 bits a channel.
        ValueError: Detectron2 has no such format.
    """
    check_depth(path)
    try:
        image: np.ndarray = detection_utils.read_image(path, image_format)
    except Exception as error:  # whatever a damaged file makes the decoder raise
        to_format(np.zeros((1, 1, 3), np.uint8), image_format)  # where it is not the file's fault
        raise unreadable(path, error) from error
    return image


def to_format(rgb: np.ndarray, image_format: str) -> np.ndarray:
    """An RGB image (H, W, 3) uint8 as the detectors see it: (H, W, C) in `image_format` (INPUT.FORMAT).

    Raises:
        ValueError: Detectron2 has no such format.
    """
    if image_format in ("RGB", "BGR"):
        return rgb if image_format == "RGB" else rgb[:, :, ::-1]
    image = Image.fromarray(np.ascontiguousarray(rgb))
    try:
        converted: np.ndarray = detection_utils.convert_PIL_to_numpy(image, image_format)
    except Exception as error:  # PIL's, of several kinds
        raise ValueError(f"INPUT.FORMAT is {image_format!r}, which no image can be read in: {error}") from error
    return np.array(converted)  # PIL's cannot be written to


def to_rgb(pixels: np.ndarray, image_format: str) -> np.ndarray:
    """What a detector sees, (H, W, C) in `image_format` (INPUT.FORMAT), for people to look at: (H, W, 3) RGB, uint8.

    Channels beyond the third, as an own mapper may give, are left out.
    """
    if image_format == "BGR":
        return pixels[:, :, 2::-1]
    if pixels.dtype == np.uint8 and image_format in ("CMYK", "YCbCr", "HSV", "LAB") and pixels.shape[2] > 2:
        return np.asarray(Image.fromarray(pixels, image_format).convert("RGB"))
    if pixels.shape[2] < 3:
        pixels = pixels[:, :, :1].repeat(3, axis=2)
    return pixels[:, :, :3].astype(np.uint8)


def check_depth(path: str, remedy: str = "Restore the file.") -> None:
    """Refuses what PIL would turn to 8 bits by cutting off at 255.

    Args:
        path: the file.
        remedy: what to tell the user to do where the header cannot be read.

    Raises:
        ImageError: the image has 16 or more bits a channel, or its header cannot be read.
    """
    try:
        with PathManager.open(path, "rb") as file, Image.open(file) as image:
            mode = image.mode
    except Exception as error:  # whatever a damaged header makes the decoder raise
        raise unreadable(path, error, remedy) from error
    check_mode(mode, path)


def check_mode(mode: str, name: str) -> None:
    """Refuses modes of PIL's with 16 or more bits a channel.

    Raises:
        ImageError: it is one; the message names the image.
    """
    if mode.startswith(("I", "F")):
        raise ImageError(
            f"{name} has more than 8 bits a channel (PIL mode {mode!r}). Convert the images to "
            "8 bits, with the scaling that suits them."
        )


def shown_size(path: str, remedy: str = "Restore the file, or take it out of the folder.") -> tuple[int, int]:
    """Width and height as the image is shown: turned by its EXIF orientation, as Detectron2 loads it.

    Only the header is read.

    Args:
        path: the file.
        remedy: what to tell the user to do where the header cannot be read.

    Raises:
        ImageError: the header cannot be read.
    """
    return _shown_size_and_mode(path, remedy)[0]


def usable_size(path: str) -> tuple[int, int]:
    """`shown_size` of an image that the detectors can read.

    Raises:
        ImageError: the header cannot be read, or there are 16 or more bits a channel.
    """
    size, mode = _shown_size_and_mode(path, "Restore the file, or take it out of the folder.")
    check_mode(mode, path)
    return size


def is_turned(image: Image.Image) -> bool:
    """Whether an image's EXIF orientation has it shown with width and height swapped."""
    return image.getexif().get(_ORIENTATION_TAG, 1) in (5, 6, 7, 8)


def _shown_size_and_mode(path: str, remedy: str) -> tuple[tuple[int, int], str]:
    """See `shown_size`; and PIL's mode."""
    try:
        with Image.open(path) as image:
            (width, height), mode = image.size, image.mode
            turned = is_turned(image)
    except Exception as error:  # whatever a damaged file makes the decoder raise
        raise unreadable(path, error, remedy) from error
    return ((height, width) if turned else (width, height)), mode


def unreadable(path: str, error: Exception, remedy: str = "Restore the file.") -> ImageError:
    """The error that names an image which cannot be read, and says what to do.

    Args:
        path: the file.
        error: what reading it raised.
        remedy: what to tell the user to do where the file is missing or damaged.
    """
    if isinstance(error, Image.DecompressionBombError):
        remedy = (
            "The file may be intact: Pillow refuses images of more than twice PIL.Image.MAX_IMAGE_PIXELS, "
            f"{Image.MAX_IMAGE_PIXELS}. Cut it into tiles or make it smaller; or, if you trust where it comes from, "
            "set PIL.Image.MAX_IMAGE_PIXELS (None: no limit) in your program."
        )
    elif isinstance(error, PermissionError):
        remedy = "Give this process the right to read it."
    elif isinstance(error, MemoryError):
        remedy = "Memory does not suffice: lower DATALOADER.NUM_WORKERS, or make the image smaller."
    elif os.path.isdir(path):
        remedy = "It is a folder: name the image in it."
    elif os.path.islink(path) and not os.path.exists(path):
        remedy = f"It is a link to {os.readlink(path)}, which is not there or leads back to it: make it anew."
    elif isinstance(error, OSError) and error.errno == errno.ENAMETOOLONG:
        remedy = "No name of a file can be so long."
    elif isinstance(error, OSError) and error.errno not in (None, errno.ENOENT, errno.ENOTDIR, errno.EISDIR):
        remedy = "The file may be intact: look to the disk or network folder that it is on, and to the system's limits."
    elif told := told_by_head(path):
        return ImageError(f"The image {path} cannot be read: it is {told[0]}. {told[1]}")
    return ImageError(f"The image {path} cannot be read ({type(error).__name__}: {error}). {remedy}")
