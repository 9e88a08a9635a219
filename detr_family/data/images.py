"""Reading one picture, with every fault of a file turned into one error that names it."""

from __future__ import annotations

import numpy as np
from detectron2.data.detection_utils import read_image
from detectron2.utils.file_io import PathManager
from PIL import Image

from detr_family.errors import UserError


class PictureError(UserError, ValueError):
    """A picture that cannot be used; the message names the file and says what to do."""


def read_picture(path: str, image_format: str) -> np.ndarray:
    """A picture as the detectors see it: turned by its EXIF orientation, 8 bits a channel.

    Args:
        path: the file.
        image_format: "RGB" or "BGR" (INPUT.FORMAT).

    Returns:
        (H, W, 3) uint8.

    Raises:
        PictureError: the file is missing, damaged, no picture, or has more than 8 bits a channel.
    """
    check_depth(path)
    try:
        image: np.ndarray = read_image(path, image_format)
    except Exception as error:  # whatever a damaged file makes the decoder raise
        raise unreadable(path, error) from error
    return image


def check_depth(path: str, remedy: str = "Restore the file.") -> None:
    """Refuses what PIL would turn to 8 bits by cutting off at 255.

    Args:
        path: the file.
        remedy: what to tell the user to do where the header cannot be read.

    Raises:
        PictureError: the picture has 16 or more bits a channel, or its header cannot be read.
    """
    try:
        with PathManager.open(path, "rb") as file, Image.open(file) as picture:
            mode = picture.mode
    except Exception as error:  # whatever a damaged header makes the decoder raise
        raise unreadable(path, error, remedy) from error
    if mode.startswith(("I", "F")):
        raise PictureError(
            f"{path} has more than 8 bits a channel (PIL mode {mode!r}). Convert the pictures to "
            "8 bits, with the scaling that suits them."
        )


def unreadable(path: str, error: Exception, remedy: str = "Restore the file.") -> PictureError:
    """The error that names a damaged picture, and says what to do."""
    return PictureError(f"The picture {path} cannot be read ({type(error).__name__}: {error}). {remedy}")
