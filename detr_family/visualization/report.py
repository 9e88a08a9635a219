"""One page on a run: report.html in its output folder, with everything in it, made from the files there.

Each section is made for itself: where one cannot be, the page says why, and the rest stands.
"""

from __future__ import annotations

import base64
import html
import io
import json
import logging
import os
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import Boxes, BoxMode, Instances
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

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1a1a1a; background: #fff; max-width: 1120px;
  margin: 0 auto; padding: 1.5em }
h1 { font-size: 1.6em; margin: 0 } h2 { font-size: 1.25em; margin: 2em 0 .5em; border-bottom: 2px solid #0072B2 }
h3 { font-size: 1.05em; margin: 1.4em 0 .4em } p { max-width: 75ch } .note { color: #555 }
table { border-collapse: collapse; margin: .6em 0 } td, th { padding: .2em .8em .2em 0; text-align: left;
  vertical-align: top; border-bottom: 1px solid #ddd } td.n, th.n { text-align: right;
  font-variant-numeric: tabular-nums }
td.v:first-child { overflow-wrap: normal; white-space: nowrap }
td.v { font-family: ui-monospace, monospace; font-size: .88em; overflow-wrap: anywhere }
.tiles { display: flex; flex-wrap: wrap; gap: .8em; margin: 1em 0 } .tile { background: #f2f5f8; padding: .6em 1em }
.tile b { display: block; font-size: 1.5em } .grid { display: grid; grid-template-columns: 1fr 1fr; gap: 1em }
.grid svg { width: 100%; height: auto } figure { margin: 1em 0 } figure img { max-width: 100%; height: auto }
.bar { display: inline-block; height: .8em; background: #0072B2; vertical-align: baseline }
.failed { background: #fdf1e7; border-left: 4px solid #D55E00; padding: .5em 1em }
@media (max-width: 800px) { .grid { grid-template-columns: 1fr } }
"""


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
    sections: list[tuple[str, Callable[[], str]]] = [
        ("Summary", lambda: _summary(cfg, metrics, final)),
        ("Curves", lambda: _curves(metrics)),
        *_evaluations(cfg, final),
        ("Settings", lambda: _settings(cfg)),
        ("Environment", lambda: _table(("", ""), collect_env().items(), code=True)),
    ]
    body = "".join(_section(title, make) for title, make in sections)
    title = f"{cfg.MODEL.META_ARCHITECTURE}, {folder.name or folder.resolve().name}"
    page = (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{_text(title)}</title>'
        f'<meta name="viewport" content="width=device-width"><style>{_STYLE}</style></head>\n'
        f"<body><h1>{_text(title)}</h1>{body}</body></html>\n"
    )
    target = folder / "report.html"
    partial = folder / "report.html.tmp"
    partial.write_text(page, encoding="utf-8")
    os.replace(partial, target)
    return target


def _section(title: str, make: Callable[[], str]) -> str:
    try:
        content = make()
    except Exception as error:  # a page without one section is better than none
        _logger.warning("The section %r of the report could not be made", title, exc_info=True)
        content = f'<p class="failed">Could not be made: {_text(f"{type(error).__name__}: {error}")}</p>'
    return f"<section><h2>{_text(title)}</h2>\n{content}</section>\n"


def _text(value: object) -> str:
    return html.escape(str(value).encode("utf-8", "backslashreplace").decode("utf-8"))


def _table(
    head: Sequence[str], rows: Iterable[Sequence[object]], numbers: Sequence[int] = (), code: bool = False
) -> str:
    """A table; the columns `numbers` are aligned to the right."""

    def cells(tag: str, row: Sequence[object]) -> str:
        made = []
        for i, value in enumerate(row):
            kind = ' class="n"' if i in numbers else ' class="v"' if code and tag == "td" else ""
            content = str(value) if isinstance(value, _Html) else _text(value)
            made.append(f"<{tag}{kind}>{content}</{tag}>")
        return f"<tr>{''.join(made)}</tr>"

    heading = cells("th", head) if any(head) else ""
    return f"<table>{heading}{''.join(cells('td', row) for row in rows)}</table>\n"


class _Html(str):
    """Text that is HTML already."""


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


def _summary(cfg: CfgNode, metrics: Sequence[dict[str, Any]], final: dict[str, dict[str, float]]) -> str:
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
    made = "".join(f'<div class="tile"><b>{_text(value)}</b>{_text(label)}</div>' for value, label in tiles)
    rows = [
        ("Detector", cfg.MODEL.META_ARCHITECTURE),
        ("Trained on", ", ".join(cfg.DATASETS.TRAIN) or "–"),
        ("Evaluated on", ", ".join(cfg.DATASETS.TEST) or "–"),
        ("Started from", cfg.MODEL.WEIGHTS or "random weights"),
        ("Folder", Path(cfg.OUTPUT_DIR).resolve()),
    ]
    without = "" if final else '<p class="note">This run was never evaluated (TEST.EVAL_EPOCHS, TEST.EVAL_PERIOD).</p>'
    return f'<div class="tiles">{made}</div>{without}{_table(("", ""), rows)}'


def _curves(metrics: Sequence[dict[str, Any]]) -> str:
    if not metrics:
        return '<p class="note">Nothing was recorded.</p>'
    drawn = []
    for panel in panels(metrics):
        label = _text(f"{panel.title}: {', '.join(panel.keys.values())} over the iterations")
        svg = panel_svg(panel, metrics).replace("<svg", f'<svg role="img" aria-label="{label}"', 1)
        drawn.append(f"<div>{svg}</div>")
    note = '<p class="note">All values, those of the earlier decoder layers too: metrics.csv.</p>'
    return f'<div class="grid">{"".join(drawn)}</div>{note}'


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


def _evaluations(cfg: CfgNode, final: dict[str, dict[str, float]]) -> list[tuple[str, Callable[[], str]]]:
    """A section of results and one of images for each test set."""
    sections: list[tuple[str, Callable[[], str]]] = []
    for name in cfg.DATASETS.TEST:
        known = final.get(name) if len(cfg.DATASETS.TEST) > 1 else final.get("")

        def results(name: str = name, known: dict[str, float] | None = known) -> str:
            return _results(name, known)

        def images(name: str = name) -> str:
            return _images(cfg, name)

        def errors(name: str = name) -> str:
            return _errors(cfg, name)

        sections += [
            (f"Results on {name}", results),
            (f"Where it errs on {name}", errors),
            (f"Best and worst images of {name}", images),
        ]
    for other, values in final.items():
        if other and other not in cfg.DATASETS.TEST:

            def more(values: dict[str, float] = values) -> str:
                return _table(("metric", "%"), [(k, _percent(v)) for k, v in values.items()], numbers=(1,))

            sections.append((f"Results: {other}", more))
    return sections


def _results(name: str, values: dict[str, float] | None) -> str:
    if not values:
        return '<p class="note">There was no evaluation, or the set has no annotations.</p>'
    overall = [("all", "AP", ""), ("IoU 0.50", "AP50", ""), ("IoU 0.75", "AP75", "")]
    sizes = [("small, under 32²", "APs", "ARs"), ("medium", "APm", "ARm"), ("large, over 96²", "APl", "ARl")]
    rows = [
        (label, _percent(values.get(ap)), _percent(values.get(ar or "AR100" if ap == "AP" else ar)))
        for label, ap, ar in overall + sizes
    ]
    text = _table(("objects", "AP (%)", "AR, 100 an image (%)"), rows, numbers=(1, 2))
    counts: dict[str, int] = {}
    try:
        test_set = _read_test_set(name)
    except Exception:  # its file is not here any more
        text += '<p class="note">The annotation file is not to be had: no counts.</p>'
    else:
        counts = dict.fromkeys(test_set.class_names, 0)
        for record in test_set.records:
            for a in record["annotations"]:
                counts[test_set.class_names[a["category_id"]]] += not a["iscrowd"]
    # The overall APs, APm, APl have no hyphen.
    classes = {key[3:]: value for key, value in values.items() if key.startswith("AP-")}
    if not classes and len(counts) == 1:
        classes = {next(iter(counts)): values.get("AP", float("nan"))}
    ordered = sorted(classes.items(), key=lambda pair: -pair[1] if pair[1] == pair[1] else 1.0)
    bars = [
        (label, counts.get(label, "–"), _percent(ap), _Html(f'<span class="bar" style="width:{_width(ap)}em"></span>'))
        for label, ap in ordered[:_MOST_CLASSES]
    ]
    return text + "<h3>By class</h3>" + _table(("class", "objects", "AP (%)", ""), bars, numbers=(1, 2))


def _width(ap: float) -> float:
    return 0.0 if ap != ap else round(0.2 * max(ap, 0.0), 2)


def _judged(cfg: CfgNode, name: str) -> tuple[_TestSet, list[dict[str, Any]], SetScore] | str:
    """A test set with at most so many images, the results on it, and scores; or a note on what is missing."""
    path = Path(inference_folder(cfg, name)) / "coco_instances_results.json"
    if not path.is_file():
        return '<p class="note">There are no results of an evaluation.</p>'
    test_set = _read_test_set(name)
    if not all(record["annotated"] for record in test_set.records):
        return '<p class="note">The set has no annotations to compare with.</p>'
    results = json.loads(path.read_text(encoding="utf-8"))
    step = -(-len(test_set.records) // _MOST_IMAGES)
    limit = cfg.TEST.EVAL_DETECTIONS
    scored = score_images(test_set.records[::step], results, test_set.numbers, limit)
    return replace(test_set, records=test_set.records[::step]), results, scored


def _errors(cfg: CfgNode, name: str) -> str:
    judged = _judged(cfg, name)
    if isinstance(judged, str):
        return judged
    test_set, results, scored = judged
    found = find_errors(
        test_set.records, results, test_set.numbers, test_set.class_names, scored.threshold, cfg.TEST.EVAL_DETECTIONS
    )
    write_images(found, Path(inference_folder(cfg, name)) / "images.csv")
    text = (
        f"<p>Counts are at a score of {found.threshold:.2f}, IoU 0.5. Kinds are TIDE's (arXiv 2008.08115); the AP50 to "
        f"gain is what mending one kind alone, at all scores, would add to {found.ap50:.1f}.</p>"
    )
    charts = "".join(f"<div>{svg}</div>" for svg in (precision_recall_svg(found), confusion_svg(found)))
    tables = [f"<h3>{_text(t.title)}</h3>" + _table(t.head, t.rows, t.numbers) for t in error_tables(found)]
    return f'{text}{tables[0]}<div class="grid">{charts}</div>{"".join(tables[1:])}'


def _images(cfg: CfgNode, name: str) -> str:
    judged = _judged(cfg, name)
    if isinstance(judged, str):
        return judged
    test_set, _, scored = judged
    text = (
        f"<p>At a score of {scored.threshold:.2f} or more, where most is right on all images together (F1 "
        f"{scored.f1:.2f}), {100 * scored.precision:.0f} % of the boxes are right and {100 * scored.recall:.0f} % "
        f"of the objects are found (IoU {IOU:g} or more, class right). It is a threshold to start from in demo.py.</p>"
    )
    count = len(DatasetCatalog.get(name))
    if len(scored.images) < count:
        text += f'<p class="note">Judged were {len(scored.images)} of {count} images.</p>'
    best, worst = _extremes(scored)
    for title, chosen in (("Best", best), ("Worst", worst)):
        if chosen:
            text += f"<h3>{title}</h3>" + "".join(_figure(image, test_set, scored.threshold) for image in chosen)
    return text or '<p class="note">There are no images.</p>'


def _extremes(scored: SetScore) -> tuple[list[ImageScore], list[ImageScore]]:
    """The best and the worst images with objects or detections; no image is both."""
    judged = [p for p in scored.images if p.objects or p.wrong]
    ordered = sorted(judged, key=lambda p: (-p.f1, -p.objects if p.f1 >= 0.5 else p.objects))
    half = min(_SHOWN_IMAGES, (len(ordered) + 1) // 2)
    return ordered[:half], ordered[max(len(ordered) - _SHOWN_IMAGES, half) :][::-1]


def _figure(score: ImageScore, test_set: _TestSet, threshold: float) -> str:
    path = str(score.record["file_name"])
    caption = f"{os.path.basename(path)}: {score.found} of {score.objects} found, {score.wrong} wrong"
    try:
        image = Image.fromarray(read_image(path, "RGB"))
    except ValueError as error:
        return f'<p class="failed">{_text(error)}</p>'
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
    alternative = _text(f"Predictions and ground truth of {caption}")
    return (
        f'<figure><img alt="{alternative}" src="data:image/jpeg;base64,{data}">'
        f"<figcaption>{_text(caption)}</figcaption></figure>"
    )


def _boxes(boxes: Sequence[Sequence[float]], factor: float) -> Boxes:
    array = tensor(boxes, dtype=tensor(0.0).dtype).reshape(-1, 4) * factor
    array[:, 2:] += array[:, :2]
    return Boxes(array)


def _settings(cfg: CfgNode) -> str:
    """What differs from the defaults of Detectron2 and detr_family."""
    here, default = _flat(cfg), _flat(load_config("", ["MODEL.DEVICE", cfg.MODEL.DEVICE]))
    rows = [(key, value, default.get(key, "–")) for key, value in here.items() if value != default.get(key)]
    return "<p>What differs from the defaults; all of it: config.yaml.</p>" + _table(
        ("key", "here", "default"), rows, code=True
    )


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
