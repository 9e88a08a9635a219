"""One page on a run: report.html in its output folder, with everything in it, made from the files there.

Here is what the page shows, as plain data; its text and looks are in report.html.j2, which escapes all but the SVGs.
Each section is made for itself: where one cannot be, the page says why, and the rest stands.
"""

from __future__ import annotations

import base64
import io
import json
import logging
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import Boxes, BoxMode, Instances
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from PIL import Image
from torch import tensor

from detr_family.collect_env import collect_env
from detr_family.config import load_config
from detr_family.data.datasets.coco import register_datasets
from detr_family.data.images import read_image
from detr_family.evaluation.errors import find_errors, write_images
from detr_family.evaluation.evaluator import inference_folder
from detr_family.evaluation.image_scores import IOU, ImageScore, SetScore, score_images
from detr_family.visualization.curves import panel_svg, panels
from detr_family.visualization.draw import draw_comparison, read_metrics
from detr_family.visualization.error_charts import confusion_svg, error_tables, precision_recall_svg

_SHOWN_IMAGES = 4  # best, and as many worst
_LONGEST_SIDE = 520  # of an image on the page, pixels
_MOST_CLASSES = 400  # rows of a table
_RESULT = re.compile(r"(?:(.+?)/)?bbox/(.+)$", re.DOTALL)
_MOST_IMAGES = 5000  # judged one by one
_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Section:
    """A part of the page: what it shows, and the name of the template's macro that shows it."""

    kind: str
    title: str
    content: dict[str, Any]


class _Missing(Exception):
    """What a section would show is not there; the message stands on the page as a note."""


_Parts = list[tuple[str, str, Callable[[], dict[str, Any]]]]  # kind, title, content


def write_report(output_dir: str | os.PathLike[str], cfg: CfgNode | None = None) -> Path:
    """Writes report.html into the output folder of a run, finished or not.

    Args:
        output_dir: the folder that train_net.py wrote, with metrics.json.
        cfg: the run's configuration, its datasets registered; by default config.yaml in the folder.

    Returns:
        The file written.

    Raises:
        ValueError: there is no configuration to be read.
    """
    folder = Path(output_dir)
    if cfg is None:
        if not (folder / "config.yaml").is_file():
            raise ValueError(f"{folder} has no config.yaml: it is no output folder of train_net.py")
        cfg = load_config(str(folder / "config.yaml"))
        register_datasets(cfg)
    cfg = cfg.clone()
    cfg.defrost()
    cfg.OUTPUT_DIR = str(folder)  # it may have been moved
    try:
        metrics = read_metrics(str(folder / "metrics.json"))
    except ValueError as error:
        _logger.warning("The report has no curves: %s", error)
        metrics = []
    final = _final_results(metrics)
    parts: _Parts = [
        ("summary", "Summary", lambda: _summary(cfg, metrics, final)),
        ("curves", "Curves", lambda: _curves(metrics)),
        *_evaluations(cfg, final),
        ("settings", "Settings", lambda: {"rows": changed_settings(cfg)}),
        ("environment", "Environment", lambda: {"rows": list(collect_env().items())}),
    ]
    sections = [_section(*part) for part in parts]
    title = f"{cfg.MODEL.META_ARCHITECTURE}, {folder.name or folder.resolve().name}"
    templates = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        keep_trailing_newline=True,
    )
    page = templates.get_template("report.html.j2").render(title=title, sections=sections)
    target = folder / "report.html"
    unfinished = folder / "report.html.tmp"
    unfinished.write_text(page, encoding="utf-8", errors="backslashreplace")  # names of files may be no UTF-8
    os.replace(unfinished, target)
    return target


def _section(kind: str, title: str, make: Callable[[], dict[str, Any]]) -> _Section:
    try:
        return _Section(kind, title, make())
    except _Missing as missing:
        return _Section("note", title, {"text": str(missing)})
    except Exception as error:  # a page without one section is better than none
        _logger.warning("The section %r of the report could not be made", title, exc_info=True)
        return _Section("failed", title, {"text": f"{type(error).__name__}: {error}"})


def _final_results(metrics: Sequence[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """The last value of each COCO metric, by dataset ("" where there is one)."""
    final: dict[str, dict[str, float]] = {}
    for entry in metrics:
        for key, value in entry.items():
            if (found := _RESULT.match(key)) and isinstance(value, (int, float)):
                final.setdefault(found[1] or "", {})[found[2]] = value
    return final


def _percent(value: float | None) -> str:
    return "–" if value is None or value != value else f"{value:.1f}"


def _summary(cfg: CfgNode, metrics: Sequence[dict[str, Any]], final: dict[str, dict[str, float]]) -> dict[str, Any]:
    tiles = []
    for name, values in final.items():
        for key in ("AP", "AP50"):
            label = f"{key} on {name or ', '.join(cfg.DATASETS.TEST) or 'the test set'}"
            tiles.append((_percent(values.get(key)), label))
    if metrics:
        done = max([entry["iteration"] + 1 for entry in metrics if "total_loss" in entry], default=0)
        tiles.append((f"{done:,}", f"iterations of {cfg.SOLVER.MAX_ITER:,}, {cfg.SOLVER.IMS_PER_BATCH} images each"))
        times = [entry["time"] for entry in metrics if isinstance(entry.get("time"), float)]
        if times:
            seconds = sorted(times)[len(times) // 2]
            hours = seconds * done / 3600
            tiles.append(
                (f"{hours:.1f} h" if hours >= 1 else f"{60 * hours:.0f} min", f"training ({seconds:.2f} s each)")
            )
    rows = [
        ("Detector", cfg.MODEL.META_ARCHITECTURE),
        ("Trained on", ", ".join(cfg.DATASETS.TRAIN) or "–"),
        ("Evaluated on", ", ".join(cfg.DATASETS.TEST) or "–"),
        ("Started from", cfg.MODEL.WEIGHTS or "random weights"),
        ("Folder", Path(cfg.OUTPUT_DIR).resolve()),
    ]
    return {"tiles": tiles, "rows": rows, "evaluated": bool(final)}


def _curves(metrics: Sequence[dict[str, Any]]) -> dict[str, Any]:
    if not metrics:
        raise _Missing("Nothing was recorded.")
    return {
        "panels": [
            (
                f"{panel.title}: {', '.join(panel.keys.values())} over the iterations",
                Markup(panel_svg(panel, metrics)),
            )
            for panel in panels(metrics)
        ]
    }


@dataclass(frozen=True)
class _TestSet:
    """An evaluated dataset as it is registered."""

    name: str
    records: list[dict[str, Any]]
    class_names: list[str]
    numbers: dict[int, int]


def _read_test_set(name: str) -> _TestSet:
    records = []
    for record in DatasetCatalog.get(name):
        annotations = [
            {
                "bbox": BoxMode.convert(list(a["bbox"]), a["bbox_mode"], BoxMode.XYWH_ABS),
                "category_id": a["category_id"],
                "iscrowd": a.get("iscrowd", 0),
                "area": a.get("area", a["bbox"][2] * a["bbox"][3]),
            }
            for a in record.get("annotations", ())
        ]
        records.append({**record, "annotations": annotations, "annotated": "annotations" in record})
    metadata = MetadataCatalog.get(name)
    names = list(metadata.thing_classes)
    numbers = metadata.get("thing_dataset_id_to_contiguous_id") or {i: i for i in range(len(names))}
    return _TestSet(name, records, names, dict(numbers))


def _evaluations(cfg: CfgNode, final: dict[str, dict[str, float]]) -> _Parts:
    """Sections of results, of errors and of images for each test set."""
    parts: _Parts = []
    for name in cfg.DATASETS.TEST:
        known = final.get(name) if len(cfg.DATASETS.TEST) > 1 else final.get("")
        parts += [
            ("results", f"Results on {name}", partial(_results, name, known)),
            ("errors", f"Where it errs on {name}", partial(_errors, cfg, name)),
            ("images", f"Best and worst images of {name}", partial(_images, cfg, name)),
        ]
    for other, values in final.items():
        if other and other not in cfg.DATASETS.TEST:
            parts.append(("more_results", f"Results: {other}", partial(_more_results, values)))
    return parts


def _more_results(values: dict[str, float]) -> dict[str, Any]:
    return {"rows": [(key, _percent(value)) for key, value in values.items()]}


def _results(name: str, values: dict[str, float] | None) -> dict[str, Any]:
    if not values:
        raise _Missing("There was no evaluation, or the set has no annotations.")
    overall = [("all", "AP", ""), ("IoU 0.50", "AP50", ""), ("IoU 0.75", "AP75", "")]
    sizes = [("small, under 32²", "APs", "ARs"), ("medium", "APm", "ARm"), ("large, over 96²", "APl", "ARl")]
    rows = [
        (label, _percent(values.get(ap)), _percent(values.get(ar or "AR100" if ap == "AP" else ar)))
        for label, ap, ar in overall + sizes
    ]
    counts: dict[str, int] = {}
    try:
        test_set = _read_test_set(name)
    except Exception:  # its file is not here any more
        counted = False
    else:
        counted = True
        counts = dict.fromkeys(test_set.class_names, 0)
        for record in test_set.records:
            for a in record["annotations"]:
                counts[test_set.class_names[a["category_id"]]] += not a["iscrowd"]
    # The overall APs, APm, APl have no hyphen.
    classes = {key[3:]: value for key, value in values.items() if key.startswith("AP-")}
    if not classes and len(counts) == 1:
        classes = {next(iter(counts)): values.get("AP", float("nan"))}
    ordered = sorted(classes.items(), key=lambda pair: -pair[1] if pair[1] == pair[1] else 1.0)
    bars = [(label, counts.get(label, "–"), _percent(ap), _width(ap)) for label, ap in ordered[:_MOST_CLASSES]]
    return {"rows": rows, "counted": counted, "classes": bars}


def _width(ap: float) -> float:
    return 0.0 if ap != ap else round(0.2 * max(ap, 0.0), 2)


def _judged(cfg: CfgNode, name: str) -> tuple[_TestSet, list[dict[str, Any]], SetScore]:
    """A test set with at most so many images, the results on it, and scores."""
    path = Path(inference_folder(cfg, name)) / "coco_instances_results.json"
    if not path.is_file():
        raise _Missing("There are no results of an evaluation.")
    test_set = _read_test_set(name)
    if not all(record["annotated"] for record in test_set.records):
        raise _Missing("The set has no annotations to compare with.")
    results = json.loads(path.read_text(encoding="utf-8"))
    step = -(-len(test_set.records) // _MOST_IMAGES)
    limit = cfg.TEST.EVAL_DETECTIONS
    scored = score_images(test_set.records[::step], results, test_set.numbers, limit)
    return replace(test_set, records=test_set.records[::step]), results, scored


def _errors(cfg: CfgNode, name: str) -> dict[str, Any]:
    test_set, results, scored = _judged(cfg, name)
    found = find_errors(
        test_set.records, results, test_set.numbers, test_set.class_names, scored.threshold, cfg.TEST.EVAL_DETECTIONS
    )
    write_images(found, Path(inference_folder(cfg, name)) / "images.csv")
    return {
        "threshold": found.threshold,
        "ap50": found.ap50,
        "tables": error_tables(found),
        "charts": [Markup(precision_recall_svg(found)), Markup(confusion_svg(found))],
    }


def _images(cfg: CfgNode, name: str) -> dict[str, Any]:
    test_set, _, scored = _judged(cfg, name)
    return {
        "threshold": scored.threshold,
        "f1": scored.f1,
        "precision": scored.precision,
        "recall": scored.recall,
        "iou": IOU,
        "judged": len(scored.images),
        "count": len(DatasetCatalog.get(name)),
        "groups": [
            (title, [_figure(image, test_set, scored.threshold) for image in chosen])
            for title, chosen in zip(("Best", "Worst"), _extremes(scored), strict=True)
        ],
    }


def _extremes(scored: SetScore) -> tuple[list[ImageScore], list[ImageScore]]:
    """The best and the worst images with objects or detections; no image is both."""
    judged = [p for p in scored.images if p.objects or p.wrong]
    ordered = sorted(judged, key=lambda p: (-p.f1, -p.objects if p.f1 >= 0.5 else p.objects))
    half = min(_SHOWN_IMAGES, (len(ordered) + 1) // 2)
    return ordered[:half], ordered[max(len(ordered) - _SHOWN_IMAGES, half) :][::-1]


def _figure(score: ImageScore, test_set: _TestSet, threshold: float) -> dict[str, str]:
    """An image with its caption and its address on the page, or why it could not be read."""
    path = str(score.record["file_name"])
    caption = f"{os.path.basename(path)}: {score.found} of {score.objects} found, {score.wrong} wrong"
    try:
        image = Image.fromarray(read_image(path, "RGB"))
    except ValueError as error:
        return {"failed": str(error)}
    factor = min(_LONGEST_SIDE / max(image.size), 1.0)
    if factor < 1:
        size = max(round(image.width * factor), 1), max(round(image.height * factor), 1)
        image = image.resize(size, Image.Resampling.BICUBIC)
    found = Instances((image.height, image.width))
    found.pred_boxes = _boxes([d["bbox"] for d in score.detections], factor)
    found.scores = tensor([d["score"] for d in score.detections])
    found.pred_classes = tensor([d["category_id"] for d in score.detections]).long()
    objects = [a for a in score.record["annotations"] if not a["iscrowd"]]
    truth = Instances((image.height, image.width))
    truth.gt_boxes = _boxes([a["bbox"] for a in objects], factor)
    truth.gt_classes = tensor([a["category_id"] for a in objects]).long()
    drawn = draw_comparison(image, found, truth, test_set.class_names, threshold)
    file = io.BytesIO()
    drawn.save(file, "JPEG", quality=82)
    data = base64.b64encode(file.getvalue()).decode()
    return {"failed": "", "caption": caption, "address": f"data:image/jpeg;base64,{data}"}


def _boxes(boxes: Sequence[Sequence[float]], factor: float) -> Boxes:
    array = tensor(boxes, dtype=tensor(0.0).dtype).reshape(-1, 4) * factor
    array[:, 2:] += array[:, :2]
    return Boxes(array)


def changed_settings(cfg: CfgNode) -> list[tuple[str, str, str]]:
    """Key, value and default of what differs from the defaults of Detectron2 and detr_family."""
    here, default = _flat(cfg), _flat(load_config("", ["MODEL.DEVICE", cfg.MODEL.DEVICE]))
    return [(key, value, default.get(key, "–")) for key, value in here.items() if value != default.get(key)]


def _flat(cfg: CfgNode, prefix: str = "") -> dict[str, str]:
    found: dict[str, str] = {}
    for key, value in cfg.items():
        if isinstance(value, CfgNode):
            found.update(_flat(value, f"{prefix}{key}."))
        else:
            found[prefix + key] = repr(_lists(value))
    return found


def _lists(value: Any) -> Any:
    """YAML has no tuples: nested ones become lists, so that the same compares as the same."""
    return [_lists(part) for part in value] if isinstance(value, (tuple, list)) else value
