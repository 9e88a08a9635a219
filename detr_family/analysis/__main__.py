"""`python -m detr_family.analysis COMMAND ...`: see `detr_family.analysis.command_line`."""

from detr_family.analysis.command_line import main

if __name__ == "__main__":
    main()
