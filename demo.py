#!/usr/bin/env python
"""Finds objects in images and videos with a trained detector.

python demo.py --config-file output/cells/config.yaml --weights output/cells/model_final.pth --input images/ clip.mp4
"""

import sys

from detr_family.commands.demo import command

if __name__ == "__main__":
    sys.exit(command())
