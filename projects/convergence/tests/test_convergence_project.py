"""projects/convergence: the one command, training stood in for; its verdicts and configurations; slow: for real."""

from __future__ import annotations

import csv
import importlib.util
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

from detr_family.analysis.runs import read_spec
from detr_family.config import load_config

PROJECT = Path(__file__).resolve().parents[1]
STAND_IN = """
import json, pathlib, sys
options = dict(zip(sys.argv[4::2], sys.argv[5::2]))
folder = pathlib.Path(options["OUTPUT_DIR"])
ap = float(options["MODEL.DETR.NUM_QUERIES"]) + int(options["SEED"])
lines = [{"iteration": i, "bbox/AP": ap * i, "matching_instability": 9.0 / (i + 1)} for i in (1, 3)]
(folder / "metrics.json").write_text("".join(json.dumps(x) + chr(10) for x in lines))
"""


@pytest.fixture(scope="module")
def project() -> ModuleType:
    spec = importlib.util.spec_from_file_location("convergence_run", PROJECT / "run.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def small(tmp_path: Path) -> Path:
    (tmp_path / "small.yaml").write_text("VERSION: 2\n")
    rows = [{"name": n, "config": "small.yaml", "opts": {"MODEL.DETR.NUM_QUERIES": q}} for n, q in (("A", 2), ("B", 9))]
    (tmp_path / "list.yaml").write_text(yaml.safe_dump({"seeds": [0, 1], "rows": rows}))
    return tmp_path


def test_plot_table_and_order(project: ModuleType, small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (small / "train_net.py").write_text(STAND_IN)
    monkeypatch.setattr(project, "find_train_net", lambda _: small / "train_net.py")
    arguments = ["--spec", str(small / "list.yaml"), "--output", str(small / "out")]
    project.main(arguments)
    out = small / "out"
    names = ("convergence.png", "convergence.svg", "convergence.csv", "instability.png", "a/seed1/metrics.json")
    assert all((out / name).is_file() for name in names)
    assert [(r["run"], float(r["last"])) for r in csv.DictReader((out / "convergence.csv").open())] == [
        ("A", 7.5),
        ("B", 28.5),
    ]
    assert (out / "order.txt").read_text() == "B against A: +21.0 AP, above it with every seed\n"
    (out / "convergence.png").unlink()
    project.main([*arguments, "--no-training"])
    assert (out / "convergence.png").is_file()


def test_failures_and_nothing_to_draw(project: ModuleType, small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (small / "train_net.py").write_text("import sys; sys.exit('broken')")
    monkeypatch.setattr(project, "find_train_net", lambda _: small / "train_net.py")
    arguments = ["--spec", str(small / "list.yaml"), "--output", str(small / "out")]
    with pytest.raises(SystemExit, match="has been trained yet"):
        project.main([*arguments, "--no-training"])
    with pytest.raises(SystemExit, match="convergence: no run in"):
        project.main(arguments)


def test_verdicts(project: ModuleType) -> None:
    assert project.verdict([1.0], [3.0]) == "+2.0 AP (one seed: no spread to compare with)"
    assert project.verdict([1.0, 2.0], [3.0, 4.0]) == "+2.0 AP, above it with every seed"
    assert project.verdict([1.0, 4.0], [3.0, 5.0]) == "+1.5 AP, within the spread of the seeds"
    assert project.verdict([3.0, 4.0], [1.0, 2.0]) == "-2.0 AP, BELOW it with every seed"


@pytest.mark.parametrize("name", ["shapes", "gpu"])
def test_all_detectors_have_the_same_budget(name: str) -> None:
    spec = read_spec(PROJECT / f"{name}.yaml")
    order = ["DETR", "Conditional DETR", "DAB-DETR", "DN-DETR", "DINO"]
    assert [row.name for row in spec.rows] == order and len(spec.rows) == 5
    budgets = []
    for row in spec.rows:
        cfg = load_config(str(row.config), spec.opts)
        budgets.append((cfg.SOLVER.EPOCHS, cfg.SOLVER.DROP_EPOCHS, cfg.SOLVER.IMS_PER_BATCH, cfg.TEST.EVAL_EPOCHS))
        if name == "shapes":
            detr = cfg.MODEL.DETR
            budgets[-1] += (
                detr.HIDDEN_DIM,
                detr.ENC_LAYERS,
                detr.DEC_LAYERS,
                detr.NUM_QUERIES,
                cfg.MODEL.RESNETS.DEPTH,
            )
    assert len(set(budgets)) == 1, budgets
    assert len(spec.seeds) == (1 if name == "shapes" else 3)


def test_configurations_are_short() -> None:
    for path in sorted((PROJECT / "configs").glob("*.yaml")):
        assert len(path.read_text().splitlines()) <= 25, path.name


@pytest.mark.slow
def test_the_whole_with_a_tiny_budget(project: ModuleType, tmp_path: Path) -> None:
    spec: dict[str, Any] = yaml.safe_load((PROJECT / "shapes.yaml").read_text())
    spec["shapes"] = {"train": 4, "val": 2, "size": [48, 56]}
    for row in spec["rows"]:
        row["config"] = str(PROJECT / row["config"])
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(spec))
    tiny = ["SOLVER.IMS_PER_BATCH", "2", "SOLVER.EPOCHS", "2", "SOLVER.DROP_EPOCHS", "()", "TEST.EVAL_EPOCHS", "1"]
    tiny += ["INPUT.MIN_SIZE_TRAIN", "(48,)", "INPUT.MIN_SIZE_TEST", "48", "TEST.INSTABILITY_IMAGES", "2"]
    tiny += ["MODEL.DETR.HIDDEN_DIM", "16", "MODEL.DETR.NUM_HEADS", "2"]
    project.main(["--spec", str(tmp_path / "tiny.yaml"), "--output", str(tmp_path / "out"), *tiny])
    points = list(csv.DictReader((tmp_path / "out/convergence_points.csv").open()))
    assert [float(p["epoch"]) for p in points] == [1.0, 2.0] * len(spec["rows"])
    assert (tmp_path / "out/instability.png").is_file()
    assert json.loads((tmp_path / "out/detr/seed0/finished.json").read_text())["seconds"] > 0
