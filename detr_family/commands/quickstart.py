"""From nothing to a trained detector on generated shapes, with images of what it finds.

Everything goes into one folder: data/ (kept and used again), train_net.py's log, metrics and weights,
images/ and curves.png.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.detection_utils import annotations_to_instances, read_image
from detectron2.modeling import build_model

from detr_family.checkpoint import DETRCheckpointer
from detr_family.config import load_config
from detr_family.data.dataset_mapper import DETRDatasetMapper
from detr_family.data.datasets.coco import register_datasets
from detr_family.data.datasets.shapes import write_shapes
from detr_family.visualization.curves import write_curves
from detr_family.visualization.draw import draw_comparison, read_metrics

_MARKER = "made_by_quickstart.json"
_TRAIN_IMAGES, _VAL_IMAGES = 1500, 200
_DRAWN = 16


def quickstart(train_net: Path, config_file: Path, output: Path, device: str | None = None) -> tuple[float, float]:
    """Writes shapes, trains and evaluates with train_net.py, draws predictions and curves.

    A folder left by an earlier call, finished or interrupted, is cleared first, its data/ excepted.

    Args:
        train_net: path of train_net.py, run by this same interpreter.
        config_file: the recipe.
        output: the folder for everything.
        device: torch's name of the device; by default "cuda" where there is one, else "cpu".

    Returns:
        AP and AP50 of the last evaluation, in percent.

    Raises:
        ValueError: a file or device is missing, the folder belongs to something else, or the training failed.
    """
    for path in (train_net, config_file):
        if not path.is_file():
            raise ValueError(f"{path} is missing.")
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"--device {device}: this torch sees no CUDA device. Use --device cpu.")
    output = output.expanduser().resolve()
    _clear(output)

    _say(f"Data: {_TRAIN_IMAGES} + {_VAL_IMAGES} generated images in {output / 'data'}")
    entries = write_shapes(str(output / "data"), _TRAIN_IMAGES, _VAL_IMAGES)
    options = [
        *("DATASETS.COCO_FORMAT", repr([list(entry) for entry in entries])),
        *("DATASETS.TRAIN", repr((entries[0][0],))),
        *("DATASETS.TEST", repr((entries[1][0],))),
        *("MODEL.DEVICE", device),
        *("OUTPUT_DIR", str(output)),
    ]
    command = [sys.executable, str(train_net), "--config-file", str(config_file), *options]
    _say(f"Training on {device}: {train_net.name} --config-file {config_file}")
    status = subprocess.run(command, check=False).returncode
    if status:
        raise ValueError(f"The training ended with exit status {status}; the reason stands above.")

    _say("Drawing predictions and curves")
    cfg = load_config(str(config_file), options)
    draw_predictions(cfg, str(output / "model_final.pth"), output / "pictures", _DRAWN)
    metrics = read_metrics(str(output / "metrics.json"))
    write_curves(metrics, str(output / "curves.png"))
    evaluated = [entry for entry in metrics if "bbox/AP" in entry]
    if not evaluated:
        raise ValueError(f"{output / 'metrics.json'} has no bbox/AP: the recipe {config_file} never evaluates.")
    return float(evaluated[-1]["bbox/AP"]), float(evaluated[-1]["bbox/AP50"])


def draw_predictions(cfg: CfgNode, weights: str, folder: Path, count: int) -> list[Path]:
    """Draws predictions beside ground truth for the first images of DATASETS.TEST[0].

    Drawn are predictions that score 0.5 or more. Where those are fewer than the true boxes of all images
    together, as after a short training, the threshold is lowered until they are as many.

    Args:
        cfg: the whole config; its COCO_FORMAT datasets are registered here.
        weights: checkpoint to load.
        folder: where the PNGs go, made if missing.
        count: how many images, at most.

    Returns:
        The files written.
    """
    register_datasets(cfg)
    name = cfg.DATASETS.TEST[0]
    model = build_model(cfg)
    DETRCheckpointer(model).load(weights)
    model.eval()
    mapper = DETRDatasetMapper(cfg, is_train=False)
    records = DatasetCatalog.get(name)[:count]
    with torch.no_grad():
        predictions = [model([mapper(record)])[0]["instances"].to("cpu") for record in records]
    truths = [
        annotations_to_instances(record.get("annotations", []), (record["height"], record["width"]))
        for record in records
    ]
    scores = torch.cat([found.scores for found in predictions]).sort(descending=True).values
    wanted = min(sum(map(len, truths)), len(scores))
    threshold = min(0.5, float(scores[wanted - 1])) if wanted else 0.5

    class_names = MetadataCatalog.get(name).thing_classes
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for record, found, truth in zip(records, predictions, truths, strict=True):
        image = read_image(record["file_name"], "RGB")
        written.append(folder / f"{Path(record['file_name']).stem}.png")
        draw_comparison(image, found, truth, class_names, threshold).save(written[-1])
    return written


def _clear(output: Path) -> None:
    """Empties a folder that an earlier call made, or marks a new one as made here."""
    marker = output / _MARKER
    if output.exists() and not output.is_dir():
        raise ValueError(f"{output} is not a folder. Choose another one with --output.")
    if output.is_dir() and any(output.iterdir()) and not marker.is_file():
        raise ValueError(f"{output} holds something that quickstart did not make. Choose another --output.")
    output.mkdir(parents=True, exist_ok=True)
    marker.write_text(json.dumps({"note": "quickstart clears this folder when it is run again"}), encoding="utf-8")
    for entry in output.iterdir():
        if entry.name in (_MARKER, "data"):
            continue
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            os.remove(entry)


def _say(text: str) -> None:
    print(f"[quickstart] {text}", flush=True)
