"""Which errors are said to be OUTPUT_DIR's."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from detr_family.engine.interruption import StorageError, explanation


@pytest.mark.parametrize("number", [errno.EACCES, errno.EIO, errno.ESTALE])
def test_an_image_that_cannot_be_read_is_no_error_of_the_output_folder(number: int, tmp_path: Path) -> None:
    folder = str(tmp_path / "out")  # of a machine that does not share it: it is not even there
    assert explanation(OSError(number, "no", str(tmp_path / "images" / "a.jpg")), folder) is None
    assert explanation(OSError(number, "no", str(tmp_path / "output" / "a.jpg")), folder) is None
    assert isinstance(explanation(OSError(number, "no", folder + "/metrics.json"), folder), StorageError)
    assert isinstance(explanation(OSError(number, "no"), folder), StorageError)
