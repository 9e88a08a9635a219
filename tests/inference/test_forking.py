"""What a predictor does in a process that was forked after it was made. (projects/serving forks a real one.)"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from test_image_source import Recorder

from detr_family.errors import UserError
from detr_family.inference import Predictor, exported, forking
from detr_family.inference.exported import ExportedDetector

IMAGE = np.zeros((8, 9, 3), np.uint8)


def test_it_goes_on_with_one_thread_and_says_so_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    threads = [4]
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads[0])
    monkeypatch.setattr(torch, "set_num_threads", lambda count: threads.__setitem__(0, count))
    monkeypatch.setattr(forking, "_used_in", None)
    predictor = Predictor(Recorder(), min_size=0)
    predictor(IMAGE)
    assert threads == [4] and not caplog.messages
    parent = os.getpid()
    monkeypatch.setattr(os, "getpid", lambda: 77)
    predictor(IMAGE)
    predictor(IMAGE)
    assert threads == [1]
    assert [f"Process 77 was forked from {parent}" in message for message in caplog.messages] == [True]


def test_one_thread_needs_no_warning(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    monkeypatch.setattr(forking, "_used_in", None)
    predictor = Predictor(Recorder(), min_size=0)
    monkeypatch.setattr(os, "getpid", lambda: 77)
    predictor(IMAGE)
    assert not caplog.messages


@pytest.mark.parametrize("suffix", [".onnx", ".xml"])
def test_a_runtimes_file_is_to_be_opened_again(suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / f"model{suffix}"
    path.touch()
    monkeypatch.setattr(exported, "_open", lambda *_: (None, {"num_classes": 3}))
    detector = ExportedDetector(path)
    monkeypatch.setattr(os, "getpid", lambda: 77)
    with pytest.raises(UserError, match=rf"model\{suffix} was opened in process \d+; this one, 77, was forked from it"):
        detector([{"image": torch.zeros(3, 8, 9)}])
