#!/usr/bin/env python
"""Writes a detector as a file that other programs run: ONNX, torch.export, OpenVINO, TorchScript, AOTInductor.

python tools/export_model.py --config-file output/cells/config.yaml --weights output/cells/model_final.pth --format onnx
"""

import sys

from detr_family.commands.export_model import command

if __name__ == "__main__":
    sys.exit(command())
