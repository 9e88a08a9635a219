"""Lists of trainings: read from a file, run one after another by train_net.py, taken up where they were left.

A list is YAML:

    config: configs/detr_quickstart.yaml     # of rows that name none; paths start from the list's own folder
    seeds: [0, 1, 2]
    opts: {SOLVER.MAX_ITER: 480}             # of all rows
    shapes: {train: 1500, val: 200}          # optional: train on generated images (detr_family.data.datasets.shapes)
    rows:
      - {name: sine, opts: {}, published: 40.6}
      - {name: learned, opts: {MODEL.DETR.SPATIAL_ENCODING.TYPE: learned}}

Every row with every seed is a folder of its own. A run that is finished is not repeated, one that was interrupted is
resumed, and one that was made with other settings is refused.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from detr_family.config import find_config
from detr_family.data.datasets.shapes import write_shapes
from detr_family.visualization.draw import read_metrics

_DONE = "finished.json"
_ASKED = "asked.json"
_SAY_EVERY = 30.0  # seconds between lines on a run's progress
_SPEC_KEYS = {"config", "seeds", "opts", "shapes", "rows"}
_ROW_KEYS = {"name", "config", "opts", "published"}


@dataclass(frozen=True)
class Row:
    """One line of the table to be: what is trained, with every seed.

    Attributes:
        name: of the row, unique.
        config: the configuration's file.
        opts: keys and values of the row alone.
        published: the paper's AP, where it has one.
    """

    name: str
    config: Path
    opts: tuple[str, ...]
    published: float | None


@dataclass(frozen=True)
class Spec:
    """A whole list.

    Attributes:
        rows: first to last.
        seeds: of every row.
        opts: keys and values of all rows.
        shapes: arguments of `write_shapes`, None where the data come from elsewhere.
    """

    rows: tuple[Row, ...]
    seeds: tuple[int, ...]
    opts: tuple[str, ...]
    shapes: dict[str, Any] | None


def read_spec(path: Path, config: str = "") -> Spec:
    """Read a list.

    Args:
        path: the YAML file.
        config: takes the place of the list's own `config`, for the rows that name none.

    Raises:
        ValueError: the file is missing, is no YAML, has unknown or missing keys, or two rows of one name.
    """
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise ValueError(f"the list {path} cannot be read: {error}") from error
    if not isinstance(data, dict) or not data.get("rows"):
        raise ValueError(f"{path} has no rows: see `detr_family.analysis.runs` for what it looks like")
    _known(data, _SPEC_KEYS, str(path))
    rows = []
    for entry in data["rows"]:
        _known(entry, _ROW_KEYS, f"a row of {path}")
        try:
            file = _config_of(path, entry, data, config)
        except FileNotFoundError as error:
            raise ValueError(f"{path}: {error}") from error
        if "name" not in entry or file is None:
            raise ValueError(f"{path}: the row {entry} needs a name, and a config here or above")
        rows.append(Row(str(entry["name"]), file, as_opts(entry.get("opts") or {}), entry.get("published")))
    names = [row.name for row in rows]
    if len({slug(name) for name in names}) < len(names):
        raise ValueError(f"{path}: two rows have the same name among {names}")
    seeds = data.get("seeds", [0])
    if not isinstance(seeds, list) or not seeds or not all(isinstance(seed, int) and seed >= 0 for seed in seeds):
        raise ValueError(f"{path}: seeds is {seeds!r}; a list of whole numbers from 0 is needed")
    shapes = data.get("shapes")
    if shapes is not None:
        _known(shapes, {"train", "val", "size", "seed"}, f"shapes of {path}")
    return Spec(tuple(rows), tuple(seeds), as_opts(data.get("opts") or {}), shapes)


def _config_of(path: Path, entry: dict[str, Any], data: dict[str, Any], config: str) -> Path | None:
    """The configuration of a row: its own, that of the command line, that of the list; a file, or a name."""
    if "config" not in entry and config:
        return Path(find_config(config)).resolve()
    named = entry.get("config", data.get("config"))
    if not named:
        return None
    beside = path.parent / named
    return (beside if beside.is_file() else Path(find_config(named))).resolve()


def _known(data: Any, keys: set[str], where: str) -> None:
    if not isinstance(data, dict) or not set(data) <= keys:
        unknown = sorted(set(data) - keys) if isinstance(data, dict) else data
        raise ValueError(f"{where} has {unknown!r}; known are {', '.join(sorted(keys))}")


def as_opts(values: Mapping[str, Any]) -> tuple[str, ...]:
    """KEY VALUE pairs as on a command line."""
    return tuple(str(part) for pair in values.items() for part in pair)


def slug(name: str) -> str:
    """A name as a folder's."""
    return "".join(c if c.isalnum() else "_" for c in name.lower()).strip("_") or "row"


def data_opts(spec: Spec, folder: Path) -> tuple[str, ...]:
    """The dataset of the list as KEY VALUE pairs; generated images go into `folder`/data unless they are there."""
    if spec.shapes is None:
        return ()
    arguments = {"seed": 0, "size": (96, 112), **spec.shapes}
    entries = write_shapes(
        str(folder / "data"),
        arguments["train"],
        arguments["val"],
        (arguments["size"][0], arguments["size"][1]),
        arguments["seed"],
    )
    return (
        *("DATASETS.COCO_FORMAT", repr([list(entry) for entry in entries])),
        *("DATASETS.TRAIN", repr((entries[0][0],))),
        *("DATASETS.TEST", repr((entries[1][0],))),
    )


@dataclass
class Job:
    """One training: a row with one seed, in a folder of its own."""

    row: Row
    seed: int
    folder: Path
    opts: tuple[str, ...]

    @property
    def asked(self) -> dict[str, Any]:
        """What the run is made from, to tell another run in its folder."""
        return {"config": str(self.row.config), "seed": self.seed, "opts": list(self.opts)}

    @property
    def finished(self) -> bool:
        """Whether the run came to its end."""
        return (self.folder / _DONE).is_file()


def jobs_of(spec: Spec, output: Path, extra: Sequence[str] = (), seeds: Sequence[int] = ()) -> list[Job]:
    """All trainings of a list: seed by seed, so that there is a whole table after the first seed.

    Args:
        spec: the list.
        output: folder of all runs and of generated data.
        extra: KEY VALUE pairs that win over the list's.
        seeds: in place of the list's.

    Raises:
        ValueError: a folder holds a run made with other settings.
    """
    output = output.expanduser().resolve()
    common = (*data_opts(spec, output), *spec.opts)
    jobs = []
    for seed in seeds or spec.seeds:
        for row in spec.rows:
            folder = output / slug(row.name) / f"seed{seed}"
            job = Job(row, seed, folder, (*common, *row.opts, *extra))
            asked = folder / _ASKED
            if asked.is_file() and json.loads(asked.read_text(encoding="utf-8")) != job.asked:
                raise ValueError(f"{folder} holds a run with other settings: choose another --output or remove it")
            jobs.append(job)
    return jobs


def find_train_net(given: Path | None) -> Path:
    """The script that trains: as given, else train_net.py beside the package, else the package's own.

    Raises:
        ValueError: the given one is not there.
    """
    if given is not None and not given.is_file():
        raise ValueError(f"{given} is missing: say with --train-net where train_net.py is")
    package = Path(__file__).resolve().parents[1]
    beside = package.parent / "train_net.py"
    return given or (beside if beside.is_file() else package / "commands" / "train.py")


def train(jobs: Sequence[Job], train_net: Path, num_gpus: int = 0, say: Callable[[str], None] = print) -> list[Job]:
    """Run what is not finished, in order.

    Args:
        jobs: from `jobs_of`.
        train_net: path of train_net.py, run by this same interpreter; its output goes to train.log in the run's folder.
        num_gpus: its --num-gpus; 0 leaves that out.
        say: gets a line at every start and end and, in between, on the progress.

    Returns:
        Jobs that failed; the others went on.
    """
    failed = []
    for number, job in enumerate(jobs, 1):
        title = f"[{number}/{len(jobs)}] {job.row.name}, seed {job.seed}"
        if job.finished:
            say(f"{title}: finished before")
            continue
        job.folder.mkdir(parents=True, exist_ok=True)
        (job.folder / _ASKED).write_text(json.dumps(job.asked), encoding="utf-8")
        command = [sys.executable, str(train_net), "--config-file", str(job.row.config), "--resume"]
        command += ["--num-gpus", str(num_gpus)] if num_gpus else []
        command += [*job.opts, "SEED", str(job.seed), "OUTPUT_DIR", str(job.folder)]
        say(f"{title}: {'resumed' if (job.folder / 'last_checkpoint').is_file() else 'started'} in {job.folder}")
        start = time.monotonic()
        if _run(command, job.folder, title, say):
            failed.append(job)
            say(f"{title}: FAILED, {_last_line(job.folder / 'train.log')} (see {job.folder / 'train.log'})")
            continue
        seconds = time.monotonic() - start
        (job.folder / _DONE).write_text(json.dumps({"seconds": round(seconds, 1)}), encoding="utf-8")
        say(f"{title}: done after {seconds / 60:.1f} min")
    return failed


def _run(command: Sequence[str], folder: Path, title: str, say: Callable[[str], None]) -> int:
    with (folder / "train.log").open("a", encoding="utf-8") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=_environment())
        try:
            while True:
                try:
                    return process.wait(timeout=_SAY_EVERY)
                except subprocess.TimeoutExpired:
                    say(f"{title}: {_progress(folder)}")
        finally:
            if process.poll() is None:
                process.terminate()
                process.wait()


def _environment() -> dict[str, str]:
    """This process's, with the package that runs here first on the path."""
    here = str(Path(__file__).resolve().parents[2])
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [here, os.environ.get("PYTHONPATH")]))}


def _progress(folder: Path) -> str:
    try:
        last = read_metrics(str(folder / "metrics.json"))
    except ValueError:
        return "no iteration logged yet"
    text = f"iteration {last[-1]['iteration']}"
    left = next((e["eta_seconds"] for e in reversed(last) if "eta_seconds" in e), None)
    ap = next((e["bbox/AP"] for e in reversed(last) if "bbox/AP" in e), None)
    text += "" if left is None else f", {left / 60:.0f} min left"
    return text + ("" if ap is None else f", AP {ap:.1f}")


def _last_line(path: Path) -> str:
    lines = [line for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    return lines[-1] if lines else "without a word"


def last_metrics(job: Job) -> dict[str, float]:
    """The numbers of the run's last evaluation, without "bbox/"; empty where there was none."""
    try:
        metrics = read_metrics(str(job.folder / "metrics.json"))
    except ValueError:
        return {}
    evaluated = [entry for entry in metrics if "bbox/AP" in entry]
    if not evaluated:
        return {}
    return {
        key.removeprefix("bbox/"): float(value)
        for key, value in evaluated[-1].items()
        if key.startswith("bbox/") and isinstance(value, (int, float))
    }
