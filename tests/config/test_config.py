"""Keys, their errors, and where the classes come from."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog

from detr_family.config import check_class_count, class_names, load_config, num_classes, projects
from detr_family.data.datasets.coco import register_datasets

CONFIGS = sorted((Path(__file__).resolve().parents[2] / "configs").rglob("*.yaml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: f"{p.parent.name}/{p.stem}")
def test_every_config_file_loads_and_is_short(path: Path) -> None:
    load_config(str(path))
    text = path.read_text()
    assert len(text.splitlines()) <= (32 if path.stem.startswith("Base") else 25)
    depth, base = 0, yaml.safe_load(text).get("_BASE_")
    while base:
        path = path.parent / base
        depth, base = depth + 1, yaml.safe_load(path.read_text()).get("_BASE_")
    assert depth <= 2


def test_recipe_of_detr() -> None:
    cfg = load_config(str(CONFIGS[0].parent / "detr_r101_dc5.yaml"))
    assert (cfg.SOLVER.BASE_LR, cfg.SOLVER.BACKBONE_MULTIPLIER, cfg.SOLVER.WEIGHT_DECAY) == (1e-4, 0.1, 1e-4)
    assert (cfg.SOLVER.EPOCHS, cfg.SOLVER.DROP_EPOCHS, cfg.SOLVER.IMS_PER_BATCH) == (500, (400,), 64)
    assert cfg.SOLVER.CLIP_GRADIENTS.CLIP_TYPE == "full_model" and cfg.SOLVER.CLIP_GRADIENTS.CLIP_VALUE == 0.1
    assert cfg.MODEL.RESNETS.DEPTH == 101 and cfg.MODEL.RESNETS.RES5_DILATION == 2
    assert cfg.MODEL.RESNETS.STRIDE_IN_1X1 is False and cfg.INPUT.FORMAT == "RGB"
    assert tuple(range(480, 801, 32)) == cfg.INPUT.MIN_SIZE_TRAIN and cfg.INPUT.MAX_SIZE_TRAIN == 1333
    assert cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS is False and cfg.SOLVER.WARMUP_ITERS == 0


@pytest.mark.parametrize(
    ("opts", "message"),
    [
        (["MODEL.DETR.NUM_QUERYS", "5"], "similar: MODEL.DETR.NUM_QUERIES"),
        (["MODEL.DTER.DROPOUT", "0.1"], "similar: MODEL.DETR.DROPOUT"),
        (["MODEL.DETR.NUM_QUERIES", "many"], "MODEL.DETR.NUM_QUERIES"),
        (["MODEL.DETR.NUM_QUERIES"], "has no value"),
        (["model.detr.num_queries", "5"], "similar: MODEL.DETR.NUM_QUERIES"),
        (["MODEL.DETR", "5"], "MODEL.DETR is a group and takes no value ('5'); its keys: AUX_LOSS"),
        (["MODEL.WEIGHTS", "None"], "MODEL.WEIGHTS has no value (None, or nothing behind it in a file): give one; ''"),
        (["DATASETS.TEST", "(a,b)"], "names stand between quotation marks"),
    ],
)
def test_mistakes_on_the_command_line_are_named(opts: list[str], message: str) -> None:
    with pytest.raises(ValueError) as error:
        load_config("", opts)
    assert message in str(error.value)


def test_mistakes_in_a_file_are_named(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("MODEL: {DETR: {NUM_QUERY: 3}}\n")
    with pytest.raises(ValueError, match=r"MODEL\.DETR\.NUM_QUERY; similar: MODEL\.DETR\.NUM_QUERIES"):
        load_config(str(path))


def test_a_key_with_nothing_behind_it_and_a_folder_are_named(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("SOLVER:\n  BASE_LR:\n")
    with pytest.raises(ValueError, match=r"SOLVER\.BASE_LR has no value"):
        load_config(str(path))
    with pytest.raises(FileNotFoundError, match=r"is a folder: give the config file, for instance .*mine\.yaml"):
        load_config(str(tmp_path))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.yaml", b"", r"a\.yaml, or its _BASE_, is empty or holds no KEY: VALUE pairs"),
        ("a.yaml", b"- SEED\n", "is empty or holds no KEY: VALUE pairs"),
        ("a.yaml", b"_BASE_: nowhere.yaml\n", r"the _BASE_ of the config file .*a\.yaml is not there: .*nowhere\.yaml"),
        ("a.yaml", b"_BASE_: a.yaml\n", r"a\.yaml is, by its _BASE_, based on itself"),
        ("a.yaml", "SEED: 3\n".encode("utf-16"), "cannot be read: it is text in UTF-16. Save it as UTF-8"),
        ("a.yaml", "OUTPUT_DIR: \u00e4\n".encode("latin1"), "it is not in UTF-8 .*: save it so"),
        ("a.py", b"from x import y\n", r"a\.py is Python .*: YAML is needed"),
    ],
    ids=str,
)
def test_files_that_are_no_configuration(name: str, content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        load_config(str(tmp_path / name))


def test_the_home_folder_is_meant_in_files_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "mine.yaml").write_text("OUTPUT_DIR: ~/out\nMODEL: {WEIGHTS: ~/a.pth}\n")
    cfg = load_config("~/mine.yaml", ["DATASETS.FOLDER", "~/cells"])
    assert (f"{tmp_path}/out", f"{tmp_path}/a.pth") == (cfg.OUTPUT_DIR, cfg.MODEL.WEIGHTS)
    assert f"{tmp_path}/cells" == cfg.DATASETS.FOLDER


def test_true_and_false_are_written_as_in_files_too() -> None:
    assert load_config("", ["TEST.EMA", "true"]).TEST.EMA is True
    assert load_config("", ["MODEL.DETR.AUX_LOSS", "FALSE"]).MODEL.DETR.AUX_LOSS is False


def test_a_whole_number_is_a_float_where_one_is_needed() -> None:
    cfg = load_config("", ["MODEL.DETR.DROPOUT", "0", "SOLVER.BASE_LR", "1", "SOLVER.MAX_ITER", "9"])
    assert cfg.MODEL.DETR.DROPOUT == 0.0 and cfg.SOLVER.BASE_LR == 1.0 and cfg.SOLVER.MAX_ITER == 9


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_cuda_the_device_is_the_cpu(caplog: pytest.LogCaptureFixture) -> None:
    assert load_config("", ["MODEL.DEVICE", "cuda"]).MODEL.DEVICE == "cpu"
    assert "MODEL.DEVICE is cpu" in caplog.text


def test_classes_are_the_training_sets(cfg: CfgNode) -> None:
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = ("coco_2017_train",), ("coco_2017_val",)
    assert num_classes(cfg) == 80 and class_names(cfg)[0] == "person"  # no file is read for it
    cfg.MODEL.DETR.NUM_CLASSES = 80
    check_class_count(cfg)
    cfg.MODEL.DETR.NUM_CLASSES = 5
    assert num_classes(cfg) == 5
    with pytest.raises(ValueError, match=r"NUM_CLASSES is 5, but coco_2017_train has 80 classes \(0: person, 1"):
        check_class_count(cfg)


def test_evaluation_does_not_need_the_training_sets_file(cfg: CfgNode, tmp_path: Path) -> None:
    (tmp_path / "val.json").write_text(json.dumps({"images": [], "categories": [{"id": 4, "name": "owl"}]}))
    cfg.DATASETS.COCO_FORMAT = [
        ["owls_train", str(tmp_path / "gone.json"), str(tmp_path)],
        ["owls_val", str(tmp_path / "val.json"), str(tmp_path)],
    ]
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = ("owls_train",), ("owls_val",)
    try:
        register_datasets(cfg)
        assert class_names(cfg) == ["owl"]
        cfg.DATASETS.TEST = ()
        with pytest.raises(ValueError, match=r"gone\.json"):
            class_names(cfg)
    finally:
        for name in ("owls_train", "owls_val"):
            DatasetCatalog.remove(name)
            MetadataCatalog.pop(name)


def test_no_dataset_and_no_count_is_an_error(cfg: CfgNode) -> None:
    with pytest.raises(ValueError, match=r"NUM_CLASSES is -1 and no dataset"):
        num_classes(cfg)
    cfg.DATASETS.TRAIN = ("never_heard_of",)
    with pytest.raises(ValueError, match=r"'never_heard_of' is not registered.*DATASETS\.COCO_FORMAT"):
        num_classes(cfg)


def test_a_projects_keys_are_added_once_it_is_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(projects, "_added", [])

    @projects.project_config
    def add(cfg: CfgNode) -> None:
        cfg.MODEL.MINE = CfgNode({"LEVELS": 3})

    assert projects.project_config(add) is add
    assert load_config("", ["MODEL.MINE.LEVELS", "4"]).MODEL.MINE.LEVELS == 4
    with pytest.raises(ValueError, match=r"similar: MODEL\.MINE\.LEVELS"):
        load_config("", ["MODEL.MINE.LEVEL", "4"])


@pytest.mark.parametrize("place", ["command line", "file"])
def test_a_tuple_without_its_comma_is_told(place: str, tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("DATASETS: {TEST: cells_val}\n")
    arguments = ("", ["DATASETS.TEST", "('cells_val')"]) if place == "command line" else (str(tmp_path / "mine.yaml"),)
    with pytest.raises(ValueError, match=r"DATASETS\.TEST is 'cells_val', one text.* \('cells_val',\)$"):
        load_config(*arguments)
