#!/usr/bin/env python
"""Writes report.html, the page on a run, anew from the files in its output folder: python tools/report.py FOLDER."""

import argparse
import sys

from detr_family.config.projects import add_import
from detr_family.visualization.report import write_report


def main() -> None:
    """Parses the command line and writes the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", help="the output folder of a training")
    add_import(parser)
    args = parser.parse_args()
    try:
        print(write_report(args.folder))
    except (OSError, ValueError) as error:
        sys.exit(f"report: {error}")


if __name__ == "__main__":
    main()
