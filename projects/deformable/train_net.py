#!/usr/bin/env python
"""Train or evaluate this project's detectors, as the main train_net.py does the five.

python projects/deformable/train_net.py --config-file projects/deformable/configs/deformable_detr_r50.yaml --num-gpus 8
"""

from __future__ import annotations

import sys
from pathlib import Path

from detectron2.engine import default_argument_parser, launch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import projects.deformable  # noqa: F401  (registers meta-architectures and keys)
from train_net import main

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
