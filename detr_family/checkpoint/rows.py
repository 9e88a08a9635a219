"""Rows of classes: which tensors have one for each class, and how they are arranged there and here.

Here classes are contiguous. Published COCO detectors have either that, or one row per category id (0..90 with holes).
A two-stage Deformable DETR asks its proposals one question, whether there is an object, of a head that has a row for
each class: of the published ones the first answers; here one more, the last, does.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, MutableMapping, Sequence

import torch
from detectron2.data.datasets.builtin_meta import COCO_CATEGORIES
from torch import Tensor

_logger = logging.getLogger(__name__)

COCO_IDS = [c["id"] for c in COCO_CATEGORIES if c["isthing"]]  # of the contiguous classes 0..79
COCO_NAMES = [c["name"] for c in COCO_CATEGORIES if c["isthing"]]

# What stands in for a class in some tensor's first dimension.
CLASS_ROWS = re.compile(r"(^|\.)(class_embed|enc_out_class_embed|label_enc)\.")

NEVER = -20.0  # the logit of a row that is there for its place alone: a probability of 2e-9


def coco_rows(tensor: Tensor, num_classes: int, *, proposals: bool = False) -> Tensor:
    """Rows by COCO's category ids -> the rows of the classes here.

    Args:
        tensor: 91 rows, or 92 of which the last (no-object, the unknown label of denoising) is no category's. Any
            other number is left as it is.
        num_classes: of the model here. 80: the rows of COCO's 80 categories are picked; else all are kept.
        proposals: it is a two-stage detector's head for proposals, whose first row, no category's, comes last.
    """
    if len(tensor) not in (91, 92):
        return tensor
    rows = COCO_IDS if num_classes == len(COCO_IDS) else list(range(91))
    rows = rows + list(range(91, len(tensor)))
    return tensor[[*rows, 0] if proposals else rows]


def proposal_rows(tensor: Tensor) -> Tensor:
    """K rows of a head for proposals, of which the first says "object" -> K + 1 rows, of which the last does.

    The others keep their places; what stands in the first one's place never fires.
    """
    silent = torch.zeros_like(tensor[:1]) if tensor.dim() > 1 else torch.full_like(tensor[:1], NEVER)
    return torch.cat([silent, tensor[1:], tensor[:1]])


def match_rows(
    state: MutableMapping[str, Tensor],
    theirs: Sequence[str],
    ours: Sequence[str],
    model: Mapping[str, Tensor],
    path: str,
) -> None:
    """Arrange the rows of classes in `state`, in place, as a model has them, by the classes' names.

    Args:
        state: a checkpoint's, under the names here.
        theirs: the checkpoint's classes.
        ours: the model's.
        model: its state dict; rows of classes that the checkpoint does not have are taken from it.
        path: the checkpoint's, for the log.
    """
    places = {_plain_name(name): i for i, name in reversed(list(enumerate(theirs)))}
    kept = [(i, places[_plain_name(name)]) for i, name in enumerate(ours) if _plain_name(name) in places]
    for name in [name for name in state if CLASS_ROWS.search(name) and name in model]:
        rows, old = model[name].detach().cpu().clone(), torch.as_tensor(state[name])
        extra = len(rows) - len(ours)  # no-object, the unknown label of denoising, or "object": the last row
        if extra not in (0, 1) or len(old) - len(theirs) != extra or old.shape[1:] != rows.shape[1:]:
            continue  # told with everything else that does not fit
        for i, j in kept:
            rows[i] = old[j]
        if extra:
            rows[-1] = old[-1]
        state[name] = rows
    new = [name for i, name in enumerate(ours) if i not in dict(kept)]
    _logger.info(
        "Classes of %s: %d rows are kept (%s), %d start as in a new model (%s)",
        path, len(kept), ", ".join(ours[i] for i, _ in kept) or "none", len(new), ", ".join(new) or "none",
    )  # fmt: skip


def head_rows(state: Mapping[str, Tensor]) -> set[int]:
    """How many rows the class heads of a state dict have, whosever names it has."""
    heads = re.compile(r"(^|\.)(class_embed|enc_out_class_embed|class_labels_classifier)(\.\d+)?\.bias$")
    return {len(state[name]) for name in state if heads.search(name)}


def _plain_name(name: str) -> str:
    """A class's name for comparison: case, spaces, hyphens and underscores aside."""
    return re.sub(r"[\s_-]+", " ", name).strip().casefold()
