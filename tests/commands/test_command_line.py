"""What the commands share: which errors are the user's."""

from __future__ import annotations

import pytest
from torch._utils import ExceptionWrapper

from detr_family.data.images import ImageError, read_image
from detr_family.errors import UserError, message_of, mistakes


def test_errors_of_files_and_settings_are_the_users() -> None:
    with pytest.raises(UserError, match="SEED is -3"), mistakes():
        raise ValueError("SEED is -3")
    with pytest.raises(UserError, match="No such file or directory: 'nowhere'"), mistakes():
        open("nowhere").close()
    with pytest.raises(ImageError), mistakes():
        raise ImageError("stays what it is")


def test_a_bug_keeps_its_traceback() -> None:
    with pytest.raises(ValueError, match="too many values"), mistakes():
        _height, _width = (3, 4, 5)
    with pytest.raises(ValueError, match="invalid literal"), mistakes():
        int("x")
    with pytest.raises(RuntimeError), mistakes():
        raise RuntimeError("shapes differ")


def test_a_data_workers_traceback_is_left_out() -> None:
    try:
        read_image("nowhere.png", "RGB")
    except ImageError as error:
        wrapped, alone = ExceptionWrapper(where="in DataLoader worker process 0"), str(error)
    with pytest.raises(ImageError, match="Original Traceback") as caught:
        wrapped.reraise()
    assert message_of(caught.value) == alone and "nowhere.png" in alone
