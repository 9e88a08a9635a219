"""Lists of trainings: read, run, resumed, refused, and their table."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest

from detr_family.analysis import runs
from detr_family.analysis.command_line import main
from detr_family.config import load_config

# In place of train_net.py: an AP made of what it was called with, one more each time it is called in a folder.
STAND_IN = """
import json, pathlib, sys
options = dict(zip(sys.argv[4::2], sys.argv[5::2]))
assert sys.argv[1] == "--config-file" and sys.argv[3] == "--resume"
if options["MODEL.DETR.NUM_QUERIES"] == "13": sys.exit("unlucky")
folder = pathlib.Path(options["OUTPUT_DIR"])
calls = folder / "calls"
calls.write_text(calls.read_text() + "x" if calls.exists() else "x")
ap = float(options["MODEL.DETR.NUM_QUERIES"]) + int(options["SEED"])
lines = [{"iteration": 4, "bbox/AP": 0.5}, {"iteration": 9, "bbox/AP": ap, "bbox/AP50": 2 * ap, "eta_seconds": 1.0}]
(folder / "metrics.json").write_text("".join(json.dumps(x) + chr(10) for x in lines))
"""
SPEC = """
config: small.yaml
seeds: [0, 2]
opts: {SOLVER.MAX_ITER: 10}
rows:
  - {name: "few", opts: {MODEL.DETR.NUM_QUERIES: 5}, published: 40.0}
  - {name: "more", opts: {MODEL.DETR.NUM_QUERIES: 9}, published: 42.5}
"""


@pytest.fixture
def spec(tmp_path: Path) -> Path:
    (tmp_path / "train_net.py").write_text(STAND_IN)
    (tmp_path / "small.yaml").write_text("VERSION: 2\n")
    (tmp_path / "list.yaml").write_text(SPEC)
    return tmp_path / "list.yaml"


def call(spec: Path, *arguments: str) -> list[Path]:
    start = ["ablation", "--spec", str(spec), "--train-net", str(spec.parent / "train_net.py")]
    return main([*start, "--output", str(spec.parent / "out"), *arguments])


def test_table_with_differences_and_no_run_twice(spec: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for _ in range(2):
        written = call(spec)
    few, more = csv.DictReader(written[2].open())
    assert (few["row"], few["seeds"], float(few["AP"]), float(few["AP50"])) == ("few", "2", 6.0, 12.0)
    assert float(few["AP_sd"]) == pytest.approx(2**0.5, abs=1e-4) and few["to_first"] == ""
    assert float(more["to_first"]) == float(more["to_previous"]) == 4.0
    assert float(more["published_to_first"]) == 2.5
    assert (spec.parent / "out/few/seed2/calls").read_text() == "x"
    out = capsys.readouterr().out
    assert "[1/4] few, seed 0: started" in out and "[1/4] few, seed 0: finished before" in out


def test_an_interrupted_run_is_taken_up_and_another_refused(spec: Path) -> None:
    call(spec, "--seeds", "0")
    folder = spec.parent / "out/few/seed0"
    (folder / "finished.json").unlink()
    call(spec, "--seeds", "0")
    assert (folder / "calls").read_text() == "xx"
    with pytest.raises(SystemExit, match="holds a run with other settings: choose another --output"):
        call(spec, "--seeds", "0", "SOLVER.BASE_LR", "0.1")


def test_a_failure_is_told_and_the_others_go_on(spec: Path) -> None:
    spec.write_text(SPEC.replace("NUM_QUERIES: 5", "NUM_QUERIES: 13"))
    with pytest.raises(SystemExit, match=r"2 of 4 trainings failed: few \(seed 0\), few \(seed 2\); the table"):
        call(spec)
    few, more = csv.DictReader((spec.parent / "out/ablation.csv").open())
    assert few["AP"] == "" and few["seeds"] == "0" and float(more["AP"]) == 10.0 and more["to_first"] == ""
    assert "unlucky" in (spec.parent / "out/few/seed0/train.log").read_text()


def test_the_command_lines_options_win(spec: Path) -> None:
    job = runs.jobs_of(runs.read_spec(spec), spec.parent / "o", ["SOLVER.MAX_ITER", "3"])[0]
    assert job.opts == ("SOLVER.MAX_ITER", "10", "MODEL.DETR.NUM_QUERIES", "5", "SOLVER.MAX_ITER", "3")


def test_another_configuration_for_rows_that_name_none(spec: Path) -> None:
    (spec.parent / "other.yaml").write_text("VERSION: 2\n")
    spec.write_text(SPEC.replace('{name: "more", ', '{name: "more", config: small.yaml, '))
    rows = runs.read_spec(spec, str(spec.parent / "other.yaml")).rows
    assert [row.config.name for row in rows] == ["other.yaml", "small.yaml"]


def test_generated_images(spec: Path) -> None:
    spec.write_text(SPEC + "shapes: {train: 2, val: 1, size: [32, 40]}\n")
    job = runs.jobs_of(runs.read_spec(spec), spec.parent / "o")[0]
    options = dict(zip(job.opts[::2], job.opts[1::2], strict=True))
    assert options["DATASETS.TRAIN"] == "('shapes_train',)"
    assert len(json.loads((spec.parent / "o/data/train.json").read_text())["images"]) == 2


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("seeds:", "seed:", r"has \['seed'\]; known are config, opts, rows, seeds, shapes"),
        ("seeds: [0, 2]", "seeds: 3", "seeds is 3; a list of whole numbers"),
        ("small.yaml", "gone.yaml", "there is no config file 'gone.yaml'"),
        ('"more"', '"few"', "two rows have the same name"),
        ('name: "few", ', "", "needs a name, and a config"),
        ("rows:", "rows: []\nopts:", "has no rows"),
        ("config: small.yaml", "config: [", "cannot be read"),
    ],
)
def test_mistakes_in_a_list(old: str, new: str, message: str, spec: Path) -> None:
    spec.write_text(SPEC.replace(old, new))
    with pytest.raises(ValueError, match=message):
        runs.read_spec(spec)


def test_missing_files(spec: Path) -> None:
    with pytest.raises(SystemExit, match=r"the list none\.yaml cannot be read"):
        main(["ablation", "--spec", "none.yaml"])
    with pytest.raises(ValueError, match="say with --train-net where"):
        runs.find_train_net(spec.parent / "nowhere.py")
    assert runs.find_train_net(None).name == "train_net.py"


def test_lists_of_the_project_load_with_all_their_options() -> None:
    for path in sorted((Path(__file__).resolve().parents[2] / "projects").glob("*/*.yaml")):
        spec = runs.read_spec(path)
        for row in spec.rows:
            load_config(str(row.config), [*spec.opts, *row.opts])


def test_progress_is_read_from_the_run(work: Any) -> None:
    assert runs._progress(work.folder) == "no iteration logged yet"
    lines = [{"iteration": 19, "eta_seconds": 240.0}, {"iteration": 19, "bbox/AP": 1.25}]
    (work.folder / "metrics.json").write_text("".join(json.dumps(x) + "\n" for x in lines))
    assert runs._progress(work.folder) == "iteration 19, 4 min left, AP 1.2"
