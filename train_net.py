#!/usr/bin/env python
"""Train or evaluate any of the detectors.

python train_net.py --config-file configs/detr_r50.yaml --num-gpus 8
python train_net.py --config-file configs/detr_r50.yaml --eval-only MODEL.WEIGHTS detr-r50-e632da11.pth
"""

from __future__ import annotations

import argparse
from typing import Any

from detectron2.config import CfgNode
from detectron2.engine import default_argument_parser, default_setup, launch
from detectron2.utils import comm
from detectron2.utils.logger import setup_logger

from detr_family.checkpoint import DETRCheckpointer
from detr_family.config import check_class_count, load_config
from detr_family.datasets.coco import register_datasets
from detr_family.engine import Trainer
from detr_family.engine.processes import leave_process_group


def setup(args: argparse.Namespace) -> CfgNode:
    """The configuration of config file and command line, with its data sets registered."""
    cfg = load_config(args.config_file, args.opts)
    register_datasets(cfg)
    cfg.freeze()
    default_setup(cfg, args)
    setup_logger(cfg.OUTPUT_DIR, distributed_rank=comm.get_rank(), name="detr_family")
    return cfg


def main(args: argparse.Namespace) -> Any:
    """What every process runs."""
    result = run(setup(args), args)
    leave_process_group()
    return result


def run(cfg: CfgNode, args: argparse.Namespace) -> Any:
    """Evaluate or train; returns the last evaluation's results."""
    if args.eval_only:
        check_class_count(cfg)
        model = Trainer.build_model(cfg)
        checkpointer = DETRCheckpointer(model, cfg.OUTPUT_DIR, whole=True)
        checkpointer.resume_or_load(cfg.MODEL.WEIGHTS, resume=args.resume)
        return Trainer.test(cfg, model)
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=args.resume)
    return trainer.train()


if __name__ == "__main__":
    args = default_argument_parser(epilog=__doc__).parse_args()
    launch(
        main,
        args.num_gpus,
        num_machines=args.num_machines,
        machine_rank=args.machine_rank,
        dist_url=args.dist_url,
        args=(args,),
    )
