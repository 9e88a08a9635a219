"""Loading weights: published detectors as they are, ImageNet backbones, and one's own checkpoints.

Whose a file is, is told by the names in it (`detr_family.checkpoint.formats`).
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Sequence
from typing import Any
from urllib.parse import urlparse

import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.utils import comm
from torch import Tensor, nn

from detr_family.checkpoint import formats
from detr_family.checkpoint.downloads import ZOO, is_address
from detr_family.checkpoint.files import UNFINISHED, is_whole, load, replacing, unwritten
from detr_family.checkpoint.releases import SWIN_INDICES
from detr_family.checkpoint.rows import CLASS_ROWS, COCO_IDS, COCO_NAMES, match_rows
from detr_family.checkpoint.transformers import FILES

_logger = logging.getLogger(__name__)


class DETRCheckpointer(DetectionCheckpointer):
    """Detectron2's checkpointer that also loads published detectors and refuses what does not fit.

    Files are unpickled with `weights_only`; of other classes, releases may hold an `argparse.Namespace`.

    Args:
        model: the detector, wrapped for several processes or not.
        save_dir: where `save` writes.
        strict: a detector's checkpoint must fill the model exactly; with False what differs is only logged.
        whole: only a detector's checkpoint will do, as for evaluation; a backbone's or none is refused.
        averaged: load the averaged weights (SOLVER.EMA) of a checkpoint in place of the plain ones.
        class_rows: what becomes of a checkpoint with other classes: "exact" refuses it, "match" keeps the rows of
            classes with the same names, "new" none.
        class_names: names of the model's classes, kept in every checkpoint under `class_names`.
        save_to_disk: as in Detectron2.
        checkpointables: what else is saved and resumed.

    Attributes:
        resumed: whether the last `resume_or_load` resumed.
        saved: the `iteration` that the last `save` was given; -1 before it.
    """

    def __init__(
        self,
        model: nn.Module,
        save_dir: str = "",
        *,
        strict: bool = True,
        whole: bool = False,
        averaged: bool = False,
        class_rows: str = "exact",
        class_names: Sequence[str] | None = None,
        save_to_disk: bool | None = None,
        **checkpointables: Any,
    ) -> None:
        if class_rows not in ("exact", "match", "new"):
            raise ValueError(f"MODEL.DETR.CLASS_ROWS is {class_rows!r}; it may be 'exact', 'match' or 'new'")
        super().__init__(model, save_dir, save_to_disk=save_to_disk, **checkpointables)
        self.strict = strict
        self.whole = whole
        self.averaged = averaged
        self.class_rows = class_rows
        self.class_names = class_names
        self.resumed = False
        self.saved = -1

    def save(self, name: str, **kwargs: Any) -> None:
        """Save the model, the checkpointables and the class names to `save_dir/name.pth`.

        A file of that name is there whole or not at all, whenever the process or the machine stops.

        Raises:
            CheckpointError: the disk is full, the folder gone or read-only. What was saved before is as it was.
        """
        if not self.save_dir or not self.save_to_disk:
            return
        if self.class_names is not None:
            kwargs.setdefault("class_names", list(self.class_names))
        if "://" in self.save_dir:
            super().save(name, **kwargs)
            return
        data = {"model": self.model.state_dict()}
        data.update((key, x.state_dict()) for key, x in self.checkpointables.items())
        data.update(kwargs)
        path = os.path.join(self.save_dir, f"{name}.pth")
        _logger.info("Saving checkpoint to %s", path)
        try:
            with replacing(path) as file:
                torch.save(data, file)
            self.tag_last_checkpoint(f"{name}.pth")
        except (OSError, RuntimeError) as error:  # torch's own where the first one was the system's
            told = unwritten(path, error)
            if told is None:
                raise
            raise told from error
        self.saved = kwargs.get("iteration", self.saved)

    def tag_last_checkpoint(self, last_filename_basename: str) -> None:
        """Note the newest checkpoint's name in `save_dir/last_checkpoint`."""
        if "://" in self.save_dir:
            super().tag_last_checkpoint(last_filename_basename)
            return
        with replacing(os.path.join(self.save_dir, "last_checkpoint")) as file:
            file.write(last_filename_basename.encode())

    def resume_or_load(self, path: str, *, resume: bool = True) -> dict[str, Any]:
        """Go on from the newest whole checkpoint in `save_dir`, or load weights alone.

        A checkpoint that is damaged is passed over for the one before it, with a line in the log.

        Args:
            path: what to load where there is nothing to resume from, or `resume` is False.
            resume: load weights and checkpointables of a checkpoint in `save_dir`, if one was ever written there.

        Raises:
            ValueError: all checkpoints there are damaged, or not all processes can read the same one; else as `load`.
        """
        self.resumed = False
        if not resume:
            return self.load(path, checkpointables=[])
        found, error = self._newest_whole() if comm.is_main_process() else ("", "")
        found, error = comm.all_gather((found, error))[0]  # the main process decides for all
        if error:
            raise ValueError(error)
        if not found:
            return self.load(path, checkpointables=[])
        readers = comm.all_gather(os.path.isfile(found) or "://" in found)
        if not all(readers):
            raise ValueError(
                f"{found} cannot be read by processes {[i for i, can in enumerate(readers) if not can]}: to resume, "
                "OUTPUT_DIR must be a folder that all machines share"
            )
        class_rows, self.class_rows = self.class_rows, "exact"  # these are this run's own
        try:
            extra = self.load(found)
        finally:
            self.class_rows = class_rows
        self.resumed = True
        return extra

    def _newest_whole(self) -> tuple[str, str]:
        """The path of the checkpoint to resume from, "" if there is none, and what is wrong."""
        if not self.has_checkpoint():
            return "", ""
        last = self.get_checkpoint_file()
        if "://" in self.save_dir:
            return last, ""
        names = os.listdir(self.save_dir)
        for name in names:
            if name.endswith(UNFINISHED):
                os.remove(os.path.join(self.save_dir, name))
        written = [os.path.join(self.save_dir, n) for n in names if re.fullmatch(r"model_(\d+|final)\.pth", n)]
        written.sort(key=lambda x: (os.path.getmtime(x), x), reverse=True)
        for path in [last, *(x for x in written if x != last)]:
            if is_whole(path):
                return path, ""
            _logger.warning("%s is missing or damaged: the checkpoint before it is tried", path)
        return "", (f"no checkpoint in {self.save_dir} is whole: leave out --resume to start anew")

    def load(self, path: str | os.PathLike[str], *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Load a checkpoint; what was stored beside weights and checkpointables is returned.

        Args:
            path: a file; a folder that transformers' `save_pretrained` wrote; an address (https://, hf://,
                torchvision://: see `detr_family.checkpoint.downloads`; or of Detectron2's, detectron2://); or a name of
                `detr_family.model_zoo`. Empty loads nothing.
            args: passed on to Detectron2.
            kwargs: passed on to Detectron2.

        Raises:
            FileNotFoundError: there is no such file, or it cannot be fetched.
            ValueError: the file is no checkpoint, or not one of this detector, or has other classes.
        """
        path = os.path.expanduser(os.fspath(path).removeprefix("file://"))
        if path and not is_address(path) and not os.path.splitext(path)[1] and not os.path.exists(path):
            path = f"{ZOO}{path}"
        self._path = path
        if os.path.isdir(path):
            path = next((x for x in (os.path.join(path, name) for name in FILES) if os.path.isfile(x)), path)
        try:
            if path:
                self._require_file(path)
            elif self.whole:
                raise ValueError("MODEL.WEIGHTS is empty: name a detector's checkpoint there")
            return super().load(path, *args, **kwargs)
        finally:
            # Detectron2 forgets to, when loading fails.
            self._parsed_url_during_load = None

    def _require_file(self, path: str) -> None:
        try:
            local = self.path_manager.get_local_path(urlparse(path)._replace(query="").geturl())
        except FileNotFoundError:
            raise
        except OSError as error:
            raise FileNotFoundError(
                f"{path} cannot be fetched ({error}): put the file on this machine and name it in MODEL.WEIGHTS"
            ) from error
        if os.path.isdir(local):
            known = (".pth", ".pt", ".pkl", ".safetensors", ".bin")
            inside = [name for name in sorted(os.listdir(local)) if name.endswith(known)]
            such = f"the file in it, {' or '.join(inside[-3:])}" if inside else "the file; none in it is a checkpoint"
            raise FileNotFoundError(f"{path!r} is a folder: name in MODEL.WEIGHTS {such}")
        if not os.path.isfile(local):
            raise FileNotFoundError(f"there is no checkpoint {path!r}: correct MODEL.WEIGHTS")

    def _load_file(self, filename: str) -> dict[str, Any]:
        try:
            loaded = load(filename)
        except ValueError as error:
            raise ValueError(f"{self._path} is not a checkpoint that can be loaded safely: {error}") from error
        model = loaded.get("model")
        if not isinstance(model, dict) or not model or not all(isinstance(name, str) for name in model):
            raise ValueError(f"{self._path} holds no weights: a dict of tensors, or one under 'model', is needed")
        if "matching_heuristics=True" in self._path.partition("?")[2]:  # as Detectron2's addresses may end
            loaded["matching_heuristics"] = True
        loaded.setdefault("config", formats.read_config(os.path.dirname(filename)))
        return loaded

    def _unwrapped(self, weights: dict[str, Any]) -> dict[str, Any]:
        """Weights without the names that DDP, torch.compile and trainers of other packages put before a model's own."""
        weights = {re.sub(r"^(module\.|_orig_mod\.)+", "", name): value for name, value in weights.items()}
        prefix = next(iter(weights)).partition(".")[0] + "."
        own = self.model.state_dict()
        if all(name.startswith(prefix) and name.removeprefix(prefix) in own for name in weights):
            return {name.removeprefix(prefix): value for name, value in weights.items()}
        return weights

    def _load_model(self, checkpoint: dict[str, Any]) -> Any:
        if self.averaged:
            averaged = checkpoint.get("ema")
            averaged = averaged.get("model") if isinstance(averaged, dict) else checkpoint.get("ema_state")  # detrex's
            if not isinstance(averaged, dict):
                raise ValueError(
                    f"{self._path} has no averaged weights, as it was trained without SOLVER.EMA.ENABLED: "
                    "set TEST.EMA False"
                )
            checkpoint["model"] = averaged
        found = checkpoint["model"] = self._unwrapped(checkpoint["model"])
        origin = formats.recognise(found)
        backbone_only = bool(checkpoint.get("matching_heuristics")) or (origin is not None and origin.backbone_only)
        no_tensors = [name for name, value in found.items() if not hasattr(value, "shape")]
        if no_tensors and not backbone_only:
            raise ValueError(f"{self._path} is no checkpoint, or damaged: {no_tensors[0]} in it is no tensor")
        state, belongs = found, ""
        if origin is not None:
            checkpoint["class_names"] = formats.class_names(checkpoint)
            by_name = self.class_rows == "match" and checkpoint["class_names"] == COCO_NAMES
            classes = getattr(self.model, "num_classes", -1)
            one_more = {k for k, v in self.model.state_dict().items() if v.dim() and len(v) == classes + 1}
            try:
                state = origin.convert(found, len(COCO_IDS) if by_name else classes, one_more)
            except ValueError as error:
                raise ValueError(f"{self._path} cannot be loaded: {error}") from error
            if not backbone_only:
                belongs = formats.belongs_to(origin, found, state, checkpoint["config"])
        state = {k: v for k, v in state.items() if not SWIN_INDICES.search(k)}  # Detectron2 keeps them
        if not backbone_only and (wrong := formats.share(state, self.model)):
            self._refuse(f"{self._path} does not fit {type(self.model).__name__} as configured: {wrong}", belongs)
        if origin is not None and origin.name == "Swin's authors":
            self._check_swin(state)
        if self.class_rows == "match" and not backbone_only:
            self._match_rows(state, self._names_in(checkpoint))
        elif self.class_rows == "new" and not backbone_only:
            fresh = {k: v for k, v in self.model.state_dict().items() if k in state and CLASS_ROWS.search(k)}
            state.update(fresh)
            _logger.info("Rows of all classes start as in a new model: %s", ", ".join(fresh))
        checkpoint["model"] = state
        if not backbone_only:
            self._check(checkpoint, belongs)
            if origin is not None and (wrong := formats.unfit(origin, found, state, checkpoint["config"], self.model)):
                self._refuse(f"{self._path} is {origin.name}'s and would be wrong in this model: {wrong}", belongs)
        elif self.whole:
            raise ValueError(
                f"{self._path} holds a backbone without a detector: name a detector's checkpoint in MODEL.WEIGHTS"
            )
        allowed = getattr(self.model, "allow_partial_weights", False)
        self.model.allow_partial_weights = allowed or not self.strict  # what differs has been said above
        try:
            incompatible = super()._load_model(checkpoint)
        finally:
            self.model.allow_partial_weights = allowed
        if {name for name, _ in self.model.named_parameters()} <= set(incompatible.missing_keys):
            raise ValueError(f"no weight in {self._path} belongs to this model: correct MODEL.WEIGHTS")
        return incompatible

    def _match_rows(self, state: dict[str, Tensor], theirs: Sequence[str] | None) -> None:
        """Arrange the rows of classes in `state`, in place, as this model has them, by the classes' names."""
        ours = self.class_names
        if not theirs or not ours:
            nameless = "DATASETS.TRAIN" if theirs else self._path
            raise ValueError(
                f"MODEL.DETR.CLASS_ROWS is 'match', but {nameless} does not name its classes: 'new' keeps no rows"
            )
        if list(theirs) != list(ours):
            match_rows(state, theirs, ours, self.model.state_dict(), self._path)

    def _refuse(self, message: str, belongs: str) -> None:
        """An error, or a warning where that was asked for, that names the config file to use if there is one."""
        if belongs:
            message += f". The weights look like those of {belongs}: use that config file"
        if self.strict:
            raise ValueError(message)
        _logger.warning(message)

    def _check_swin(self, state: dict[str, Tensor]) -> None:
        """Refuse an ImageNet Swin of another size or window: Detectron2 would leave out what does not fit."""
        model = self.model.state_dict()
        backbone = {k for k in model if k.startswith("backbone.") and not re.match(r"backbone\.norm\d\.", k)}
        wrong = [
            f"{k} {tuple(v.shape)} here {tuple(model[k].shape)}"
            for k, v in state.items()
            if k in model and v.shape != model[k].shape
        ]
        missing, unexpected = sorted(backbone - state.keys()), sorted(state.keys() - backbone)
        if wrong or missing or unexpected:
            parts = [
                _listing("missing", missing),
                _listing("unexpected", unexpected),
                _listing("of another shape", wrong),
            ]
            raise ValueError(
                f"{self._path} is a Swin that does not fit the backbone as configured: "
                + "; ".join(filter(None, parts))
                + ". Set MODEL.BACKBONE.NAME to build_swin_backbone, and MODEL.SWIN.SIZE and WINDOW_SIZE to the file's"
            )

    def _names_in(self, checkpoint: dict[str, Any]) -> list[str] | None:
        names = checkpoint.get("class_names")
        if not names:
            return None
        if not (isinstance(names, (list, tuple)) and all(isinstance(name, str) for name in names)):
            raise ValueError(
                f"{self._path} has class_names {str(names)[:100]!r} of type {type(names).__name__}; a list of texts is "
                "needed. The file is damaged, or made otherwise: take another, or take that entry out"
            )
        return list(names)

    def _check(self, checkpoint: dict[str, Any], belongs: str) -> None:
        """Compare names and shapes before anything is loaded."""
        state, model = checkpoint["model"], self.model.state_dict()
        shapes = {
            name: (tuple(state[name].shape), tuple(model[name].shape))
            for name in state
            if name in model and tuple(state[name].shape) != tuple(model[name].shape)
        }
        missing = [name for name in model if name not in state]
        unexpected = [name for name in state if name not in model]
        if not (shapes or missing or unexpected):
            theirs = self._names_in(checkpoint)
            if theirs and self.class_names and self.class_rows == "exact" and list(theirs) != list(self.class_names):
                _logger.warning(
                    "%s has classes %s, this dataset has as many of other names: their rows are kept in order. "
                    "MODEL.DETR.CLASS_ROWS match goes by the names",
                    self._path, ", ".join(theirs),
                )  # fmt: skip
            return
        log = logging.getLogger(__name__)
        log.warning(
            "%s against the model: %s; %s; %s",
            self._path,
            _listing("missing", missing, most=len(missing)) or "nothing missing",
            _listing("unexpected", unexpected, most=len(unexpected)) or "nothing unexpected",
            _listing("of another shape", [f"{k} {a} here {b}" for k, (a, b) in shapes.items()], most=len(shapes))
            or "all shapes equal",
        )
        classes = [name for name in shapes if CLASS_ROWS.search(name)]
        if classes and len(classes) == len(shapes) and not missing and not unexpected:
            there, here = (shape[0] for shape in shapes[classes[0]])
            names = self._names_in(checkpoint)
            message = (
                f"{self._path} was trained with another number of classes: {classes[0]} has {there} rows there "
                f"and {here} here"
                + (f", its classes are {', '.join(names)}" if names else "")
                + f". Set MODEL.DETR.NUM_CLASSES (now {getattr(self.model, 'num_classes', '?')}) or DATASETS.TRAIN "
                "to what the checkpoint was trained with, or to fine-tune it to other classes set "
                "MODEL.DETR.CLASS_ROWS match or new"
            )
        else:
            parts = [
                _listing("missing", missing),
                _listing("unexpected", unexpected),
                _listing("of another shape", [f"{k} {a} here {b}" for k, (a, b) in shapes.items()]),
            ]
            message = (
                f"{self._path} does not fit {type(self.model).__name__} as configured: "
                + "; ".join(filter(None, parts))
                + ("" if belongs else ". Use the config file that the checkpoint was trained with")
            )
            self._refuse(message, belongs)
            return
        self._refuse(message, "")


class _Reader(DETRCheckpointer):
    """Reads a checkpoint as DETRCheckpointer does, and keeps it in place of loading it."""

    checkpoint: dict[str, Any]

    def _load_model(self, checkpoint: dict[str, Any]) -> Any:
        self.checkpoint = dict(checkpoint)


def read_class_names(path: str) -> list[str] | None:
    """Names of the classes that a checkpoint was trained with, by class number, without a model to load it into.

    Args:
        path: as for `DETRCheckpointer.load`.

    Returns:
        The names; COCO's 80 for a published COCO detector; None where the file does not say.

    Raises:
        FileNotFoundError: there is no such file, or it cannot be fetched.
        ValueError: the file is no checkpoint, or not safe to load.
    """
    reader = _Reader(nn.Module())
    reader.load(path)
    return formats.class_names(reader.checkpoint)


def _listing(what: str, names: Sequence[str], most: int = 5) -> str:
    if not names:
        return ""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return f"{len(names)} {what} ({', '.join(names[:most])}{more})"
