"""What a file is that is not what it is taken for: told by its first bytes, with what helps."""

from __future__ import annotations

import os

_HEADS: dict[bytes, tuple[str, str]] = {
    b"version https://git-lfs": ("a pointer of Git LFS, not the file itself", "Fetch the file: git lfs pull."),
    b"\x1f\x8b": ("packed by gzip", "Unpack it."),
    b"PK\x03\x04": ("packed by zip", "Unpack it."),
    b"BZh": ("packed by bzip2", "Unpack it."),
    b"\xfd7zXZ": ("packed by xz", "Unpack it."),
    b"\x28\xb5\x2f\xfd": ("packed by zstd", "Unpack it."),
    b"\xff\xfe": ("text in UTF-16", "Save it as UTF-8."),
    b"\xfe\xff": ("text in UTF-16", "Save it as UTF-8."),
}
# What images can be made of; where none is wanted, another file is meant.
_PICTURES: dict[bytes, tuple[str, str]] = {
    b"%PDF": ("a PDF document", "Make images of its pages."),
    b"\xff\x0a": ("in JPEG XL, which Pillow does not read", "Convert it to JPEG or PNG."),
    b"\x00\x00\x00\x0cJXL ": ("in JPEG XL, which Pillow does not read", "Convert it to JPEG or PNG."),
    b"\x93NUMPY": ("an array of numpy", "Save it as an image."),
}
_IMAGES = {b"\x89PNG": "a PNG image", b"\xff\xd8\xff": "a JPEG image"}
_VIDEO = ("a video", "Take its frames out, or give it to demo.py, which reads videos.")
_HEIF = ("in HEIC or AVIF, which this Pillow does not read", "Convert it to JPEG or PNG.")
_DICOM = ("DICOM", "Convert its frames to PNG, with the scaling of grey that suits them.")
_HEIF_BRANDS = (b"heic", b"heix", b"hevc", b"mif1", b"msf1", b"avif", b"avis")


def told_by_head(path: str, wanted: str = "") -> tuple[str, str] | None:
    """What a file is, and the remedy; None where nothing is known of it, or it cannot be read.

    Args:
        path: of a file that could not be read as what it should be.
        wanted: what it should be, as in "Name ... instead"; an image by default.
    """
    try:
        with open(path, "rb") as file:
            head, size = file.read(512), os.fstat(file.fileno()).st_size
    except OSError:
        return None
    if not size:
        return "empty", "Restore it."
    if not head.strip(b"\x00"):
        return "nothing but zeros at its beginning, as of a copy that was cut off", "Restore it."
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    if text.startswith((b"<!doctype html", b"<html")):
        return "a web page, as of a download that was refused", "Fetch it again."
    if text.startswith((b"<?xml", b"<svg", b"<annotation")):
        return "SVG" if b"<svg" in text else "XML", "Name the file that is meant, or convert it."
    found = next((told for beginning, told in _HEADS.items() if head.startswith(beginning)), None)
    if found is not None:
        return found
    picture = _picture(head)
    if not wanted:
        return picture
    what = picture[0].split(",")[0] if picture else next((w for b, w in _IMAGES.items() if head.startswith(b)), None)
    return None if what is None else (what, f"Name {wanted} instead.")


def _picture(head: bytes) -> tuple[str, str] | None:
    """What a file that is not read as an image is, if images can be made of it, and how."""
    if head[128:132] == b"DICM":
        return _DICOM
    if head[4:8] == b"ftyp":
        return _HEIF if head[8:12] in _HEIF_BRANDS else _VIDEO
    return next((told for beginning, told in _PICTURES.items() if head.startswith(beginning)), None)
