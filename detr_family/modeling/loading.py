"""A detector is not filled by half: what any checkpointer leaves out of it is an error, not a warning.

Detectron2's own checkpointer, as `DefaultPredictor` uses it, drops weights of another shape, ignores names that it does
not know, and goes on with what is left: a head for other classes, or a paper's released backbone, stays as it was
initialised. `detr_family.checkpoint.DETRCheckpointer` says what does not fit before anything is loaded.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

_NAMED = 5


def refuse_half_a_checkpoint(model: nn.Module, state: dict[str, Tensor], prefix: str, *_: Any) -> None:
    """Hook of `load_state_dict`, which does not tell it whether it was called with `strict`.

    A backbone alone may be loaded, and all of a detector. With `model.allow_partial_weights` anything may.

    Raises:
        ValueError: there is some of the detector in `state` and not all, or nothing of it at all.
    """
    theirs = {name[len(prefix) :] for name in state if name.startswith(prefix)}
    if getattr(model, "allow_partial_weights", False) or not theirs:
        return
    ours = set(model.state_dict())
    if theirs & ours and not any(not name.startswith("backbone.") for name in theirs & ours):
        return
    missing = sorted(ours - theirs, key=lambda name: (name.startswith("backbone."), name))
    if missing:
        more = f" and {len(missing) - _NAMED} more" if len(missing) > _NAMED else ""
        raise ValueError(
            f"{len(missing)} weights of {type(model).__name__} are not in the checkpoint, or have another shape there "
            f"({', '.join(missing[:_NAMED])}{more}), and would stay untrained: the checkpoint is of other classes "
            f"(MODEL.DETR.NUM_CLASSES is {getattr(model, 'num_classes', '?')} here), of another configuration or of "
            "other origin. detr_family.inference.Predictor.from_config(config, weights) takes the classes from the "
            "checkpoint and reads the formats of others, detr_family.checkpoint.DETRCheckpointer the latter"
        )
