"""What the methods give that Detectron2 lets a subclass of the trainer override, looked at before a training."""

from __future__ import annotations

from typing import Any

from torch.optim.lr_scheduler import ReduceLROnPlateau


def given(trainer: object, method: str, *args: Any) -> Any:
    """What a trainer's `build_...` method gives.

    Raises:
        ValueError: nothing, as where a `return` was forgotten; or what a training would fail of.
    """
    name = f"{type(trainer).__name__}.{method}"
    try:
        value = getattr(trainer, method)(*args)
    except ValueError as error:
        if "'full_model' is not a valid GradientClipType" not in str(error):
            raise
        raise ValueError(
            f"{name} asks Detectron2 to clip gradients, which has no SOLVER.CLIP_GRADIENTS.CLIP_TYPE full_model; "
            "the trainer clips those itself: give Detectron2's build_optimizer a cfg.clone() with "
            "SOLVER.CLIP_GRADIENTS.ENABLED False"
        ) from error
    if value is None:
        raise ValueError(f"{name} returned None: it must return what it builds")
    if isinstance(value, ReduceLROnPlateau):
        raise ValueError(
            f"{name} gives a ReduceLROnPlateau, which waits for a metric, and the trainer steps its scheduler after "
            "every iteration: give another one; or return ConstantLR(optimizer, factor=1) here, and step this one in a "
            "hook of your own (build_hooks)"
        )
    return value
