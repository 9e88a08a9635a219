"""Writes docs/config.md, the page on every key, from the comments in detr_family/config/defaults.py."""

import argparse
import sys
from pathlib import Path

from detr_family.config.reference import page


def main() -> None:
    """Parses the command line and writes the page, or says whether it is up to date."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; fail if the page is not up to date")
    path = Path(__file__).resolve().parents[1] / "docs" / "config.md"
    text = page()
    if not parser.parse_args().check:
        path.write_text(text, encoding="utf-8")
    elif not path.is_file() or path.read_text(encoding="utf-8") != text:
        sys.exit(f"{path} is not up to date: run python tools/config_reference.py")


if __name__ == "__main__":
    main()
