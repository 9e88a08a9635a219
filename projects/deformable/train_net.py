#!/usr/bin/env python
"""Train or evaluate this project's detectors, as the main train_net.py does the five.

python projects/deformable/train_net.py --config-file projects/deformable/configs/deformable_detr_r50.yaml --num-gpus 8
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import projects.deformable  # noqa: F401  (registers meta-architectures and keys)
from detr_family.engine.processes import argument_parser, launch
from train_net import main

if __name__ == "__main__":
    launch(main, argument_parser(epilog=__doc__).parse_args())
