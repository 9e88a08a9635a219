"""The demo as a command: images, folders, globs, lists and videos in; drawn boxes and COCO-format JSON out."""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.structures import Instances
from detectron2.utils import comm
from tqdm import tqdm

from detr_family.checkpoint.releases import COCO_IDS
from detr_family.config import load_config
from detr_family.config.options import OptionsParser
from detr_family.config.projects import add_import
from detr_family.data.datasets.coco import register_datasets
from detr_family.engine.processes import launch, meeting, under_torchrun
from detr_family.errors import UserError, check_output
from detr_family.inference.exported import is_exported
from detr_family.inference.predictor import ImageSource, Predictor
from detr_family.inference.work import find_work
from detr_family.visualization.draw import draw_detections

_NAMED_EXAMPLES = 5
_MORE_NAMES = 100
NO_CV2 = (
    "a video needs OpenCV, which is not installed: pip install opencv-python-headless, or take it apart first: "
    "ffmpeg -i clip.mp4 frames/%06d.png"
)


@dataclass
class Results:
    """What a run has found, in COCO's formats.

    Attributes:
        class_names: by class number.
        category_ids: by class number, those of the JSON files.
        images: entries of "images": id, file_name, width, height. A frame of a video is named clip.mp4#000012.
        detections: entries of results.json: image_id, category_id, bbox (x, y, width, height in pixels), score.
        failed: what could not be read, and why.
        best: the highest score of all, drawn or not.
    """

    class_names: list[str]
    category_ids: list[int]
    images: list[dict[str, Any]] = field(default_factory=list)
    detections: list[dict[str, Any]] = field(default_factory=list)
    failed: list[tuple[str, str]] = field(default_factory=list)
    best: float = 0.0

    def add(self, name: str, instances: Instances, threshold: float) -> None:
        """Takes over the instances that score enough."""
        height, width = instances.image_size
        image_id = len(self.images) + 1
        self.images.append({"id": image_id, "file_name": name, "width": width, "height": height})
        boxes = instances.pred_boxes.tensor.clone()
        boxes[:, 2:] -= boxes[:, :2]
        for box, score, number in zip(
            boxes.tolist(), instances.scores.tolist(), instances.pred_classes.tolist(), strict=True
        ):
            self.best = max(self.best, score)
            if score >= threshold:
                entry = {"image_id": image_id, "category_id": self.category_ids[number], "bbox": box, "score": score}
                self.detections.append(entry)

    @classmethod
    def together(cls, several: Sequence[Results], order: Sequence[Path]) -> Results:
        """Those of several processes as those of one.

        Args:
            several: one or more, none of which knows an image that another knows.
            order: the inputs that the images and frames are from.
        """
        first = several[0]
        if len(several) == 1:
            return first
        result = cls(first.class_names, first.category_ids, best=max(results.best for results in several))
        places = {str(path): i for i, path in enumerate(order)}
        found: list[tuple[int, int, dict[str, Any], list[dict[str, Any]]]] = []
        for results in several:
            result.failed += results.failed
            own: dict[int, list[dict[str, Any]]] = {image["id"]: [] for image in results.images}
            for detection in results.detections:
                own[detection["image_id"]].append(detection)
            for image in results.images:
                name = image["file_name"]
                place = places[name if name in places else name.rpartition("#")[0]]
                found.append((place, len(found), image, own[image["id"]]))
        for _, _, image, detections in sorted(found):  # no two are alike in both numbers
            image_id = len(result.images) + 1
            result.images.append({**image, "id": image_id})
            result.detections += [{**detection, "image_id": image_id} for detection in detections]
        return result

    def write(self, folder: Path) -> None:
        """Writes results.json, as pycocotools' loadRes takes it, and images.json, what its ids stand for."""
        categories = [
            {"id": identifier, "name": name}
            for identifier, name in zip(self.category_ids, self.class_names, strict=True)
        ]
        known = {"info": {}, "images": self.images, "categories": categories}
        for name, content in (("results.json", self.detections), ("images.json", known)):
            (folder / name).write_text(json.dumps(content), encoding="utf-8")


def category_ids(cfg: CfgNode, class_names: Sequence[str]) -> list[int]:
    """The category id of each class: those of the dataset with these names, COCO's, or else 1, 2, 3 ...

    Args:
        cfg: the datasets of the training are looked for in it; they need not be here.
        class_names: by class number.
    """
    for name in (*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST):
        try:
            metadata = MetadataCatalog.get(name)
            names = metadata.get("thing_classes")
            ids = metadata.get("thing_dataset_id_to_contiguous_id")
        except ValueError:  # its file is not here
            continue
        if names is not None and ids and list(names) == list(class_names):
            return [identifier for identifier, _ in sorted(ids.items(), key=lambda pair: pair[1])]
    if list(class_names) == list(MetadataCatalog.get("coco_2017_val").get("thing_classes", [])):
        return list(COCO_IDS)
    return list(range(1, len(class_names) + 1))


def run_images(
    predictor: Predictor, images: Mapping[Path, Path], results: Results, threshold: float, progress: bool
) -> None:
    """Predicts images in batches, draws each to the file that stands with it, and adds it to the results."""

    def failed(source: ImageSource, error: ValueError) -> None:
        reason = str(error)
        results.failed.append((str(source), reason if str(source) in reason else f"{source}: {reason}"))
        bar.update()

    with tqdm(total=len(images), desc="images", disable=not progress or None, mininterval=0.5) as bar:
        for prediction in predictor.stream(list(images), on_error=failed):
            source = Path(str(prediction.source))
            results.add(str(source), prediction.instances, threshold)
            drawn = draw_detections(prediction.image, prediction.instances, results.class_names, threshold)
            drawn.save(images[source], quality=95)
            bar.update()


def _free_name(source: Path, taken: set[str]) -> str:
    """A file name for a drawn image: JPEG for JPEG, else PNG; numbered where two sources share one."""
    suffix = ".jpg" if source.suffix.lower() in (".jpg", ".jpeg") else ".png"
    name, number = source.stem + suffix, 1
    while name in taken:
        number += 1
        name = f"{source.stem}_{number}{suffix}"
    taken.add(name)
    return name


def run_video(
    predictor: Predictor, video: Path, output: Path, results: Results, threshold: float, progress: bool
) -> None:
    """Predicts a video's frames in batches and writes them, drawn, to a video of the same name (.mp4).

    Raises:
        ValueError: OpenCV cannot write videos.
        ImportError: OpenCV is not installed.
    """
    import cv2

    capture = cv2.VideoCapture(str(video))
    writer = None
    frames = 0
    target = output / (video.stem + ".mp4")

    def read() -> Iterator[np.ndarray]:
        while True:
            there, frame = capture.read()
            if not there:
                return
            yield frame

    try:
        total = max(int(capture.get(cv2.CAP_PROP_FRAME_COUNT)), 0) or None
        rate = capture.get(cv2.CAP_PROP_FPS) or 25.0
        for prediction in tqdm(
            predictor.stream(read()), video.name, total, disable=not progress or None, mininterval=0.5
        ):
            frames += 1
            results.add(f"{video}#{frames:06d}", prediction.instances, threshold)
            drawn = np.asarray(draw_detections(prediction.image, prediction.instances, results.class_names, threshold))
            if writer is None:
                size = drawn.shape[1], drawn.shape[0]
                writer = cv2.VideoWriter(str(target), cv2.VideoWriter.fourcc(*"mp4v"), rate, size)
                if not writer.isOpened():
                    raise ValueError(f"{target} cannot be written: this OpenCV has no encoder for mp4v")
            writer.write(np.ascontiguousarray(drawn[:, :, ::-1]))
    finally:
        capture.release()
        if writer is not None:
            writer.release()
    if not frames:
        results.failed.append((str(video), f"The video {video} cannot be read: OpenCV finds no frame in it."))
    elif total is not None and frames < 0.9 * total:
        results.failed.append((str(video), f"The video {video} is damaged: {frames} of {total} frames could be read."))


def add_detector(parser: argparse.ArgumentParser) -> None:
    """The options that say which detector looks at images, and how."""
    parser.add_argument(
        "--config-file", default="", metavar="FILE",
        help="the config.yaml of a training, or a name: dn_detr_r50; not needed with an exported file",
    )  # fmt: skip
    parser.add_argument(
        "--weights",
        metavar="FILE",
        help="the checkpoint: a file, an address (https://, hf://owner/model) or a name of the model zoo; or a file of "
        "tools/export_model.py; by default MODEL.WEIGHTS of the config",
    )
    parser.add_argument("--tile", type=int, default=0, metavar="PIXELS", help="look at larger images in tiles, too")
    parser.add_argument("--overlap", type=float, default=0.2, help="share of a tile that its neighbour has, too")


def parser() -> argparse.ArgumentParser:
    """The command line of demo.py; its names are those of Detectron2's demo."""
    result = OptionsParser(
        description="Finds objects in images and videos, draws them, and writes COCO-format JSON.",
        epilog="Exit status: 0, 1 where something could not be read (the rest was done), 2 where nothing was done.",
    )
    add_detector(result)
    result.add_argument(
        "--input", required=True, nargs="+", metavar="PATH",
        help="images, folders (those below only where one has none itself), globs, lists (.txt), COCO files, videos",
    )  # fmt: skip
    result.add_argument("--output", type=Path, default=Path("output/demo"), help="folder for what is written")
    result.add_argument(
        "--confidence-threshold", type=float, default=0.5, help="least score of what is drawn and written"
    )
    result.add_argument("--batch-size", type=int, default=1, help="images that go through the model together")
    add_import(result)
    result.add_argument("--opts", nargs=argparse.REMAINDER, default=[], help="KEY VALUE pairs of the configuration")
    return result


def command(arguments: Sequence[str] | None = None) -> int:
    """Parse the command line and do what it says, with torchrun's other processes if there are; the exit status."""
    args = parser().parse_args(arguments)
    if not under_torchrun():
        return run(args)
    args.num_gpus = args.num_machines = 1  # the launcher's names
    launch(main, args)
    return 0  # torchrun would report a crash where some images could not be read


def main(args: argparse.Namespace) -> None:
    """What each of torchrun's processes does: its share of the images and videos; the first tells and writes.

    Raises:
        UserError: what was asked for cannot be.
    """
    try:
        results = _run(args, progress=comm.is_main_process())
    except (OSError, ValueError) as error:
        raise UserError(str(error)) from error
    if comm.is_main_process():
        _tell(args, results)


def run(args: argparse.Namespace, progress: bool = True) -> int:
    """Does what the command line says; returns the exit status."""
    try:
        results = _run(args, progress)
    except (OSError, ValueError, UserError) as error:
        print(f"demo: {error}", file=sys.stderr)
        return 2
    _tell(args, results)
    return 1 if results.failed else 0


def _tell(args: argparse.Namespace, results: Results) -> None:
    print(
        f"{len(results.images)} images, {len(results.detections)} boxes that score {args.confidence_threshold:g} or "
        f"more; drawn images, results.json and images.json: {args.output}"
    )
    if results.images and not results.detections:
        print(f"The best score of all is {results.best:.3f}: lower --confidence-threshold to see more.")
    say_what_failed(results.failed)


def say_what_failed(failed: Sequence[tuple[str, str]]) -> None:
    """Tells of inputs that could not be read, the first of them with the reason.

    Args:
        failed: name and reason of each.
    """
    if not failed:
        return
    print(f"{len(failed)} could not be read:", file=sys.stderr)
    for _, reason in failed[:_NAMED_EXAMPLES]:
        print(f"  {reason}", file=sys.stderr)
    rest = [name for name, _ in failed[_NAMED_EXAMPLES:]]
    if rest:
        more = f" ... and {len(rest) - _MORE_NAMES} more" if len(rest) > _MORE_NAMES else ""
        print(f"  and {', '.join(rest[:_MORE_NAMES])}{more}", file=sys.stderr)


def _run(args: argparse.Namespace, progress: bool) -> Results:
    if not 0 <= args.confidence_threshold <= 1:
        raise ValueError(f"--confidence-threshold is {args.confidence_threshold}; scores lie between 0 and 1")
    check_output(args.output, "--output", folder=True)
    work = find_work(args.input, below=False)
    images = [Path(item.path) for item in work.images]
    videos = [Path(name) for name in work.videos]
    if videos and importlib.util.find_spec("cv2") is None:
        raise ValueError(f"{videos[0]}: {NO_CV2}")
    if work.others and comm.is_main_process():
        print(f"{work.others} files are no images or videos by their suffix and are left out", file=sys.stderr)
    if not args.config_file and not is_exported(args.weights):
        raise ValueError("--config-file is needed: one of configs/, or the config.yaml of a training")
    cfg = load_config(args.config_file, args.opts)
    register_datasets(cfg)
    predictor = Predictor.from_config(
        cfg, args.weights, batch_size=args.batch_size, tile=args.tile, overlap=args.overlap
    )
    count: Any = predictor.model.num_classes
    names = predictor.class_names or [f"class {i}" for i in range(count)]
    results = Results(names, category_ids(cfg, names))
    args.output.mkdir(parents=True, exist_ok=True)
    taken: set[str] = set()
    drawn = {image: args.output / _free_name(image, taken) for image in images}
    meet, part, parts = meeting(), comm.get_rank(), comm.get_world_size()
    own = {image: drawn[image] for image in images[part::parts]}
    run_images(predictor, own, results, args.confidence_threshold, progress)
    for video in videos[part::parts]:
        try:
            run_video(predictor, video, args.output, results, args.confidence_threshold, progress)
        except ValueError as error:  # what was found in the other inputs is still written
            results.failed.append((str(video), str(error)))
    meet()
    everything = Results.together(comm.gather(results) or [results], [*images, *videos])
    if part == 0:
        everything.write(args.output)
    return everything
