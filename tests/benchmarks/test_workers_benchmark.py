"""The benchmark of data workers: the made-up file is one of COCO's, and each way has a line."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from detr_family.benchmarks.workers import main, write_dataset
from detr_family.data.datasets.coco_json import scan_coco_json


def test_the_made_up_file_is_read_without_a_fault(tmp_path: Path) -> None:
    scan = scan_coco_json(str(write_dataset(tmp_path, 40, 200)), str(tmp_path))
    assert len(scan.records) == 40 and scan.num_annotations == 200 and not scan.faults
    assert all(Path(record["file_name"]).is_file() for record in scan.records)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc")
def test_a_line_for_each_way(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--images", "64", "--annotations", "300", "--workers", "2"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("64 images, 300 annotations") and len(lines) == 4
    for line in lines[2:]:
        *_, read, first, size, own, most = line.split()
        assert float(read) < float(first) and float(size) < 2 and 0 < float(own) <= float(most)
