"""Freezing parts of a detector by the names of their parameters."""

from __future__ import annotations

import difflib
import logging
import re
from collections.abc import Sequence

from torch import nn


def freeze(model: nn.Module, expressions: Sequence[str], *, all_match: bool = True) -> list[str]:
    """Freeze, in place, every parameter in whose name one of the expressions is found.

    Args:
        model: whose parameters are named as in its checkpoints, without `module.`.
        expressions: regular expressions, searched for anywhere in a name: `encoder` freezes all encoder layers,
            `^backbone\\.` the backbone, `layers\\.[01]\\.` the first two layers of encoder and decoder.
        all_match: an expression that no name matches is a mistake; False while parameters are still to come.

    Returns:
        The names that were found, frozen before or not.

    Raises:
        ValueError: an expression that is none, or that no name matches; similar names are given.
    """
    parameters = dict(model.named_parameters())
    frozen: set[str] = set()
    for expression in expressions:
        if not isinstance(expression, str):
            raise ValueError(f"MODEL.DETR.FREEZE has {expression!r}; it must be a list of regular expressions")
        try:
            found = [name for name in parameters if re.search(expression, name)]
        except re.error as error:
            raise ValueError(f"MODEL.DETR.FREEZE has {expression!r}, no regular expression: {error}") from error
        if not found and all_match:
            raise ValueError(
                f"MODEL.DETR.FREEZE has {expression!r}, which no parameter's name matches; "
                f"similar: {', '.join(_similar(expression, list(parameters)))}"
            )
        frozen.update(found)
    for name in frozen:
        parameters[name].requires_grad_(False)
    if frozen:
        count = sum(parameters[name].numel() for name in frozen)
        logging.getLogger(__name__).info(
            "MODEL.DETR.FREEZE %s: %d tensors with %.2f M parameters stay as they are",
            list(expressions), len(frozen), count / 1e6,
        )  # fmt: skip
    return [name for name in parameters if name in frozen]


def trained_though_matched(model: nn.Module, expressions: Sequence[str]) -> bool:
    """Whether `freeze` would change anything, or complain about an expression that nothing matches."""
    found = [[p for name, p in model.named_parameters() if re.search(str(x), name)] for x in expressions]
    return any(not parameters or any(p.requires_grad for p in parameters) for parameters in found)


def keep_frozen_statistics(model: nn.Module) -> None:
    """Put batch norms whose weights are frozen into evaluation mode: their statistics are part of them."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.affine and not module.weight.requires_grad:
            module.eval()


def _similar(expression: str, names: Sequence[str]) -> list[str]:
    """Names, or beginnings of names, that look like what was meant."""
    beginnings = {".".join(name.split(".")[:i]) for name in names for i in range(1, name.count(".") + 2)}
    plain = re.sub(r"[\^$\\]|\.\*", "", expression).strip(".")
    return difflib.get_close_matches(plain, sorted(beginnings), n=3, cutoff=0.3) or sorted(beginnings)[:3]
