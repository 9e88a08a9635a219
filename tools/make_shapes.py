"""Writes the generated shapes dataset: python tools/make_shapes.py FOLDER."""

import argparse

from detr_family.data.datasets.shapes import write_shapes


def main() -> None:
    """Parses the command line and writes the dataset."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder")
    parser.add_argument("--train", type=int, default=1000, help="images to train on")
    parser.add_argument("--val", type=int, default=200, help="images to evaluate on")
    parser.add_argument(
        "--size", type=int, nargs=2, default=(96, 112), help="least and greatest side in pixels"
    )
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    try:
        entries = write_shapes(args.folder, args.train, args.val, tuple(args.size), args.seed)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    print(f'DATASETS.COCO_FORMAT "{[list(entry) for entry in entries]}"')


if __name__ == "__main__":
    main()
