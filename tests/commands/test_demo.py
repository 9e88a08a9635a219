"""The demo as a command: what it takes, what it writes, and what it says where something is wrong."""

from __future__ import annotations

import importlib.util
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import Boxes, Instances
from own_data import CATEGORIES, write
from PIL import Image
from predicting import NAMES, Bomb, config, config_text
from pycocotools.coco import COCO

from detr_family.checkpoint import DETRCheckpointer
from detr_family.commands.demo import Results, category_ids, parser, run

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three images, one of them damaged, a text; a configuration and a checkpoint of a tiny detector."""
    images = tmp_path / "images"
    images.mkdir()
    for seed, name in enumerate(("a.png", "b.jpg", "c.png")):
        pixels = np.random.default_rng(seed).integers(0, 256, (40 + 8 * seed, 64, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(images / name)
    (images / "broken.png").write_bytes((images / "a.png").read_bytes()[:200])
    (images / "notes.txt").write_text("text")
    (tmp_path / "config.yaml").write_text(config_text("DETR"))
    DETRCheckpointer(tiny.build("DETR"), str(tmp_path), class_names=NAMES).save("weights")
    return tmp_path


def demo(folder: Path, *inputs: str | Path, threshold: str = "0", more: tuple[str, ...] = ()) -> int:
    arguments = ["--config-file", str(folder / "config.yaml"), "--weights", str(folder / "weights.pth")]
    arguments += ["--output", str(folder / "out"), "--confidence-threshold", threshold, "--batch-size", "2", *more]
    return run(parser().parse_args([*arguments, "--input", *map(str, inputs)]), progress=False)


def read(folder: Path, name: str) -> Any:
    return json.loads((folder / "out" / name).read_text())


def test_a_folder_gives_drawn_images_and_json_and_names_what_is_broken(
    folder: Path, capsys: pytest.CaptureFixture
) -> None:
    assert demo(folder, folder / "images") == 1
    said = capsys.readouterr()
    assert "3 images, 21 boxes" in said.out
    assert "1 could not be read" in said.err and "broken.png cannot be read" in said.err
    assert "1 files are no images" in said.err
    out = folder / "out"
    assert sorted(p.name for p in out.iterdir()) == ["a.png", "b.jpg", "c.png", "images.json", "results.json"]
    drawn, source = (np.asarray(Image.open(p / "a.png").convert("RGB")) for p in (out, folder / "images"))
    assert drawn.shape == source.shape and (drawn != source).any()


def test_the_json_is_what_pycocotools_takes(folder: Path) -> None:
    assert demo(folder, folder / "images" / "a.png", folder / "images" / "c.png") == 0
    results, images = read(folder, "results.json"), read(folder, "images.json")
    assert [category["name"] for category in images["categories"]] == NAMES
    assert [Path(image["file_name"]).name for image in images["images"]] == ["a.png", "c.png"]
    loaded = COCO(str(folder / "out" / "images.json")).loadRes(str(folder / "out" / "results.json"))
    assert len(loaded.anns) == len(results) == 14
    heights = {image["id"]: image["height"] for image in images["images"]}
    for entry in results:
        x, y, width, height = entry["bbox"]
        assert x >= 0 and y >= 0 and x + width <= 64.001 and y + height <= heights[entry["image_id"]] + 0.001
        assert entry["category_id"] in {category["id"] for category in images["categories"]}


def test_the_threshold_holds_and_a_high_one_is_explained(folder: Path, capsys: pytest.CaptureFixture) -> None:
    demo(folder, folder / "images" / "a.png")
    scores = sorted(entry["score"] for entry in read(folder, "results.json"))
    middle = (scores[3] + scores[4]) / 2
    assert demo(folder, folder / "images" / "a.png", threshold=str(middle)) == 0
    assert [entry["score"] for entry in read(folder, "results.json")] == pytest.approx(scores[:3:-1])
    assert demo(folder, folder / "images" / "a.png", threshold="1") == 0
    assert f"The best score of all is {scores[-1]:.3f}" in capsys.readouterr().out
    assert demo(folder, folder / "images" / "a.png", threshold="7") == 2
    assert "--confidence-threshold is 7.0" in capsys.readouterr().err


def test_category_ids_are_those_of_the_dataset_where_it_is_here(coco_folder: Path) -> None:
    cfg = config("DETR")
    assert category_ids(cfg, NAMES) == [1, 2, 3]
    from detr_family.data import register_coco_format

    register_coco_format("demo ids", write(coco_folder), str(coco_folder))
    register_coco_format("demo gone", str(coco_folder / "gone.json"), str(coco_folder))
    cfg.DATASETS.TRAIN = ("demo gone", "demo ids")
    ordered = sorted(CATEGORIES, key=lambda category: category["id"])
    names = [category["name"] for category in ordered]
    assert category_ids(cfg, names) == [3, 7, 100]
    assert category_ids(cfg, names[::-1]) == [1, 2, 3]
    coco = MetadataCatalog.get("coco_2017_val").thing_classes
    assert category_ids(cfg, coco)[-1] == 90
    assert "demo ids" in DatasetCatalog


def test_inputs_that_are_nothing(folder: Path, capsys: pytest.CaptureFixture) -> None:
    (folder / "empty").mkdir()
    for given, message in {
        "empty": "has no image or video among its 0 files",
        "none.png": "is no file or folder, and as a pattern it matches no file",
        "images/*.txt": "has no image or video among its 1 files",
    }.items():
        assert demo(folder, folder / given) == 2
        error = capsys.readouterr().err
        assert message in error and given in error and "Traceback" not in error
    assert not (folder / "out").exists()


def test_a_list_is_taken_and_folders_below_a_folder_are_not(folder: Path) -> None:
    (folder / "images" / "below").mkdir()
    Image.new("RGB", (30, 20)).save(folder / "images" / "below" / "d.png")
    (folder / "list.txt").write_text("images/c.png\nimages/a.png\n")
    assert demo(folder, folder / "list.txt", folder / "images") == 1  # broken.png
    names = [Path(image["file_name"]).name for image in read(folder, "images.json")["images"]]
    assert names == ["c.png", "a.png", "b.jpg"]


def test_images_of_one_name_are_both_written(folder: Path) -> None:
    (folder / "more").mkdir()
    Image.new("RGB", (30, 20)).save(folder / "more" / "a.png")
    assert demo(folder, folder / "images" / "a.png", folder / "more" / "a.png") == 0
    assert Image.open(folder / "out" / "a.png").size == (64, 40)
    assert Image.open(folder / "out" / "a_2.png").size == (30, 20)


def test_a_detector_of_ones_own_is_made_known_first(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cfg = config("DETR")
    cfg.MODEL.META_ARCHITECTURE = "DetrOfTheTests"
    (folder / "config.yaml").write_text(cfg.dump())
    (folder / "detector_of_the_tests.py").write_text(
        "from detectron2.modeling import META_ARCH_REGISTRY\n"
        "from detr_family.modeling.detr import DETR\n"
        "@META_ARCH_REGISTRY.register()\n"
        "class DetrOfTheTests(DETR):\n"
        "    pass\n"
    )
    monkeypatch.chdir(folder)
    assert demo(folder, folder / "images" / "a.png", more=("--import", "detector_of_the_tests")) == 0
    with pytest.raises(SystemExit):
        demo(folder, folder / "images" / "a.png", more=("--import", "detector_of_nobody"))


@pytest.mark.parametrize("suffix", [".pth", ".pkl"])
def test_a_malicious_checkpoint_is_refused(folder: Path, suffix: str, capsys: pytest.CaptureFixture) -> None:
    content = {"model": {"a": torch.zeros(2)}, "class_names": [Bomb(folder / "exploded")]}
    path = folder / f"bomb{suffix}"
    torch.save(content, path) if suffix == ".pth" else path.write_bytes(pickle.dumps(content))
    assert demo(folder, folder / "images", more=("--weights", str(path))) == 2
    assert "loaded safely" in capsys.readouterr().err and not (folder / "exploded").exists()


def test_a_video_without_opencv(folder: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "clip.mp4").write_bytes(b"")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert demo(folder, folder / "clip.mp4") == 2
    assert "a video needs OpenCV" in capsys.readouterr().err


def test_a_video(folder: Path, capsys: pytest.CaptureFixture) -> None:
    cv2 = pytest.importorskip("cv2", reason="opencv is not installed")
    writer = cv2.VideoWriter(str(folder / "clip.mp4"), cv2.VideoWriter.fourcc(*"mp4v"), 10.0, (64, 48))
    for shade in range(5):
        writer.write(np.full((48, 64, 3), 50 * shade, np.uint8))
    writer.release()
    (folder / "broken.avi").write_bytes(b"no video")
    assert demo(folder, folder / "clip.mp4", folder / "broken.avi", folder / "images" / "a.png") == 1
    assert "broken.avi cannot be read" in capsys.readouterr().err
    capture = cv2.VideoCapture(str(folder / "out" / "clip.mp4"))
    frames = 0
    while capture.read()[0]:
        frames += 1
    assert frames == 5 and capture.get(cv2.CAP_PROP_FPS) == 10
    names = [Path(image["file_name"]).name for image in read(folder, "images.json")["images"]]
    assert names == ["a.png", *(f"clip.mp4#{i:06d}" for i in range(1, 6))]


@pytest.mark.slow
def test_the_program_itself(folder: Path) -> None:
    command = [sys.executable, str(ROOT / "demo.py"), "--config-file", str(ROOT / "configs/detr_quickstart.yaml")]
    command += ["--weights", str(folder / "none.pth"), "--input", str(folder / "images")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    ended = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment, check=False)
    assert ended.returncode == 2
    assert "there is no checkpoint" in ended.stderr.splitlines()[-1] and "Traceback" not in ended.stderr


def test_results_of_processes_are_those_of_one() -> None:
    def results(part: int, parts: int) -> Results:
        result = Results(NAMES, [1, 2, 3])
        for name in [f"{i}.png" for i in range(5)][part::parts] + (["a#b.mp4#000001", "a#b.mp4#000002"] * (part == 0)):
            classes = torch.tensor([0, len(name) % 3])
            instances = Instances((20, 30), scores=torch.tensor([0.9, 0.5]), pred_classes=classes)
            instances.pred_boxes = Boxes(torch.tensor([[1.0, 2, 3, 4]] * 2))
            result.add(name, instances, 0.6 if name == "2.png" else 0.0)
        return result

    order = [Path(name) for name in ("0.png", "1.png", "2.png", "3.png", "4.png", "a#b.mp4")]
    one = results(0, 1)
    for parts in (2, 3, 7):
        together = Results.together([results(part, parts) for part in range(parts)], order)
        assert (together.images, together.detections, together.best) == (one.images, one.detections, one.best)


@pytest.mark.slow
def test_torchruns_processes_draw_their_shares(folder: Path) -> None:
    assert demo(folder, folder / "images") == 1
    expected = {name: read(folder, name) for name in ("results.json", "images.json")}
    (folder / "out").rename(folder / "one")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "demo.py"]
    command += ["--config-file", str(folder / "config.yaml"), "--weights", str(folder / "weights.pth")]
    command += ["--import", "tiny"]
    command += ["--output", str(folder / "out"), "--confidence-threshold", "0", "--input", str(folder / "images")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}
    ran = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert not ran.returncode, ran.stderr[-3000:]
    assert ran.stdout.count("3 images, 21 boxes") == 1 and ran.stderr.count("broken.png cannot be read") == 1
    assert read(folder, "images.json") == expected["images.json"]
    scores = [[entry["score"] for entry in found] for found in (read(folder, "results.json"), expected["results.json"])]
    assert scores[0] == pytest.approx(scores[1], abs=1e-5)
    assert {path.name for path in (folder / "out").iterdir()} == {path.name for path in (folder / "one").iterdir()}
