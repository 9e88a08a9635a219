"""The command `predict`: any number of images over processes, gone on with after an interruption."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from PIL import Image
from predicting import NAMES, config_text
from pycocotools.coco import COCO

from detr_family.checkpoint import DETRCheckpointer
from detr_family.commands.predict import command, share_of
from detr_family.inference import journal
from detr_family.inference.many import predict_many
from detr_family.inference.predictor import Predictor

ROOT = Path(__file__).resolve().parents[2]
MANY = int(os.environ.get("DETR_FAMILY_MANY_IMAGES", "300"))  # 100000 for the whole test: half an hour


def write_images(folder: Path, count: int, sizes: tuple[tuple[int, int], ...] = ((40, 64), (64, 48))) -> Path:
    folder.mkdir()
    rng = np.random.default_rng(0)
    for i in range(count):
        pixels = rng.integers(0, 256, (*sizes[i % len(sizes)], 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i:06d}.png", compress_level=0)
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Seven images of two sizes, one of them below, and one that is damaged; a configuration and a checkpoint."""
    images = write_images(tmp_path / "images", 7)
    (images / "below").mkdir()
    (images / "000003.png").rename(images / "below" / "3.png")
    (images / "broken.png").write_bytes((images / "000000.png").read_bytes()[:200])
    (tmp_path / "config.yaml").write_text(config_text("DETR"))
    DETRCheckpointer(tiny.build("DETR"), str(tmp_path), class_names=NAMES).save("weights")
    return tmp_path


def arguments(folder: Path, output: str = "out", *more: str, given: str = "images", batch: int = 1) -> list[str]:
    result = ["--config-file", str(folder / "config.yaml"), "--weights", str(folder / "weights.pth")]
    result += ["--output", str(folder / output), "--confidence-threshold", "0", "--batch-size", str(batch)]
    return [*result, "--num-workers", "0", "--input", str(folder / given), *more]


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for path in sorted(folder.glob("part-*.jsonl")) for line in path.open()]


def test_what_is_found_is_what_the_predictor_finds(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command(arguments(folder, batch=2)) == 1
    said = capsys.readouterr()
    assert "7 images, 49 boxes" in said.out
    assert said.err.count("broken.png cannot be read") == 1 and "1 could not be read" in said.err
    out = folder / "out"
    predictor = Predictor.from_config(str(folder / "config.yaml"), str(folder / "weights.pth"))
    loaded = COCO(str(out / "images.json"))
    results = loaded.loadRes(str(out / "results.json"))
    assert [entry["name"] for entry in loaded.dataset["categories"]] == NAMES
    assert any(entry["file_name"].endswith("below/3.png") for entry in loaded.dataset["images"])
    for image in loaded.dataset["images"]:
        expected = predictor(image["file_name"])
        found = [results.anns[i] for i in results.getAnnIds(image["id"])]
        assert (image["height"], image["width"]) == expected.image_size
        assert [x["category_id"] - 1 for x in found] == expected.pred_classes.tolist()
        assert np.allclose([x["score"] for x in found], expected.scores, atol=1e-5)
        boxes = np.array([x["bbox"] for x in found])
        boxes[:, 2:] += boxes[:, :2]
        assert np.allclose(boxes, expected.pred_boxes.tensor, atol=2e-3)


def test_an_interrupted_run_goes_on_and_does_no_image_twice(folder: Path) -> None:
    assert command(arguments(folder, "whole")) == 1
    assert command(arguments(folder)) == 1
    part = folder / "out" / "part-00000.jsonl"
    kept = part.read_bytes().splitlines(keepends=True)
    part.write_bytes(b"".join(kept[:4]) + kept[4][:-20])  # as a killed process leaves it
    assert command(arguments(folder)) == 1
    names = [line["file_name"] for line in lines(folder / "out") if "error" not in line]
    assert len(names) == len(set(names)) == 7
    for name in ("results.json", "images.json"):
        assert (folder / "out" / name).read_bytes() == (folder / "whole" / name).read_bytes()
    before = part.stat().st_size
    (folder / "images" / "broken.png").unlink()
    assert command(["--output", str(folder / "out"), "--merge"]) == 1  # knows of no inputs
    assert command(arguments(folder)) == 0  # nothing is left to do, and what could not be read is no input any more
    assert part.stat().st_size == before
    Image.new("RGB", (20, 10)).save(folder / "images" / "broken.png")
    assert command(arguments(folder)) == 0  # tried again
    assert len(json.loads((folder / "out" / "images.json").read_text())["images"]) == 8


def test_a_parquet_file_when_asked_for(folder: Path) -> None:
    pytest.importorskip("pyarrow")
    assert command(arguments(folder, "out", "--parquet")) == 1
    assert (folder / "out" / "results.parquet").is_file()


def test_shares_by_any_number_of_processes_and_merging(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command(arguments(folder, "whole")) == 1
    assert command(arguments(folder, "out", "--shard", "1/3")) == 0
    assert not (folder / "out" / "results.json").exists()
    assert command(arguments(folder, "out", "--shard", "0/2")) == 0  # another number of shares
    assert command(arguments(folder, "out", "--shard", "1/2")) == 0
    assert command(["--output", str(folder / "out"), "--merge"]) == 1
    names = [line["file_name"] for line in lines(folder / "out") if "error" not in line]
    assert len(names) == len(set(names)) == 7
    assert (folder / "out" / "results.json").read_bytes() == (folder / "whole" / "results.json").read_bytes()


def test_other_settings_are_refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command(arguments(folder)) == 1
    capsys.readouterr()
    for change, message in {
        ("--tile", "40"): "tile was 0 and is now 40",
        ("--opts", "INPUT.MIN_SIZE_TEST", "80"): "configuration was",
        ("--confidence-threshold", "0.25"): "confidence_threshold was 0.0 and is now 0.25",
    }.items():
        with pytest.raises(SystemExit, match="2"):
            command([*arguments(folder), *change])
        assert message in capsys.readouterr().err
    no_change = ["--opts", "TEST.EVAL_PERIOD", "7", "INPUT.RANDOM_FLIP", "none"]
    assert command([*arguments(folder), "--batch-size", "3", "--num-workers", "1", *no_change]) == 1
    DETRCheckpointer(tiny.build("DETR", NUM_QUERIES=5), str(folder), class_names=NAMES).save("weights")
    with pytest.raises(SystemExit, match="2"):
        command([*arguments(folder), "--opts", "MODEL.DETR.NUM_QUERIES", "5"])
    assert "weights was weights.pth" in capsys.readouterr().err
    assert command([*arguments(folder), "--restart", "--opts", "MODEL.DETR.NUM_QUERIES", "5"]) == 1


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--shard", "2/2"], "--shard is '2/2'"),
        (["--shard", "0/2", "--num-processes", "2"], "without --num-processes and torchrun"),
        (["--shard", "0/2", "--restart"], "would delete what other shards found"),
        (["--confidence-threshold", "7"], "--confidence-threshold is 7.0"),
        (["--num-workers", "-1"], "--num-workers -1"),
    ],
)
def test_command_lines_that_cannot_be(
    more: list[str], message: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command([*arguments(folder), *more]) == 2
    assert message in capsys.readouterr().err and not (folder / "out").exists()
    assert share_of("7/8") == (7, 8)


def test_tiles_and_coco_files(folder: Path) -> None:
    known = [{"id": 90, "file_name": "000001.png"}, {"id": 5, "file_name": "000002.png"}]
    categories = [{"id": 10 * (i + 1), "name": name} for i, name in enumerate(NAMES)]
    (folder / "coco.json").write_text(json.dumps({"images": known, "categories": categories}))
    more = ("--tile", "40", "--image-root", str(folder / "images"))
    assert command(arguments(folder, "out", *more, given="coco.json")) == 0
    results = json.loads((folder / "out" / "results.json").read_text())
    assert {entry["image_id"] for entry in results} == {5, 90}
    predictor = Predictor.from_config(str(folder / "config.yaml"), str(folder / "weights.pth"), tile=40)
    expected = predictor(folder / "images" / "000001.png")
    found = [entry for entry in results if entry["image_id"] == 90]
    assert np.allclose([entry["score"] for entry in found], expected.scores, atol=1e-5)
    assert [entry["category_id"] // 10 - 1 for entry in found] == expected.pred_classes.tolist()


def test_an_image_that_the_detector_refuses_does_not_stop_the_rest(folder: Path) -> None:
    predictor = Predictor.from_config(str(folder / "config.yaml"), str(folder / "weights.pth"), batch_size=2)
    from detr_family.inference.work import find_work

    def refuse(module: Any, inputs: Any) -> None:
        for image in inputs[0]:
            if image["height"] > 60 and (image["image"][0, 0, 0] % 2).item():
                raise ValueError("an image is smaller than the file takes")

    predictor.model.register_forward_pre_hook(refuse)
    work = find_work([str(folder / "images")])
    journal.begin(folder / "out", {}, NAMES, [1, 2, 3], restart=False)
    predict_many(predictor, work, folder / "out", category_ids=[1, 2, 3], threshold=0.0, workers=0, progress=False)
    failed = journal.merge(folder / "out").failed
    assert 1 <= sum("smaller than the file takes" in reason for _, reason in failed) <= 3
    assert len(lines(folder / "out")) == 8


def test_what_cannot_be_merged_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    journal.begin(tmp_path, {}, NAMES, [1, 2, 3], restart=False)
    (tmp_path / "part-00000.jsonl").write_text("3\n[]\n{}\n")  # not ours
    (tmp_path / "results.json").mkdir()
    for change, said in ((None, "results.json"), ("[]", "run.json is not of a run"), ("{", "run.json is damaged")):
        if change:
            (tmp_path / "run.json").write_text(change)
        assert command(["--output", str(tmp_path), "--merge"]) == 2
        error = capsys.readouterr().err
        assert said in error and error.startswith("predict: ") and error.count("\n") == 1


def test_a_video_is_shared_frame_by_frame(folder: Path) -> None:
    cv2 = pytest.importorskip("cv2", reason="opencv is not installed")
    writer = cv2.VideoWriter(str(folder / "clip.mp4"), cv2.VideoWriter.fourcc(*"mp4v"), 10.0, (64, 48))
    for i in range(9):
        writer.write(np.full((48, 64, 3), 20 * i, np.uint8))
    writer.release()
    assert command(arguments(folder, "whole", given="clip.mp4")) == 0
    for shard in ("0/2", "1/2", "1/3"):
        assert command(arguments(folder, "out", "--shard", shard, given="clip.mp4")) == 0
    assert command(["--output", str(folder / "out"), "--merge"]) == 0
    assert sorted(line["frame"] for line in lines(folder / "out")) == list(range(1, 10))
    assert len(lines(folder / "out")) == 9
    assert (folder / "out" / "results.json").read_bytes() == (folder / "whole" / "results.json").read_bytes()
    (folder / "broken.avi").write_bytes(b"no video")
    assert command(arguments(folder, "bad", given="broken.avi")) == 1


def start(folder: Path, *launcher: str, output: str = "out", more: tuple[str, ...] = ()) -> subprocess.Popen[str]:
    # The tiny detector's backbone is registered by a module of the tests.
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    given = [*arguments(folder, output, "--num-workers", "1", *more), "--import", "tiny"]
    command = [sys.executable, *launcher, "tools/predict.py", *given]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=pipe, stderr=pipe, text=True)


def family_of(process: int) -> list[int]:
    """A process and all that it has started, directly or not."""
    parents: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdecimal():
                parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
                parents.setdefault(parent, []).append(int(entry.name))
        except OSError:  # ended meanwhile
            pass
    found = [process]
    for one in found:
        found += parents.get(one, [])
    return found


def memory_of(processes: list[int]) -> int:
    """Bytes that processes have in memory, what they share counted once."""
    total = 0
    for process in processes:
        try:
            text = Path("/proc", str(process), "smaps_rollup").read_text()
        except OSError:
            continue
        total += int(text.split("Pss:")[1].split()[0]) * 1024
    return total


@pytest.mark.slow
def test_many_images_on_two_processes_that_are_killed_once(folder: Path) -> None:
    """Killed in the middle and started again, by another launcher: every image once, flat memory.

    DETR_FAMILY_MANY_IMAGES says how many.
    """
    count = MANY
    write_images(folder / "many", count)
    (folder / "images").rename(folder / "few")
    (folder / "many").rename(folder / "images")
    memory: list[int] = []

    def watch(process: subprocess.Popen[str], until: int) -> None:
        reached: list[int] = []
        while process.poll() is None and len(reached) < until:
            time.sleep(0.5 if count < 2000 else 5.0)
            parts = sorted((folder / "out").glob("part-*.jsonl"))
            reached = [i for part in parts for i in range(part.read_bytes().count(b"\n"))]
            if len(reached) > count // 10:
                memory.append(memory_of(family_of(process.pid)))

    first = start(folder, more=("--num-processes", "2"))
    watch(first, count // 3)
    assert first.poll() is None, first.communicate()[1][-3000:]
    for process in family_of(first.pid):
        os.kill(process, signal.SIGKILL)
    first.communicate()
    middle = len(lines_that_are_whole(folder / "out"))
    assert 0 < middle < count
    second = start(folder, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    watch(second, 10 * count)
    said, errors = second.communicate(timeout=60)
    assert not second.returncode, errors[-3000:]
    assert f"{count} images" in said
    names = [line["file_name"] for line in lines(folder / "out")]
    assert len(names) == len(set(names)) == count
    assert len(list((folder / "out").glob("part-*.jsonl"))) == 2
    known = json.loads((folder / "out" / "images.json").read_text())
    assert len(known["images"]) == count
    if len(memory) > 20 and count >= 5000:
        start_, end = np.median(memory[: len(memory) // 4]), np.median(memory[-len(memory) // 4 :])
        assert end < 1.1 * start_ + 20e6, f"{start_ / 1e6:.0f} MB became {end / 1e6:.0f}"


def lines_that_are_whole(folder: Path) -> list[bytes]:
    found = [line for path in folder.glob("part-*.jsonl") for line in path.read_bytes().splitlines(keepends=True)]
    return [line for line in found if line.endswith(b"\n")]
