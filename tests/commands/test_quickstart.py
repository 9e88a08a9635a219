"""The quickstart around train_net.py: its folder, its failures, and (slow) the whole way."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog

from detr_family.commands import quickstart as module
from detr_family.commands.quickstart import quickstart

ROOT = Path(__file__).resolve().parents[2]
# In place of train_net.py: leaves what a run leaves, and the command line that it was given.
STAND_IN = """
import json, pathlib, sys
output = pathlib.Path(sys.argv[sys.argv.index("OUTPUT_DIR") + 1])
(output / "arguments.json").write_text(json.dumps(sys.argv[1:]))
lines = [{"iteration": 1, "total_loss": 3.0}, {"iteration": 2, "bbox/AP": 4.0, "bbox/AP50": 8.0}]
(output / "metrics.json").write_text("".join(json.dumps(line) + chr(10) for line in lines))
"""


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    """train_net.py's stand-in, a config file, few images and no drawing."""
    monkeypatch.setattr(module, "_TRAIN_IMAGES", 3)
    monkeypatch.setattr(module, "_VAL_IMAGES", 2)
    monkeypatch.setattr(module, "draw_predictions", lambda *arguments: [])
    (tmp_path / "train_net.py").write_text(STAND_IN)
    (tmp_path / "small.yaml").write_text("VERSION: 2\n")
    return tmp_path / "train_net.py", tmp_path / "small.yaml", tmp_path / "out"


def test_runs_train_net_with_the_dataset_and_reports_ap(stand_in):
    assert quickstart(*stand_in, device="cpu") == (4.0, 8.0)
    output = stand_in[2]
    arguments = json.loads((output / "arguments.json").read_text())
    options = dict(zip(arguments[2::2], arguments[3::2], strict=True))
    assert arguments[:2] == ["--config-file", str(stand_in[1])]
    assert options["DATASETS.TRAIN"] == "('shapes_train',)" and options["MODEL.DEVICE"] == "cpu"
    assert str(output / "data" / "val.json") in options["DATASETS.COCO_FORMAT"]
    assert (output / "curves.png").is_file()


def test_again_clears_its_own_folder_but_keeps_the_data(stand_in):
    quickstart(*stand_in, device="cpu")
    output = stand_in[2]
    (output / "pictures").mkdir()
    (output / "pictures" / "old.png").write_bytes(b"old")
    drawn = output / "data" / "train" / "000000.png"
    before = drawn.stat().st_mtime_ns
    assert quickstart(*stand_in, device="cpu") == (4.0, 8.0)
    assert not (output / "pictures").exists() and drawn.stat().st_mtime_ns == before


def test_folder_of_something_else_is_left_alone(stand_in):
    stand_in[2].mkdir()
    (stand_in[2] / "thesis.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"out holds something that quickstart did not make.*--output"):
        quickstart(*stand_in, device="cpu")
    assert [path.name for path in stand_in[2].iterdir()] == ["thesis.txt"]


def test_failed_training_is_told_and_the_next_call_starts_anew(stand_in):
    stand_in[0].write_text("import sys; sys.exit(3)")
    with pytest.raises(ValueError, match="training ended with exit status 3"):
        quickstart(*stand_in, device="cpu")
    stand_in[0].write_text(STAND_IN)
    assert quickstart(*stand_in, device="cpu") == (4.0, 8.0)


def test_missing_config_and_device(stand_in, monkeypatch):
    train_net, config, output = stand_in
    with pytest.raises(ValueError, match=r"none\.yaml is missing"):
        quickstart(train_net, config.with_name("none.yaml"), output)
    monkeypatch.setattr(module.torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="--device cuda: this torch sees no CUDA device"):
        quickstart(train_net, config, output, device="cuda")
    assert not output.exists()


@pytest.mark.slow
def test_the_whole_way(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_TRAIN_IMAGES", 8)
    monkeypatch.setattr(module, "_VAL_IMAGES", 4)
    recipe = tmp_path / "short.yaml"
    recipe.write_text(
        f"_BASE_: {ROOT / 'configs' / 'dino_quickstart.yaml'}\nSOLVER: {{MAX_ITER: 3, STEPS: [2], IMS_PER_BATCH: 2}}\n"
    )
    output = tmp_path / "out"
    ap, ap50 = quickstart(ROOT / "train_net.py", recipe, output, device="cpu")
    for name in ("shapes_train", "shapes_val"):
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)
    assert 0 <= ap <= ap50 <= 100
    assert len(list((output / "pictures").glob("*.png"))) == 4
    assert (output / "curves.png").is_file() and (output / "model_final.pth").is_file()


def test_command_line_fails_with_one_message(tmp_path):
    tool = [sys.executable, str(ROOT / "tools" / "quickstart.py")]
    ended = subprocess.run(
        [*tool, "--device", "cpu", "--config-file", str(tmp_path / "none.yaml")],
        capture_output=True,
        text=True,
        check=False,
        env={**module.os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert ended.returncode == 1
    assert re.fullmatch(r"quickstart: .*none\.yaml is missing\.", ended.stderr.strip().splitlines()[-1])
    assert "Traceback" not in ended.stderr
