"""Many images: what a command line names, batches by size, and journals that outlive their process."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pycocotools.coco import COCO

from detr_family.errors import UserError
from detr_family.inference.journal import Journal, begin, done, merge, parts_of
from detr_family.inference.many import _Read, by_size
from detr_family.inference.work import find_work


def read(number: int, shape: tuple[int, ...]) -> _Read:
    return _Read({"file_name": f"{number}"}, np.zeros(shape, np.uint8), (1, 1), "")


def test_batches_are_of_one_size_and_few_images_wait() -> None:
    shapes = [(3, 4, 5), (3, 5, 4), (3, 4, 5), (3, 6, 6), (3, 5, 4), (3, 4, 5)]
    batches = list(by_size((read(i, shape) for i, shape in enumerate(shapes)), 2))
    assert [[item.line["file_name"] for item in batch] for batch in batches] == [["0", "2"], ["1", "4"], ["3"], ["5"]]
    taken = []

    def all_different() -> Any:
        for i in range(1000):
            taken.append(i)
            yield read(i, (3, 1, i + 1))

    first = next(by_size(all_different(), 2))
    assert len(taken) == 16 and first[0].line["file_name"] == "0"  # the one that waited longest


def images(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 6)).save(folder / name)


def test_folders_globs_and_lists(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images(tmp_path, "a/1.png", "a/b/2.jpg", "a/b/c/3.PNG", "4.png")
    (tmp_path / "a" / "notes.md").write_text("text")
    (tmp_path / "a" / "b" / "clip.MP4").write_bytes(b"")
    (tmp_path / "list.txt").write_text("4.png\n\na/1.png\na/b/gone.png\n")
    work = find_work([str(tmp_path / "a"), str(tmp_path / "list.txt"), str(tmp_path / "**" / "*.png")])
    names = [str(Path(item.path).relative_to(tmp_path)) for item in work.images]
    assert names == ["a/1.png", "a/b/2.jpg", "a/b/c/3.PNG", "4.png", "a/b/gone.png"]
    assert [Path(video).name for video in work.videos] == ["clip.MP4"] and work.others == 1
    (tmp_path / "a" / ".hidden.png").write_bytes(b"")
    work = find_work([str(tmp_path / "a"), str(tmp_path / "a" / "b" / "*")], below=False)
    assert [Path(item.path).name for item in work.images] == ["1.png", "2.jpg"] and work.others == 1
    (tmp_path / "split" / "train").mkdir(parents=True)
    (tmp_path / "split" / "train" / "5.png").touch()
    assert [Path(item.path).name for item in find_work([str(tmp_path / "split")], below=False).images] == ["5.png"]
    monkeypatch.chdir(tmp_path / "a")
    (tmp_path / "a" / "b" / "here.txt").write_text("b/2.jpg\n")  # from the folder of the command, as `find` writes it
    assert [item.path for item in find_work(["b/here.txt"]).images] == ["b/2.jpg"]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("nothing", "is no file or folder, and as a pattern it matches no file"),
        ("empty", "has no image or video among its 1 files"),
        ("none.txt", "a list without a path"),
        ("gone.txt", r"of its paths \(x.png, y.png\) none is a file"),
        ("binary.txt", "is no list of paths"),
        ("bad.json", "the file is not JSON"),
        ("twice.json", "the image id 3 is there twice"),
        ("away.json", "its images .* are not in .*: give the folder with --image-root"),
    ],
)
def test_inputs_that_cannot_be(given: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "a.md").write_text("")
    (tmp_path / "none.txt").write_text("\n")
    (tmp_path / "gone.txt").write_text("x.png\ny.png\n")
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "bad.json").write_text("{")
    images(tmp_path, "a.png")
    for name, entries in {"twice": [("a.png", 3), ("b.png", 3)], "away": [("c.png", 1)]}.items():
        known = [{"file_name": file, "id": i} for file, i in entries]
        (tmp_path / f"{name}.json").write_text(json.dumps({"images": known, "categories": []}))
    with pytest.raises(ValueError, match=message):
        find_work([str(tmp_path / given)])


def test_coco_files_give_ids_and_categories(tmp_path: Path) -> None:
    images(tmp_path, "val2017/a.png", "val2017/b.png")
    (tmp_path / "annotations").mkdir()
    path = tmp_path / "annotations" / "instances_val2017.json"
    known = [{"file_name": "b.png", "id": 40}, {"file_name": "a.png", "id": 7}]
    path.write_text(json.dumps({"images": known, "categories": [{"id": 5, "name": "cat"}]}))
    for root in (None, str(tmp_path / "val2017")):
        work = find_work([str(path)], root)
        assert [(Path(item.path).name, item.name, item.image_id) for item in work.images] == [
            ("b.png", "b.png", 40),
            ("a.png", "a.png", 7),
        ]
        assert all(Path(item.path).is_file() for item in work.images) and work.categories == {"cat": 5}


def line(name: str, *scores: float, **more: Any) -> dict[str, Any]:
    found = [{"category_id": 2, "bbox": [1.0, 2.0, 3.0, 4.0], "score": score} for score in scores]
    return {"file_name": name, "width": 8, "height": 6, "best": max(scores, default=0.0), "detections": found, **more}


def start(folder: Path, **settings: Any) -> None:
    begin(folder, {"weights": "a", **settings}, ["red", "white"], [2, 9], restart=False)


def test_a_line_that_was_cut_off_is_written_again_and_the_others_are_kept(tmp_path: Path) -> None:
    start(tmp_path)
    journal = Journal(tmp_path, 0)
    journal.write(line("a.png", 0.5))
    journal.write({"file_name": "gone.png", "error": "no such file"})
    journal.close()
    path = tmp_path / "part-00000.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole + json.dumps(line("b.png", 0.25)).encode()[:-9])
    assert done(tmp_path) == {"a.png"}
    assert merge(tmp_path).images == 1  # also before anybody has mended it
    journal = Journal(tmp_path, 0)
    journal.write(line("b.png", 0.75))
    journal.close()
    assert path.read_bytes().startswith(whole) and done(tmp_path) == {"a.png", "b.png"}
    merged = merge(tmp_path)
    assert (merged.images, merged.detections, merged.best) == (2, 2, 0.75)
    assert merged.failed == [("gone.png", "no such file")]
    path.write_bytes(b"\0" * 200_000)  # no line end far and wide
    assert not done(tmp_path)
    Journal(tmp_path, 0).close()
    assert not path.stat().st_size


def test_merged_files_do_not_show_how_many_processes_there_were(tmp_path: Path) -> None:
    lines = [line(name, 0.5, 0.125) for name in ("c.png", "a.png")]
    lines += [line("b.mp4", 0.5, frame=frame) for frame in (12, 2)]
    lines += [line("z.png", image_id=30), line("y.png", 0.5, image_id=4)]
    for count in (1, 2, 5):
        folder = tmp_path / str(count)
        start(folder)
        for part in range(count):
            journal = Journal(folder, part)
            for entry in lines[part::count]:
                journal.write(entry)
            journal.write(lines[0])  # as where folders of two machines were put together
            journal.close()
        merged = merge(folder)
        assert (merged.images, merged.detections) == (6, 7)
        for name in ("results.json", "images.json"):
            assert (folder / name).read_bytes() == (tmp_path / "1" / name).read_bytes()
    known = json.loads((tmp_path / "5" / "images.json").read_text())
    assert [(entry["id"], entry["file_name"]) for entry in known["images"]] == [
        (4, "y.png"), (30, "z.png"), (31, "a.png"), (32, "b.mp4#000002"), (33, "b.mp4#000012"), (34, "c.png"),
    ]  # fmt: skip
    assert known["categories"] == [{"id": 2, "name": "red"}, {"id": 9, "name": "white"}]
    loaded = COCO(str(tmp_path / "5" / "images.json")).loadRes(str(tmp_path / "5" / "results.json"))
    assert len(loaded.anns) == 7
    assert not [path for path in (tmp_path / "5").iterdir() if path.name.startswith(".")]


def test_parquet(tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    start(tmp_path)
    journal = Journal(tmp_path, 0)
    journal.write(line("a.png", 0.5, 0.25))
    journal.close()
    merge(tmp_path, parquet=True)
    rows = parquet.read_table(tmp_path / "results.parquet").to_pylist()
    assert len(rows) == 2 and rows[1] == {
        "file_name": "a.png", "category": "red", "image_id": 1, "category_id": 2,
        "x": 1.0, "y": 2.0, "width": 3.0, "height": 4.0, "score": 0.25,
    }  # fmt: skip


def test_a_folder_of_other_settings_is_left_alone(tmp_path: Path) -> None:
    start(tmp_path, tile=0)
    Journal(tmp_path, 0).close()
    start(tmp_path, tile=0)
    with pytest.raises(UserError, match=r"other settings: tile was 0 and is now 800\. Give another --output"):
        start(tmp_path, tile=800)
    assert parts_of(tmp_path)
    begin(tmp_path, {"tile": 800}, ["red"], [1], restart=True)
    assert not parts_of(tmp_path)
    Journal(tmp_path, 3).close()
    (tmp_path / "run.json").unlink()
    with pytest.raises(UserError, match=r"has parts of a run and no run\.json"):
        start(tmp_path)
    with pytest.raises(UserError, match=r"has no results"):
        merge(tmp_path)


def test_two_runs_do_not_write_one_part(tmp_path: Path) -> None:
    journal = Journal(tmp_path, 0)
    script = (
        "import importlib.util, sys, pathlib, types\n"
        "for name in ('detr_family', 'detr_family.inference'):\n"  # the module alone: torch takes seconds
        "    sys.modules[name] = types.ModuleType(name); sys.modules[name].__path__ = [name.replace('.', '/')]\n"
        "from detr_family.inference.journal import Journal\n"
        "Journal(pathlib.Path(sys.argv[1]), 0)\n"
    )
    root = Path(__file__).resolve().parents[2]
    command = [sys.executable, "-c", script, str(tmp_path)]
    other = subprocess.run(command, cwd=root, capture_output=True, text=True)
    assert other.returncode and "is being written by another run" in other.stderr
    journal.close()
    assert not subprocess.run(command, cwd=root).returncode


def test_lists_as_windows_writes_them(tmp_path: Path) -> None:
    images(tmp_path, "a.png", "b.png")
    for encoding in ("utf-8", "utf-8-sig", "utf-16"):  # the last is PowerShell's
        (tmp_path / "list.txt").write_bytes("a.png\r\nb.png\r\n".encode(encoding))
        assert [Path(item.path).name for item in find_work([str(tmp_path / "list.txt")]).images] == ["a.png", "b.png"]


def test_what_is_given_in_the_place_of_images_is_told(tmp_path: Path) -> None:
    (tmp_path / "results.json").write_text('[{"image_id": 1, "bbox": [1, 2, 3, 4]}]')
    with pytest.raises(ValueError, match="no COCO dataset but a list, as results are"):
        find_work([str(tmp_path / "results.json")])
    with pytest.raises(ValueError, match=r"'MODEL\.WEIGHTS' is no file .* KEY VALUE pairs follow --opts"):
        find_work(["MODEL.WEIGHTS"])
