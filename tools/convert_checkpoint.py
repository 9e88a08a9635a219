#!/usr/bin/env python
"""Writes a checkpoint of any format that loads here in another one.

python tools/convert_checkpoint.py --config-file detr_r50 --weights detr-r50-e632da11.pth --output detr_r50.safetensors
python tools/convert_checkpoint.py --config-file output/config.yaml --output for_transformers
"""

import sys

from detr_family.commands.convert_checkpoint import command

if __name__ == "__main__":
    sys.exit(command())
