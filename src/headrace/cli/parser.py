"""`Parser`: argparse with errors of one line, which name the command and the nearest word that it knows."""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Iterable, Sequence
from itertools import takewhile
from typing import Any, NoReturn

__all__ = ["BAD_INPUT", "Parser", "guess"]

BAD_INPUT = 2


def guess(word: str, known: Iterable[str]) -> str:
    """ "; did you mean …?" with the nearest known word; "" if none is near."""
    near = difflib.get_close_matches(word, list(known), 1)
    return f"; did you mean {near[0]}?" if near else ""


class Parser(argparse.ArgumentParser):
    """A parser of one command, or of a group of commands, which shows its help where none of them is named."""

    def error(self, message: str) -> NoReturn:
        """Print one line for a bad flag, without the usage."""
        self.exit(BAD_INPUT, f"{self.prog}: {message} (see {self.prog} --help)\n")

    def add_commands(self, title: str, metavar: str) -> Any:
        """`add_subparsers`, not required: without a command the group's help is printed."""
        self.set_defaults(run=lambda _: self.print_help())
        return self.add_subparsers(title=title, metavar=metavar, parser_class=Parser)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As argparse's, but what is unknown is this parser's error, not that of the one above it."""
        for word in self._own(args):
            self._check_flag(word)
        parsed, unknown = super().parse_known_args(args, namespace)
        if unknown:
            self.error(f"{unknown[0]!r} is one argument too many")
        return parsed, unknown

    def _own(self, args: Sequence[str] | None) -> Iterable[str]:
        """The words that this parser reads itself: of a group, those before the command."""
        words = takewhile(lambda word: word != "--", args or ())
        return takewhile(lambda word: word.startswith("-"), words) if self._subparsers else words

    def _check_flag(self, word: str) -> None:
        """Refuse an unknown flag before argparse asks for what is missing, which a misspelt flag may have given."""
        flag = word.partition("=")[0]
        known = self._option_string_actions
        if not flag.startswith("-") or " " in word or flag == "-" or self._negative_number_matcher.match(word):
            return  # argparse reads it as a value
        if flag.startswith("--"):
            found = any(name.startswith(flag) for name in known)
        else:
            found = flag[:2] in known
        if not found:
            self.error(f"there is no flag {flag}{guess(flag, known)}")

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        try:
            super()._check_value(action, value)
        except argparse.ArgumentError as error:
            near = guess(str(value), map(str, action.choices or ()))
            raise argparse.ArgumentError(action, f"{error.message}{near}") from None
