"""Names of the papers' released files, and those they have here.

Released detectors keep torchvision's ResNet under `backbone.0.body` and one row per COCO category id (1..90 with
holes, see `detr_family.checkpoint.rows`); here the ResNet is Detectron2's.
"""

from __future__ import annotations

import re
from collections.abc import Collection

from torch import Tensor

from detr_family.checkpoint.rows import CLASS_ROWS, COCO_IDS, COCO_NAMES, coco_rows

__all__ = ["COCO_IDS", "COCO_NAMES", "SIGN", "convert_released", "convert_resnet", "convert_swin", "released_name"]

# The releases join backbone and spatial encoding: the former is number 0.
SIGN = re.compile(r"backbone\.0\.")

_RELEASE_BACKBONE = "backbone.0.body."
_RESNET_NAMES = (
    (r"^(conv1|bn1)\.", r"stem.\1."),
    (r"^layer(\d)\.", lambda m: f"res{int(m[1]) + 1}."),
    (r"\.downsample\.0\.", ".shortcut."),
    (r"\.downsample\.1\.", ".shortcut.norm."),
    (r"\.bn(\d)\.", r".conv\1.norm."),
)
# What Swin's files hold beside weights: buffers that follow from the sizes of windows and images.
SWIN_INDICES = re.compile(r"\.(relative_position_index|attn_mask)$")


def resnet_name(name: str) -> str:
    """Detectron2's name of a parameter of torchvision's ResNet: `layer1.0.bn2.bias` -> `res2.0.conv2.norm.bias`."""
    for pattern, replacement in _RESNET_NAMES:
        name = re.sub(pattern, replacement, name)
    return name


def released_name(name: str) -> str:
    """The name here of a parameter of a paper's release; after the backbone they are the same, and Swin's are too."""
    if name.startswith(_RELEASE_BACKBONE):
        return "backbone." + resnet_name(name[len(_RELEASE_BACKBONE) :])
    if name.startswith("backbone.0."):
        return "backbone." + name[len("backbone.0.") :]
    # The releases join backbone and spatial encoding: the latter is number 1.
    return re.sub(r"^backbone\.1\.", "position_encoding.", name)


def convert_released(
    state: dict[str, Tensor], num_classes: int, with_one_more: Collection[str] = ()
) -> dict[str, Tensor]:
    """A paper's released state dict under the names here.

    With 80 classes the rows of the 80 COCO categories are picked from the releases' 91; where there is a 92nd
    row (no-object of DETR, the unknown label of the denoising detectors) it is kept, last.

    Args:
        state: the release's.
        num_classes: of the model here.
        with_one_more: names here of tensors with one row more than there are classes. Those that have 91 rows in the
            release are a two-stage detector's head for proposals: row 0, no category's, says whether there is an
            object, and comes last here.
    """
    converted = {}
    for name, tensor in state.items():
        if name.endswith("num_batches_tracked") or SWIN_INDICES.search(name):
            continue
        here = released_name(name)
        if CLASS_ROWS.search(name):
            tensor = coco_rows(tensor, num_classes, proposals=here in with_one_more and len(tensor) == 91)
        converted[here] = tensor
    return converted


def convert_resnet(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """torchvision's ResNet as a backbone: without the classifier."""
    return {
        "backbone." + resnet_name(k): v
        for k, v in state.items()
        if not k.startswith("fc.") and not k.endswith("num_batches_tracked")
    }


def convert_swin(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """An ImageNet Swin of its authors as a backbone: without the classifier and the norm before it.

    The norms of the stages' outputs are not in such a file: they start as they are initialised, as in the papers'
    releases.
    """
    return {
        "backbone." + name: tensor
        for name, tensor in state.items()
        if not name.startswith(("head.", "norm.")) and not SWIN_INDICES.search(name)
    }
