"""Files with something wrong in them: a result that means what the file says, or one line that says what is wrong.

ENDURANCE_MUTATIONS is how many of each kind are tried, 300 in full (docs/training.md); cut down by default.
"""

from __future__ import annotations

import copy
import json
import logging
import math
import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import yaml
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from engine_runs import run_cfg

from detr_family.checkpoint import DETRCheckpointer
from detr_family.config import load_config
from detr_family.data.dataset_mapper import DETRDatasetMapper
from detr_family.data.datasets.coco import register_datasets, training_dicts
from detr_family.data.datasets.coco_json import CLIPPED, scan_coco_json
from detr_family.engine import Trainer
from detr_family.errors import UserError, mistakes

COUNT = int(os.environ.get("ENDURANCE_MUTATIONS", "25"))
ODD = [
    *(None, True, False, 0, 1, -1, 2, 7, 10**9, 10**400, -0.5, 1.5, 1e-300, math.nan, math.inf, "", "0", "1"),
    *("x", "\x00", "\ud800", "../x", "ä\n", [], [1], [0, 0, 0, 0], [1, 2, 3], [[]], {}, {"id": 1}, "a" * 5000),
]


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """Hundreds of warnings are no news here."""
    logging.disable(logging.ERROR)
    yield
    logging.disable(logging.NOTSET)


def places(node: Any) -> list[tuple[Any, Any]]:
    """Every (container, key) below a node of JSON."""
    keys = list(node) if isinstance(node, dict) else range(len(node)) if isinstance(node, list) else ()
    return [place for key in keys for place in [(node, key), *places(node[key])]]


def change_structure(draw: random.Random, data: Any) -> None:
    """One change in place: another value, one from elsewhere, one that is gone, one that is there twice."""
    container, key = draw.choice(places(data))
    kind = draw.randrange(4)
    if kind == 0:
        container[key] = copy.deepcopy(draw.choice(ODD))
    elif kind == 1:
        other, name = draw.choice(places(data))
        container[key] = copy.deepcopy(other[name])
    elif kind == 2:
        del container[key]
    elif isinstance(container, list):
        container.insert(key, copy.deepcopy(container[key]))
    else:
        container[draw.choice(["id", "bbox", "iscrowd", "name", "extra"])] = copy.deepcopy(container[key])


def change_bytes(draw: random.Random, content: bytes) -> bytes:
    """One change: cut short, a byte or a run of bytes altered, left out, or there twice."""
    start = draw.randrange(len(content))
    end = min(start + draw.choice([1, 1, 4, 100]), len(content))
    kind = draw.randrange(5)
    if kind == 0:
        return content[:start]
    if kind == 1:
        return content[:start] + bytes([content[start] ^ (1 << draw.randrange(8))]) + content[start + 1 :]
    if kind == 2:
        return content[:start] + draw.randbytes(end - start) + content[end:]
    if kind == 3:
        return content[:start] + content[end:]
    return content[:end] + content[start:]


def tried(use: Callable[[], None]) -> str:
    """What is wrong with how something went: empty for a result, and for one clear line."""
    try:
        with mistakes():
            use()
    except UserError as error:
        text = str(error)
        if "\n" in text or not 20 < len(text) < 1500:
            return f"no clear line: {text[:300]!r}"
    except AssertionError as error:
        return f"assertion: {error}"
    except Exception as error:
        place = error.__traceback__
        while place is not None and place.tb_next is not None:
            place = place.tb_next
        where = "" if place is None else f" in {place.tb_frame.f_code.co_filename}:{place.tb_lineno}"
        return f"{type(error).__name__}: {str(error)[:300]!r}{where}"
    return ""


def found(wrong: dict[int, str]) -> str:
    return "\n".join(f"seed {seed}: {text}" for seed, text in wrong.items())


UNSET = (None, 0)


def numbers(annotation: dict[str, Any]) -> Any:
    """The box, of which exporters write numbers as texts."""
    box = annotation.get("bbox")
    try:
        return [float(x) if isinstance(x, str) else x for x in box] if isinstance(box, list) else box
    except ValueError:
        return box


def means_the_same(json_file: str, root: str) -> None:
    """What is read of a COCO file, against a second, simple reading of it."""
    data = json.loads(Path(json_file).read_text(encoding="utf-8-sig"))
    scan = scan_coco_json(json_file, root)
    names = {int(c["id"]): c["name"] for c in data["categories"]}
    order = sorted(names)
    assert [r["image_id"] for r in scan.records] == sorted(int(i["id"]) for i in data["images"])
    by_id = {int(i["id"]): i for i in data["images"]}
    for record in scan.records:
        entry = by_id[record["image_id"]]
        assert record["file_name"].endswith(entry["file_name"].replace("\\", "/").split("/")[-1])
        for side in ("width", "height"):
            stated = entry.get(side)
            if type(stated) in (int, float) and 0 < stated < math.inf and stated == int(stated):
                assert record[side] == stated or scan.without_size, f"{side} {record[side]} for {stated}"
    annotations = data.get("annotations")
    if annotations is None:
        return
    kept = [(r["image_id"], a) for r in scan.records for a in r["annotations"]]
    assert len(kept) + scan.num_left_out == len(annotations), "an annotation is gone without a word"
    clipped = len(scan.faults.get(CLIPPED, []))
    plain = [(int(a["image_id"]), order.index(int(a["category_id"])), a) for a in annotations]
    for image_id, read in kept:
        same = [a for i, c, a in plain if i == image_id and c == read["category_id"] and numbers(a) == read["bbox"]]
        clipped -= not same
        crowd = {int(a.get("iscrowd") not in (*UNSET, "0") or a.get("ignore") not in (*UNSET, "0")) for a in same}
        assert not same or read["iscrowd"] in crowd
    assert clipped >= 0, "a box was changed without a word"


def test_annotation_files(tmp_path: Path) -> None:
    cfg = run_cfg("DETR", tmp_path, "out")
    _, json_file, root = cfg.DATASETS.COCO_FORMAT[0]
    content = Path(json_file).read_bytes()
    mapper = DETRDatasetMapper(cfg, True)
    changed = tmp_path / "changed.json"

    def use() -> None:
        register_datasets(cfg)
        dicts = training_dicts(cfg)
        means_the_same(str(changed), root)
        for record in dicts[:2]:
            mapper(record)

    cfg.DATASETS.COCO_FORMAT, cfg.DATASETS.TRAIN = [["changed", str(changed), root]], ("changed",)
    wrong = {}
    for seed in range(COUNT):
        draw = random.Random(seed)
        if seed % 2:
            changed.write_bytes(change_bytes(draw, content))
        else:
            data = json.loads(content)
            for _ in range(draw.choice([1, 1, 3])):
                change_structure(draw, data)
            changed.write_text(json.dumps(data), encoding="utf-8")
        try:
            if text := tried(use):
                wrong[seed] = text
        finally:
            for catalog in (DatasetCatalog, MetadataCatalog):
                if "changed" in catalog.list():
                    catalog.remove("changed")
    assert not wrong, found(wrong)


KEYS = (
    *("MODEL.DETR", "MODEL.DINO", "MODEL.PIXEL", "MODEL.META_ARCHITECTURE", "MODEL.BACKBONE.NAME"),
    *("SOLVER", "INPUT", "DATASETS", "DATALOADER", "TEST", "SEED", "VIS_PERIOD"),
)


def leaves(node: CfgNode, prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in node.items():
        flat.update(leaves(value, f"{prefix}{key}.") if isinstance(value, CfgNode) else {prefix + key: value})
    return flat


def nearby(draw: random.Random, value: Any) -> Any:
    """Another value of the same type, as a typing error makes it."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return draw.choice([0, -1, 1, value + 1, 10 * value, 3])
    if isinstance(value, float):
        return draw.choice([0.0, -1.0, 1.0, 10 * value, math.nan, math.inf, -value])
    if isinstance(value, str):
        return draw.choice(["", value + "x", value[:-1], value.upper(), "../" + value])
    if isinstance(value, (list, tuple)):
        entries = list(value)
        return draw.choice([[], entries[:-1], entries * 2, [nearby(draw, x) for x in entries], [0], [-1], ["x"]])
    return None


def change_setting(draw: random.Random, cfg: dict[str, Any], keys: dict[str, Any]) -> None:
    """One key gets another value, in place; or becomes one that there is not."""
    *groups, key = draw.choice(sorted(keys)).split(".")
    node = cfg
    for group in groups:
        node = node[group]
    kind = draw.randrange(8)
    if kind == 0:
        node[key + draw.choice(["S", "X"])] = node.pop(key)
    elif kind == 1:
        node[key] = copy.deepcopy(draw.choice([x for x in ODD if x != "\ud800"]))
    else:
        node[key] = nearby(draw, node[key])


def test_configurations(tmp_path: Path) -> None:
    cfg = run_cfg("DINO", tmp_path, "out", ["SOLVER.MAX_ITER", 1, "VIS_REPORT", False])
    cfg.DATASETS.TEST = (cfg.DATASETS.COCO_FORMAT[1][0],)
    keys = {k: v for k, v in leaves(cfg).items() if k.startswith(KEYS) and k != "DATALOADER.NUM_WORKERS"}
    content = cfg.dump()
    path = tmp_path / "config.yaml"

    def use() -> None:
        changed = load_config(str(path))
        changed.OUTPUT_DIR, changed.SOLVER.MAX_ITER = str(tmp_path / "out"), 1
        changed.MODEL.DEVICE, changed.DATALOADER.NUM_WORKERS = "cpu", 0
        Trainer(changed)

    wrong = {}
    for seed in range(COUNT):
        draw = random.Random(seed)
        if seed % 4 == 3:
            path.write_bytes(change_bytes(draw, content.encode()))
        else:
            data = yaml.safe_load(content)
            change_setting(draw, data, keys)
            path.write_text(yaml.safe_dump(data), encoding="utf-8")
        if text := tried(use):
            wrong[seed] = text
    assert not wrong, found(wrong)


def test_checkpoints(tmp_path: Path) -> None:
    torch.set_num_threads(1)
    model = tiny.build("DETR")
    folder = tmp_path / "run"
    folder.mkdir()
    DETRCheckpointer(model, str(folder), class_names=["a", "b", "c"]).save("model_0000001", iteration=1)
    path = folder / "model_0000001.pth"
    content = path.read_bytes()
    right = {k: v.clone() for k, v in model.state_dict().items()}
    data = torch.load(path, weights_only=True)

    def use() -> None:
        path.write_bytes(changed)
        (folder / "last_checkpoint").write_text(path.name)
        if resumed:
            DETRCheckpointer(model, str(folder), class_names=["a", "b", "c"]).resume_or_load("", resume=True)
        else:
            DETRCheckpointer(model, str(tmp_path), class_names=["a", "b", "c"]).load(str(path))
        if expected is not None:  # the file's own tensors, or it would have been told
            for name, value in model.state_dict().items():
                assert torch.equal(value, expected[name]), f"{name} was changed without a word"

    wrong = {}
    for seed in range(COUNT):
        draw = random.Random(seed)
        model.load_state_dict(right)
        resumed = seed % 4 >= 2
        expected: dict[str, torch.Tensor] | None = right
        if seed % 2:
            changed = change_bytes(draw, content)
        else:
            other = {**data, "model": dict(data["model"])}
            change_weights(draw, other)
            torch.save(other, tmp_path / "other.pth")
            changed, expected = (tmp_path / "other.pth").read_bytes(), None
        if text := tried(use):
            wrong[seed] = text
    assert not wrong, found(wrong)


def change_weights(draw: random.Random, data: dict[str, Any]) -> None:
    """One change of what a checkpoint holds, in place."""
    node = data if draw.random() < 0.3 else data["model"]
    name = draw.choice(sorted(node))
    kind = draw.randrange(6)
    value = node[name]
    if kind == 0:
        del node[name]
    elif kind == 1:
        node[name + draw.choice(["x", ".weight"])] = node.pop(name)
    elif kind == 2 and isinstance(value, torch.Tensor):
        others = [value[None], value.flatten()[:-1], value.double(), value.to(torch.int8), value.half()]
        node[name] = draw.choice(others)
    elif kind == 3:
        node[name] = node[draw.choice(sorted(node))]
    else:
        node[name] = draw.choice([None, 1, "x", [], {}, [1.0], {"a": torch.zeros(1)}, torch.zeros(())])
