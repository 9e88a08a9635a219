#!/usr/bin/env python
"""Train or evaluate any of the detectors.

python train_net.py --config-file configs/finetune_dino_r50.yaml --data cells
python train_net.py --config-file configs/detr_r50.yaml --num-gpus 8
torchrun --nproc-per-node 8 train_net.py --config-file configs/detr_r50.yaml
python train_net.py --config-file configs/detr_r50.yaml --eval-only MODEL.WEIGHTS detr-r50-e632da11.pth
"""

from detr_family.commands.train import main
from detr_family.engine.processes import argument_parser, launch

if __name__ == "__main__":
    launch(main, argument_parser(epilog=__doc__).parse_args())
