"""Curves of several runs: epochs from the run's own configuration, seeds together, empty runs told."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest

from detr_family.analysis import curves, style
from detr_family.analysis.command_line import main


def run_folder(work: Any, name: str, aps: list[float], per_epoch: int = 2) -> str:
    folder: Path = work.folder / name
    folder.mkdir()
    lines: list[dict[str, float]] = [{"iteration": 0, "total_loss": 3.0}]
    lines += [{"iteration": per_epoch * (i + 1) - 1, "bbox/AP": ap, "bbox/AP50": 2 * ap} for i, ap in enumerate(aps)]
    (folder / "metrics.json").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(folder)


def with_config(work: Any, folder: str, batch: int) -> None:
    text = Path(work.config("DETR")).read_text().replace("IMS_PER_BATCH: 16", f"IMS_PER_BATCH: {batch}")
    assert f"IMS_PER_BATCH: {batch}" in text
    (Path(folder) / "config.yaml").write_text(text)


def test_epochs_seeds_and_table(work: Any, capsys: pytest.CaptureFixture[str]) -> None:
    folders = [run_folder(work, n, aps) for n, aps in (("d0", [1, 3, 5]), ("d1", [1, 4, 8]), ("c", [4, 6, 10]))]
    for folder in folders:
        with_config(work, folder, 3)  # 6 training images: 2 iterations an epoch
    runs = ["--run", "DETR", folders[0], "--run", "DETR", folders[1], "--run", "Conditional", folders[2]]
    written = main(["convergence", *runs, "--output", str(work.output)])
    assert [p.suffix for p in written] == [".png", ".svg", ".csv", ".csv"]
    points = list(csv.DictReader(written[2].open()))
    assert [float(p["epoch"]) for p in points[:3]] == [1, 2, 3]
    first, second = csv.DictReader(written[3].open())
    assert (first["run"], first["seeds"], float(first["last"]), float(first["best"])) == ("DETR", "2", 6.5, 6.5)
    assert float(first["last_sd"]) == pytest.approx(2.12132, abs=1e-4)
    assert float(first["half_at_epoch"]) == 2 and float(second["half_at_epoch"]) == 2 and second["last_sd"] == ""
    assert "| DETR" in capsys.readouterr().out


def test_where_epochs_cannot_be_known_iterations_are_drawn(work: Any) -> None:
    runs = curves.read_runs([("a", run_folder(work, "a", [1, 2]))], "bbox/AP")
    assert [p[0] for p in runs[0].points] == [2, 4] and all(p[1] != p[1] for p in runs[0].points)
    with style.house_style():
        assert curves.draw_curves(runs, "y", "t").axes[0].get_xlabel() == "iteration"
    known = curves.read_runs([("a", str(work.folder / "a"))], "bbox/AP", iterations_per_epoch=4)
    assert [p[1] for p in known[0].points] == [0.5, 1.0]
    with style.house_style():
        assert curves.draw_curves(known, "y", "t").axes[0].get_xlabel() == "epoch"


def test_the_evaluation_after_the_last_step_counts_as_at_its_end(work: Any) -> None:
    folder = run_folder(work, "a", [1, 2])
    with (work.folder / "a" / "metrics.json").open("a") as file:
        file.write(json.dumps({"iteration": 5, "total_loss": 1.0}) + "\n" + json.dumps({"iteration": 6, "bbox/AP": 3}))
    runs = curves.read_runs([("a", folder)], "bbox/AP", iterations_per_epoch=2)
    assert [p[1] for p in runs[0].points] == [1.0, 2.0, 3.0]


def test_datasets_of_one_name_in_several_folders(work: Any) -> None:
    """Each run's epochs are counted by its own training set, though all are named alike."""
    folders = [run_folder(work, name, [1.0, 2.0]) for name in "ab"]
    for folder, count in zip(folders, (6, 3), strict=True):
        with_config(work, folder, 1)
        config, data = Path(folder) / "config.yaml", json.loads((work.folder / "data/train.json").read_text())
        kept = data["images"][:count]
        ids = {image["id"] for image in kept}
        data |= {"images": kept, "annotations": [a for a in data["annotations"] if a["image_id"] in ids]}
        (Path(folder) / "train.json").write_text(json.dumps(data))
        config.write_text(config.read_text().replace(str(work.folder / "data/train.json"), f"{folder}/train.json"))
    assert [curves.epoch_length(folder) for folder in folders] == [6, 3]


def test_runs_without_an_evaluation(work: Any, capsys: pytest.CaptureFixture[str]) -> None:
    empty, nan = run_folder(work, "empty", []), run_folder(work, "nan", [float("nan")])
    with pytest.raises(SystemExit, match=r"no run has 'bbox/AP' in its metrics\.json"):
        main(["convergence", "--run", "a", empty, "--run", "b", nan])
    full = run_folder(work, "full", [1.0])
    written = main(["convergence", "--run", "a", empty, "--run", "b", full, "--output", str(work.output)])
    assert f"a: {empty} has no bbox/AP yet" in capsys.readouterr().out
    assert [r["run"] for r in csv.DictReader(written[3].open())] == ["b"]
    with pytest.raises(SystemExit, match="There is no metrics file"):
        main(["convergence", "--run", "a", str(work.folder / "gone")])


def test_seeds_of_different_length_are_compared_where_both_have_a_value() -> None:
    runs = [curves.Run("a", "", [(1, 1.0, 2.0), (2, 2.0, 4.0)]), curves.Run("a", "", [(2, 2.0, 8.0), (3, 3.0, 9.0)])]
    x, mean, least, greatest = curves.mean_curve(runs, epochs=True)
    assert (x.tolist(), mean.tolist(), least.tolist(), greatest.tolist()) == ([2.0], [6.0], [4.0], [8.0])


def test_figures_and_tables_are_the_same_bit_for_bit(work: Any) -> None:
    folder = run_folder(work, "a", [1.0, 2.0])
    contents = []
    for name in ("one", "two"):
        written = main(["convergence", "--run", "a", folder, "--output", str(work.output / name)])
        contents.append([p.read_bytes() for p in written])
    assert contents[0] == contents[1]
