"""The benchmark of data loading: what it measures gives images and boxes, and each has a line."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from detr_family.benchmarks.loading import main, readers, write_images


def test_all_readers_give_an_image_of_the_size_and_its_boxes(tmp_path: Path) -> None:
    (record,) = write_images(tmp_path, 1, (48, 64))
    for name, read in readers("detr_r50").items():
        found = read(record)
        image = found["image"] if isinstance(found, dict) else found[0]
        count = len(found["instances"] if isinstance(found, dict) else found[1])
        if name.startswith("resized"):
            assert tuple(image.shape) in ((3, 800, 1066), (3, 800, 1067)) and count == 7, name  # Detectron2 rounds up
        else:
            assert image.shape[0] == 3 and 480 <= min(image.shape[1:]) <= 800


def test_a_line_for_each(capsys: pytest.CaptureFixture) -> None:
    main(["--size", "24", "32", "--images", "1", "--repeats", "1"])
    lines = capsys.readouterr().out.splitlines()[2:]
    assert len(lines) >= 6 and all(re.fullmatch(r"(recipe|resized), [\w ]+ +[\d.]+ +[\d.]+", line) for line in lines)
