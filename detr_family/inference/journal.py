"""What a long run has found, kept so that a killed one loses nothing: JSON Lines by each process, merged at the end.

A folder of results holds

- `run.json`: the settings that the results depend on, class names and category ids.
- `part-00000.jsonl` ...: a line per image, of each process its own file: `file_name`, of COCO's files `image_id`, of
  videos `frame`; `width`, `height`, `best` (the highest score of all) and `detections` (category_id, bbox as x, y,
  width, height in pixels, score). An image that could not be read has `error` instead; the next run tries it again.
- after merging, `results.json` and `images.json` in COCO's formats, and on request `results.parquet`.

A line counts once its end is there: what a killed process had begun is cut off by the next that writes to the file.
"""

from __future__ import annotations

import fcntl
import json
import os
import uuid
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from detr_family.errors import UserError, require

_RUN = "run.json"
_ROWS = 50_000  # of a Parquet file that are in memory together


def key_of(line: dict[str, Any]) -> str | int:
    """What tells an image from others: the id of a COCO file, a name, or a name with the number of a frame."""
    if "image_id" in line:
        return int(line["image_id"])
    return f"{line['file_name']}#{line['frame']:06d}" if "frame" in line else str(line["file_name"])


class Journal:
    """The file that one process appends to, open until `close`.

    Args:
        folder: of results.
        part: number of the process.

    Raises:
        UserError: another process has the file open.
    """

    def __init__(self, folder: Path, part: int) -> None:
        self.path = folder / f"part-{part:05d}.jsonl"
        self.file = open(self.path, "a+b")  # noqa: SIM115
        try:
            # Of this process alone: data workers, which outlive a killed process by seconds, do not hold it.
            fcntl.lockf(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as error:
            self.file.close()
            raise UserError(f"{self.path} is being written by another run: wait for it, or end it") from error
        except OSError:  # a network folder without locks
            pass
        self.file.truncate(_whole(self.file))

    def write(self, line: dict[str, Any]) -> None:
        """Appends a line."""
        self.file.write(json.dumps(line, separators=(",", ":")).encode() + b"\n")

    def flush(self, to_disk: bool = False) -> None:
        """Hands what was written to the system, where a killed process leaves it, or on to the disk."""
        self.file.flush()
        if to_disk:
            os.fsync(self.file.fileno())

    def close(self) -> None:
        """Writes all to the disk."""
        self.flush(to_disk=True)
        self.file.close()


def _whole(file: IO[bytes], block: int = 1 << 16) -> int:
    """Length up to the end of the last whole line."""
    end = file.seek(0, os.SEEK_END)
    while end > 0:
        start = max(0, end - block)
        file.seek(start)
        place = file.read(end - start).rfind(b"\n")
        if place >= 0:
            return start + place + 1
        end = start
    return 0


def lines_of(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Where each whole line of a part starts, and what it says; one that a crash of the machine spoilt is left out."""
    with open(path, "rb") as file:
        place = 0
        for text in file:
            start, place = place, place + len(text)
            if not text.endswith(b"\n"):
                return
            try:
                line = json.loads(text)
            except ValueError:
                continue
            if isinstance(line, dict) and "file_name" in line:  # else of another program
                yield start, line


def parts_of(folder: Path) -> list[Path]:
    """The parts that are there."""
    return sorted(folder.glob("part-*.jsonl"))


def done(folder: Path) -> set[str | int]:
    """The keys of all images that the parts have results of."""
    return {key_of(line) for path in parts_of(folder) for _, line in lines_of(path) if "error" not in line}


def begin(
    folder: Path, settings: dict[str, Any], class_names: Sequence[str], category_ids: Sequence[int], restart: bool
) -> None:
    """Makes a folder ready for a run, or for going on with one.

    Args:
        folder: of results.
        settings: all that the results depend on, as JSON has it.
        class_names, category_ids: by class number.
        restart: delete what earlier runs found.

    Raises:
        UserError: it holds the results of other settings.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if restart:
        for path in (*parts_of(folder), folder / _RUN):
            path.unlink(missing_ok=True)
    wanted: dict[str, Any] = {
        "settings": {**settings, "category_ids": list(category_ids)},
        "categories": [{"id": i, "name": name} for i, name in zip(category_ids, class_names, strict=True)],
    }
    if (folder / _RUN).is_file():
        before = _about(folder)["settings"]
        for name, value in wanted["settings"].items():
            if before.get(name) != value:
                raise UserError(
                    f"{folder} holds results of other settings: {name} was {_short(before.get(name))} and is now "
                    f"{_short(value)}. Give another --output, or --restart, which deletes them"
                )
    elif parts_of(folder):
        raise UserError(f"{folder} has parts of a run and no {_RUN}: give another --output, or --restart")
    with _written_whole(folder / _RUN) as file:
        json.dump(wanted, file, indent=1)


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) < 80 else text[:77] + "..."


def _about(folder: Path) -> dict[str, Any]:
    try:
        about: dict[str, Any] = json.loads((folder / _RUN).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"{folder} has no results: there is no {_RUN}") from error
    except ValueError as error:
        raise UserError(f"{folder / _RUN} is damaged ({error}): give --restart") from error
    if not isinstance(about, dict) or not {"settings", "categories"} <= about.keys():
        raise UserError(f"{folder / _RUN} is not of a run of this command: give another --output, or --restart")
    return about


@dataclass
class Merged:
    """What was merged.

    Attributes:
        images: how many images and frames there are results of.
        detections: how many boxes.
        best: the highest score of all, written or not.
        failed: name of each image that could not be read, and why.
    """

    images: int = 0
    detections: int = 0
    best: float = 0.0
    failed: list[tuple[str, str]] = field(default_factory=list)


def merge(folder: Path, parquet: bool = False) -> Merged:
    """Writes results.json, as pycocotools' loadRes takes it, and images.json, what its ids stand for, from the parts.

    Neither number nor order of the processes shows in them: images of COCO files are in the order of their ids, others
    and frames in that of their names, numbered after the highest of those ids. An image that several lines are about,
    as where folders of two machines were put together, counts once.

    Args:
        folder: of results.
        parquet: write results.parquet, too: a row per box, with file_name, image_id, category, category_id, x, y,
            width, height and score.

    Raises:
        UserError: there are no results; pyarrow is needed and not installed.
    """
    if parquet:
        require("pyarrow", "parquet")
    about = _about(folder)
    parts = parts_of(folder)
    places: dict[str | int, tuple[tuple[Any, ...], int, int]] = {}
    errors: dict[str | int, tuple[str, str]] = {}
    for number, path in enumerate(parts):
        for start, line in lines_of(path):
            key = key_of(line)
            if "error" in line:
                errors[key] = str(key) if "image_id" not in line else line["file_name"], line["error"]
            elif key not in places:
                places[key] = _order(line), number, start
    merged = Merged(failed=[errors[key] for key in errors if key not in places])
    next_id = max((key for key in places if isinstance(key, int)), default=0) + 1
    with (
        _written_whole(folder / "results.json") as results,
        _written_whole(folder / "images.json") as images,
        _parquet(folder / "results.parquet", about["categories"], parquet) as table,
    ):
        results.write("[")
        images.write('{"info": {}, "categories": ' + json.dumps(about["categories"]) + ', "images": [')
        for line in _read(parts, sorted(places.values())):
            name = line["file_name"] + (f"#{line['frame']:06d}" if "frame" in line else "")
            image_id = line.get("image_id", next_id)
            next_id += "image_id" not in line
            image = {"id": image_id, "file_name": name, "width": line["width"], "height": line["height"]}
            images.write(("" if not merged.images else ",\n") + json.dumps(image))
            for detection in line["detections"]:
                entry = {"image_id": image_id, **detection}
                results.write(("" if not merged.detections else ",\n") + json.dumps(entry))
                table.add({"file_name": name, **entry})
                merged.detections += 1
            merged.images += 1
            merged.best = max(merged.best, line["best"])
        results.write("]\n")
        images.write("]}\n")
    return merged


def _order(line: dict[str, Any]) -> tuple[Any, ...]:
    if "image_id" in line:
        return 0, line["image_id"]
    return 1, line["file_name"], line.get("frame", 0)


def _read(parts: Sequence[Path], places: Sequence[tuple[tuple[Any, ...], int, int]]) -> Iterator[dict[str, Any]]:
    with ExitStack() as opened:
        files = [opened.enter_context(open(path, "rb")) for path in parts]
        for _, number, start in places:
            files[number].seek(start)
            yield json.loads(files[number].readline())


def _unfinished(path: Path) -> Path:
    """A name to write under that no process of any machine has, too: in containers their ids are often alike."""
    return path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}")


@contextmanager
def _written_whole(path: Path) -> Iterator[IO[str]]:
    """A text file that is there when it is complete, and not before."""
    unfinished = _unfinished(path)
    try:
        with open(unfinished, "w", encoding="utf-8") as file:
            yield file
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


class _Table:
    """Rows for a Parquet file, written in groups; without a writer they are dropped."""

    def __init__(self, writer: Any, schema: Any, names: dict[int, str]) -> None:
        self.writer, self.schema, self.names = writer, schema, names
        self.rows: list[dict[str, Any]] = []

    def add(self, entry: dict[str, Any]) -> None:
        if self.writer is None:
            return
        x, y, width, height = entry["bbox"]
        row = {"category": self.names[entry["category_id"]], "x": x, "y": y, "width": width, "height": height}
        self.rows.append({**entry, **row})
        if len(self.rows) == _ROWS:
            self.flush()

    def flush(self) -> None:
        if self.rows:
            import pyarrow

            self.writer.write_table(pyarrow.Table.from_pylist(self.rows, schema=self.schema))
            self.rows = []


@contextmanager
def _parquet(path: Path, categories: Sequence[dict[str, Any]], wanted: bool) -> Iterator[_Table]:
    if not wanted:
        yield _Table(None, None, {})
        return
    pyarrow, parquet = require("pyarrow", "parquet"), require("pyarrow.parquet", "parquet")
    texts = [(name, pyarrow.string()) for name in ("file_name", "category")]
    numbers = [(name, pyarrow.int64()) for name in ("image_id", "category_id")]
    places = [(name, pyarrow.float32()) for name in ("x", "y", "width", "height", "score")]
    schema = pyarrow.schema([*texts, *numbers, *places])
    unfinished = _unfinished(path)
    try:
        with parquet.ParquetWriter(unfinished, schema) as writer:
            table = _Table(writer, schema, {entry["id"]: entry["name"] for entry in categories})
            yield table
            table.flush()
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)
