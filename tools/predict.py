#!/usr/bin/env python
"""Finds objects in any number of images, over processes and machines.

python tools/predict.py --config-file output/cells/config.yaml --weights output/cells/model_final.pth --input images/
torchrun --nproc-per-node 8 tools/predict.py --config-file dino_r50_4scale --weights dino_r50_4scale --input list.txt
"""

import sys

from detr_family.commands.predict import command

if __name__ == "__main__":
    sys.exit(command())
