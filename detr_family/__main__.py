"""`python -m detr_family COMMAND ...`: see `detr_family.commands.main`."""

import sys

from detr_family.commands.main import main

if __name__ == "__main__":
    sys.exit(main())
