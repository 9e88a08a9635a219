"""Tables of parameter names: one model's in terms of another's, read in either direction."""

from __future__ import annotations

import re
from collections.abc import Mapping


class NameTable:
    """Pairs of names, there and here, the first that fits counts.

    A pair stands for all names that begin with it and go on after a dot; `#` stands for a number, the same on both
    sides.

    Args:
        pairs: names there -> names here. Where several are the same here, the first is the one to write.
    """

    def __init__(self, pairs: Mapping[str, str]) -> None:
        self.pairs = dict(pairs)
        self._rules = [(_pattern(there), here) for there, here in pairs.items()]

    def __call__(self, name: str) -> str | None:
        """The name here, None where no pair fits."""
        for pattern, here in self._rules:
            if match := pattern.match(name):
                return _filled(here, match.groups()) + name[match.end() :]
        return None

    def inverse(self) -> NameTable:
        """The same table from here to there."""
        turned: dict[str, str] = {}
        for there, here in self.pairs.items():
            turned.setdefault(here, there)
        return NameTable(turned)


def _pattern(name: str) -> re.Pattern[str]:
    return re.compile(r"(\d+)".join(map(re.escape, name.split("#"))) + r"(?=\.|$)")


def _filled(name: str, numbers: tuple[str, ...]) -> str:
    parts = name.split("#")
    return parts[0] + "".join(number + part for number, part in zip(numbers, parts[1:], strict=True))
