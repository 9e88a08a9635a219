"""Reading one image, with every fault of a file turned into one error that names it."""

from __future__ import annotations

import numpy as np
from detectron2.data import detection_utils
from detectron2.utils.file_io import PathManager
from PIL import Image

from detr_family.errors import UserError

_ORIENTATION_TAG = 0x0112


class ImageError(UserError, ValueError):
    """An image that cannot be used; the message names the file and says what to do."""


def read_image(path: str, image_format: str) -> np.ndarray:
    """An image as the detectors see it: turned by its EXIF orientation, 8 bits a channel.

    Args:
        path: the file.
        image_format: "RGB" or "BGR" (INPUT.FORMAT).

    Returns:
        (H, W, 3) uint8.

    Raises:
        ImageError: the file is missing, damaged, no image, or has more than 8 bits a channel.
    """
    check_depth(path)
    try:
        image: np.ndarray = detection_utils.read_image(path, image_format)
    except Exception as error:  # whatever a damaged file makes the decoder raise
        raise unreadable(path, error) from error
    return image


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
    if mode.startswith(("I", "F")):
        raise ImageError(
            f"{path} has more than 8 bits a channel (PIL mode {mode!r}). Convert the images to "
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
    try:
        with Image.open(path) as image:
            width, height = image.size
            turned = image.getexif().get(_ORIENTATION_TAG, 1) in (5, 6, 7, 8)
    except Exception as error:  # whatever a damaged file makes the decoder raise
        raise unreadable(path, error, remedy) from error
    return (height, width) if turned else (width, height)


def unreadable(path: str, error: Exception, remedy: str = "Restore the file.") -> ImageError:
    """The error that names a damaged image, and says what to do."""
    return ImageError(f"The image {path} cannot be read ({type(error).__name__}: {error}). {remedy}")
