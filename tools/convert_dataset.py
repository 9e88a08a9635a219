#!/usr/bin/env python
"""Writes COCO annotation files from a folder in the format of COCO, YOLO, Pascal VOC or CSV.

python tools/convert_dataset.py cells --output cells_coco
"""

import sys

from detr_family.commands.convert_dataset import command

if __name__ == "__main__":
    sys.exit(command())
