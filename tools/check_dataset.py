#!/usr/bin/env python
"""Checks datasets, and draws them as training will see them.

python tools/check_dataset.py --data cells --sheet sheet.png
python tools/check_dataset.py --train train.json images --val val.json images --sheet sheet.png
python tools/check_dataset.py --config-file configs/my_cells.yaml
"""

import sys

from detr_family.commands.data_check import command

if __name__ == "__main__":
    sys.exit(command())
