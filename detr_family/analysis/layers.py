"""AP and AP50 after each decoder layer, with and without NMS (DETR, figure 4).

Every image of DATASETS.TEST[0] is predicted once; the set of each decoder layer is then evaluated as it is, and after
non-maximum suppression within each class.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import math
from pathlib import Path
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.evaluation import DatasetEvaluator
from detectron2.modeling.postprocessing import detector_postprocess
from matplotlib.figure import Figure
from torchvision.ops import batched_nms
from tqdm import tqdm

from detr_family.analysis import command_line, style
from detr_family.analysis.loading import dataset, load_cfg, load_detector, quiet, title_of
from detr_family.data.dataset_mapper import DETRDatasetMapper
from detr_family.evaluation.evaluator import build_evaluator
from detr_family.modeling.postprocessing import to_instances
from detr_family.modeling.set_detector import SetDetector

COLUMNS = ("layer", "nms", "AP", "AP50", "AP75", "APs", "APm", "APl")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """See the module."""
    parser.add_argument("--nms", type=float, default=0.5, metavar="IOU", help="threshold of the suppression (0.5)")
    parser.add_argument("--limit", type=int, default=0, help="only the first so many images are predicted")
    command_line.add_output(parser)
    command_line.add_model(parser)


def run(args: argparse.Namespace) -> list[Path]:
    """See the module."""
    cfg = load_cfg(args.config_file, args.opts)
    model = load_detector(cfg, args.untrained)
    rows = layer_ap(cfg, model, nms_iou=args.nms, limit=args.limit)
    columns = {"layer": "decoder layer", "nms": "NMS", "AP": "AP", "AP50": "AP50", "AP75": "AP75"}
    print(style.table(rows, columns))
    return [
        *style.save_figure(draw(rows, title_of(model)), args.output, "layers"),
        style.save_csv(rows, COLUMNS, args.output, "layers"),
    ]


@torch.no_grad()
def layer_ap(cfg: CfgNode, model: SetDetector, *, nms_iou: float, limit: int = 0) -> list[dict[str, Any]]:
    """Evaluate the sets of all decoder layers.

    Args:
        cfg: with DATASETS.TEST registered.
        model: in evaluation mode.
        nms_iou: boxes of one class that overlap a better one by more than this IoU are suppressed.
        limit: predict only the first so many images, all boxes of the others count as missed; 0 for all.

    Returns:
        Two rows for each layer, first without NMS: see COLUMNS; AP in percent, None where it has no meaning.

    Raises:
        ValueError: a threshold outside of [0, 1], or a dataset without annotations.
    """
    if not 0 <= nms_iou <= 1:
        raise ValueError(f"--nms {nms_iou} is no IoU: it must be in [0, 1]")
    records = dataset(cfg, limit)
    if not any(record.get("annotations") for record in records):
        raise ValueError(f"{cfg.DATASETS.TEST[0]!r} has no annotations to compare with")
    mapper = DETRDatasetMapper(cfg, is_train=False)
    evaluators: dict[tuple[int, bool], DatasetEvaluator] = {}
    for record in tqdm(records, desc="images", disable=None):
        inputs = mapper(record)
        images = model.preprocess_image([inputs])
        prediction = model.predict(images)
        for layer in range(len(prediction.layer_logits)):
            chosen = model.select(prediction.layer_logits[layer], prediction.layer_boxes[layer], model.topk)
            found = to_instances(*chosen, images.image_sizes)[0].to("cpu")
            found = detector_postprocess(found, inputs["height"], inputs["width"])
            kept = found[batched_nms(found.pred_boxes.tensor, found.scores, found.pred_classes, nms_iou)]
            for nms, instances in ((False, found), (True, kept)):
                if (layer, nms) not in evaluators:
                    evaluators[layer, nms] = _evaluator(cfg)
                evaluators[layer, nms].process([inputs], [{"instances": instances}])
    rows = []
    for (layer, nms), evaluator in sorted(evaluators.items()):
        with contextlib.redirect_stdout(io.StringIO()), quiet("detectron2", "detr_family"):
            results = (evaluator.evaluate() or {}).get("bbox") or {}
        # Without any detection Detectron2 says nothing; that is an AP of 0.
        numbers = {name: float(results.get(name, 0.0)) for name in COLUMNS[2:]}
        values = {name: x if math.isfinite(x) else None for name, x in numbers.items()}
        rows.append({"layer": layer + 1, "nms": "yes" if nms else "no", **values})
    return rows


def _evaluator(cfg: CfgNode) -> DatasetEvaluator:
    with contextlib.redirect_stdout(io.StringIO()), quiet("detectron2", "detr_family"):
        evaluator = build_evaluator(cfg, cfg.DATASETS.TEST[0])
        evaluator.reset()
    if hasattr(evaluator, "_output_dir"):
        evaluator._output_dir = None  # these are not the run's results: its own stay as they are
    return evaluator


def draw(rows: list[dict[str, Any]], name: str) -> Figure:
    """AP and AP50 against the decoder layer, without NMS in full lines and with it in dashed ones."""
    figure = style.new_figure(5.2, 3.6)
    axes = style.tidy(figure.subplots())
    for number, metric in enumerate(("AP50", "AP")):
        for nms in ("no", "yes"):
            chosen = [row for row in rows if row["nms"] == nms]
            axes.plot(
                [row["layer"] for row in chosen],
                [float("nan") if row[metric] is None else row[metric] for row in chosen],
                color=style.COLOURS[number],
                linestyle="--" if nms == "yes" else "-",
                marker=style.MARKERS[number],
                markerfacecolor="white" if nms == "yes" else None,
                label=f"{metric}, NMS" if nms == "yes" else f"{metric}, no NMS",
            )
    axes.set_xticks([row["layer"] for row in rows if row["nms"] == "no"])
    axes.set_xlabel("decoder layer")
    axes.set_ylabel("AP on the test set (%)")
    axes.set_ylim(bottom=0)
    axes.set_title(f"{name}: what each decoder layer predicts")
    axes.legend(frameon=False)
    return figure
