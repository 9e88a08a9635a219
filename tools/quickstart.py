"""Trains a small detector on generated shapes in minutes and draws what it finds."""

import argparse
import sys
from pathlib import Path

from detr_family.commands.quickstart import quickstart


def main() -> None:
    """Parses the command line, runs the quickstart and names what it left."""
    root = Path(__file__).resolve().parent.parent
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--output", type=Path, default=Path("output/quickstart"), help="folder for everything"
    )
    parser.add_argument("--config-file", type=Path, default=root / "configs" / "dino_quickstart.yaml")
    parser.add_argument("--device", help="cpu, cuda ...; by default a GPU where there is one")
    args = parser.parse_args()
    try:
        ap, ap50 = quickstart(root / "train_net.py", args.config_file, args.output, args.device)
    except KeyboardInterrupt:
        sys.exit("quickstart: interrupted; run it again to start anew")
    except (OSError, ValueError) as error:
        sys.exit(f"quickstart: {error}")
    print(f"AP {ap:.1f}, AP50 {ap50:.1f} on the validation images")
    print(f"Predictions beside ground truth (images/), report.html, log and weights: {args.output.resolve()}")


if __name__ == "__main__":
    main()
