"""tools/make_figures.py: small enough for the docs, the same each time; slow: with a model, and the story's runs."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
TINY = {
    **{"SOLVER.IMS_PER_BATCH": 2, "SOLVER.EPOCHS": 1, "SOLVER.DROP_EPOCHS": "()", "TEST.EVAL_EPOCHS": 1},
    **{"MODEL.DETR.HIDDEN_DIM": 16, "MODEL.DETR.NUM_HEADS": 2, "TEST.INSTABILITY_IMAGES": 2},
}


@pytest.fixture
def tool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The tool with lists of its own: few images, tiny budgets."""
    spec = importlib.util.spec_from_file_location("make_figures", ROOT / "tools" / "make_figures.py")
    assert spec is not None and spec.loader is not None
    module: ModuleType = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for name in ("figures", "shapes"):
        data = yaml.safe_load((module.PROJECT / f"{name}.yaml").read_text())
        data |= {"shapes": {"train": 4, "val": 2}, "opts": TINY}
        for row in data["rows"]:
            row["config"] = str(module.PROJECT / row["config"])
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(data))
    monkeypatch.setattr(module, "PROJECT", tmp_path)
    return module


def test_figures_without_training_are_the_same_each_time(tool: Any, tmp_path: Path) -> None:
    contents = []
    for name in ("one", "two"):
        tool.main(["--untrained-only", "--output", str(tmp_path / name), "--docs", str(tmp_path / name / "docs")])
        contents.append({path.name: path.read_bytes() for path in (tmp_path / name / "docs").iterdir()})
    assert set(contents[0]) == {"positional_temperature.png", "positional_size.png", "denoising.png"}
    assert contents[0] == contents[1]
    assert all(len(data) < 150_000 for data in contents[0].values())


def test_a_image_too_large_for_the_docs_is_refused(tool: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.effect_noise((300, 300), 90).save(tmp_path / "noise.png")
    monkeypatch.setattr(tool, "MOST_BYTES", 1000)
    with pytest.raises(ValueError, match=r"noise\.png has \d+ bytes, more than 1000"):
        tool.copy([tmp_path / "noise.png", tmp_path / "noise.svg"], tmp_path / "docs")


def test_every_figure_of_the_story_is_drawn_by_the_tool_and_there() -> None:
    story = (ROOT / "docs" / "story.md").read_text()
    images = sorted((ROOT / "docs" / "figures").glob("*.png"))
    assert {f"figures/{path.name}" for path in images} == {
        part.split(")")[0] for part in story.split("](")[1:] if part.startswith("figures/")
    }
    assert all(path.stat().st_size < 150_000 for path in images)


@pytest.mark.slow
def test_with_a_model_and_with_the_runs_of_the_story(tool: Any, tmp_path: Path) -> None:
    docs, out, story = tmp_path / "docs", tmp_path / "out", tmp_path / "story"
    tool.main(["--output", str(out), "--story", str(story), "--docs", str(docs)])
    drawn = {path.stem for path in docs.iterdir()}
    assert {"matching", "layers", "attention_encoder", "attention_decoder", "queries", "anchors"} <= drawn
    assert "convergence" not in drawn
    jobs = tool.jobs_of(tool.read_spec(tmp_path / "shapes.yaml"), story, ["SOLVER.EPOCHS", "2"])
    assert not tool.train(jobs, ROOT / "train_net.py")
    tool.of_the_story(out, story)
    assert {"convergence.png", "instability.png", "positional_models.png", "duplicates.png"} <= {
        path.name for path in out.iterdir()
    }
