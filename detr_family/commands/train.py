"""Training and evaluation as a command: what train_net.py and `detr-family train` run in every process."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence
from typing import Any

from detectron2.config import CfgNode
from detectron2.engine import default_setup
from detectron2.evaluation import verify_results
from detectron2.utils import comm
from detectron2.utils.logger import setup_logger
from torch import nn

from detr_family.checkpoint import DETRCheckpointer
from detr_family.config import check_class_count, departures, find_config, load_config
from detr_family.config.ignored import warn_of_ignored
from detr_family.data.datasets.coco import check_test_sets, register_datasets
from detr_family.engine import Trainer
from detr_family.engine.occupation import occupy
from detr_family.engine.processes import argument_parser, launch
from detr_family.engine.randomness import run_seed
from detr_family.errors import check_output, mistakes
from detr_family.inference.exported import ExportedDetector, is_exported

_EXAMPLES = """Examples: detr-family train --config-file dn_detr_r50 --num-gpus 8
          detr-family train --config-file detr_r50 --eval-only MODEL.WEIGHTS detr_r50"""


def setup(args: argparse.Namespace) -> CfgNode:
    """The configuration of config file and command line, with its datasets registered."""
    if args.config_file:
        args.config_file = find_config(args.config_file)  # Detectron2 writes the file into the log
    cfg = load_config(args.config_file, args.opts)
    cfg.DATASETS.FOLDER = args.data or cfg.DATASETS.FOLDER
    if "://" not in cfg.OUTPUT_DIR:
        check_output(cfg.OUTPUT_DIR, "OUTPUT_DIR", folder=True)
    if not args.eval_only:
        occupy(cfg.OUTPUT_DIR)  # before anything is written there
    setup_logger(cfg.OUTPUT_DIR, distributed_rank=comm.get_rank(), name="detr_family")
    register_datasets(cfg)
    cfg.SEED = run_seed(cfg.SEED)
    if args.eval_only:
        cfg.MODEL.TIMM.PRETRAINED = False  # a whole detector's weights follow
    cfg.freeze()
    default_setup(cfg, args)
    departed = [] if args.eval_only else departures(cfg, args.config_file, comm.get_world_size())
    if departed:
        logging.getLogger("detr_family").warning("Not the recipe of %s: %s", args.config_file, "; ".join(departed))
    return cfg


def model_to_evaluate(cfg: CfgNode, resume: bool) -> nn.Module:
    """The detector with its weights; the exported one where MODEL.WEIGHTS is a file of tools/export_model.py."""
    if is_exported(cfg.MODEL.WEIGHTS):
        return ExportedDetector(cfg.MODEL.WEIGHTS, input_format=cfg.INPUT.FORMAT, stretch=True)
    model = Trainer.build_model(cfg)
    checkpointer = DETRCheckpointer(model, cfg.OUTPUT_DIR, whole=True, averaged=cfg.TEST.EMA)
    checkpointer.resume_or_load(cfg.MODEL.WEIGHTS, resume=resume)
    return model


def main(args: argparse.Namespace) -> Any:
    """What every process runs: evaluate or train; returns the last evaluation's results."""
    with mistakes():
        cfg = setup(args)
        if args.eval_only:
            warn_of_ignored(cfg)
            check_test_sets(cfg)
            if not cfg.DATASETS.TEST:
                raise ValueError("DATASETS.TEST is empty: there is nothing to evaluate on")
            check_class_count(cfg)
            model = model_to_evaluate(cfg, args.resume)
        else:
            trainer = Trainer(cfg)
            trainer.resume_or_load(resume=args.resume)
    if not args.eval_only:
        return trainer.train()
    results = Trainer.test(cfg, model)
    Trainer.test_final(cfg, model)
    if comm.is_main_process():
        verify_results(cfg, results)  # with TEST.EXPECTED_RESULTS, as a training does at its end
    return results


def command(arguments: Sequence[str] | None = None) -> None:
    """Parse the command line and run; a user's mistake ends the process with its message."""
    launch(main, argument_parser(epilog=_EXAMPLES).parse_args(arguments))


if __name__ == "__main__":
    command()
