"""Command lines of flags and KEY VALUE pairs, in any order."""

from __future__ import annotations

import argparse
import difflib
import re
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

_DASHES = ("\u2010", "\u2011", "\u2012", "\u2013", "\u2014", "\u2015", "\u2212")


class OptionsParser(argparse.ArgumentParser):
    """An `ArgumentParser` whose argument of `nargs=REMAINDER`, KEY VALUE pairs, may stand before flags as well.

    argparse alone gives that argument all that follows: `OUTPUT_DIR out --resume` would resume nothing. Here a flag is
    one wherever a key could stand. The value of a key is taken as it is, so it may begin with "-", unless it is a flag.
    """

    def parse_known_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: Any = None
    ) -> tuple[Any, list[str]]:
        """As argparse's; exits where a key has a flag for its value, or what stands for a key is an unknown flag."""
        return super().parse_known_args(self._flags_first(list(sys.argv[1:] if args is None else args)), namespace)

    def error(self, message: str) -> NoReturn:
        """As argparse's; of flags that there are not, those that there are of nearly the name are told."""
        wrong = re.match(r"unrecognized arguments: (-\S*)", message)
        name = wrong[1].partition("=")[0] if wrong else ""
        close = difflib.get_close_matches(name, self._option_string_actions, n=3) if wrong else []
        super().error(f"{message}; similar: {', '.join(close)}" if close else message)

    def _flags_first(self, arguments: list[str]) -> list[str]:
        rest = next((action for action in self._actions if action.nargs == argparse.REMAINDER), None)
        if rest is None:
            return arguments
        flags: list[str] = []
        pairs: list[str] = []
        begun = False
        while arguments:
            first = arguments[0]
            action = self._flag(first)
            if first == "--" and not rest.option_strings:  # as argparse has it: pairs alone follow
                arguments = arguments[1:]
                begun = True
                continue
            if first == "--opts" and action is None:
                self.error("--opts: KEY VALUE pairs stand here without it")
            if action is rest:  # "--opts", where the pairs have a flag of their own
                begun, count = True, 1
            elif action is not None:
                count = 1 + self._values(action, first, arguments[1:])
                flags += arguments[:count]
            elif not begun and (rest.option_strings or first.startswith("-")):  # argparse knows what to say of it
                count = 1
                flags.append(first)
            else:
                begun, count = True, 2
                self._check_pair(arguments[:2])
                pairs += arguments[:2]
            arguments = arguments[count:]
        return [*flags, *(rest.option_strings[:1] if pairs else ()), *pairs]

    def _check_pair(self, pair: list[str]) -> None:
        key, equals, value = pair[0].partition("=")
        if key[:1] in _DASHES:
            self.error(f"{pair[0]!r} begins with a long dash, as printed texts have them: flags begin with --")
        if key.startswith("-"):
            self.error(f"unrecognized arguments: {pair[0]}")
        if equals:
            self.error(f"{pair[0]} is no key: give KEY VALUE pairs with a blank between, {key} {value or 'VALUE'}")
        if len(pair) == 2 and pair[1].partition("=")[0] in self._option_string_actions:
            self.error(f"{pair[0]} has no value before {pair[1]}: give KEY VALUE pairs")

    def _flag(self, argument: str) -> argparse.Action | None:
        """The action of a flag, which argparse lets users cut short."""
        name = argument.partition("=")[0]
        known = self._option_string_actions
        if name in known or not name.startswith("--"):
            return known.get(name)
        longer = {id(action): action for flag, action in known.items() if flag.startswith(name)}
        return next(iter(longer.values())) if len(longer) == 1 and len(name) > 2 else None

    def _values(self, action: argparse.Action, flag: str, following: list[str]) -> int:
        """How many of the arguments that follow a flag are its own."""
        if action.nargs == 0:
            name, equals, value = flag.partition("=")
            value = value if equals else next(iter(following), "")
            if equals or value.lower() in ("true", "false", "yes", "no"):
                self.error(f"argument {name}: it takes no value, {value!r}: give it alone, or leave it out")
            return 0
        if "=" in flag:
            return 0
        if action.nargs is None or isinstance(action.nargs, int):
            count = 1 if action.nargs is None else action.nargs
            if count > len(following):  # what comes next in the new order must not be taken for it
                self.error(f"argument {flag}: expected {count} argument{'' if count == 1 else 's'}")
            return count
        ends = (i for i, argument in enumerate(following) if self._flag(argument) is not None)
        return next(ends, len(following))
