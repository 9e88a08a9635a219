"""`python -m detr_family.model_zoo`: see `detr_family.model_zoo.listing`."""

import sys

from detr_family.model_zoo.listing import main

if __name__ == "__main__":
    sys.exit(main())
