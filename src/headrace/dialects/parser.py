"""`AnswerParser`: from the text of an answer, as it arrives, to its parts.

A part is given as soon as no later text can change it. How the text was cut into pieces changes only how its parts
are cut. Text that is no answer of the shape is content.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from headrace.dialects.base import THINK, UNTHINK, WHITESPACE, AnswerShape

__all__ = ["AnswerParser", "AnswerPart", "Arguments", "CallStart", "Content", "Reasoning"]

SIGNIFICANT = re.compile(r'["\\{}\[\]]')


@dataclass(frozen=True, slots=True)
class Content:
    """Text for the user."""

    text: str


@dataclass(frozen=True, slots=True)
class Reasoning:
    """Text of a `<think>` block, without the white space at its ends."""

    text: str


@dataclass(frozen=True, slots=True)
class CallStart:
    """A call of a tool begins; its arguments follow, at least `{}`."""

    index: int
    id: str
    name: str


@dataclass(frozen=True, slots=True)
class Arguments:
    """Arguments of a call, as the model wrote them: JSON, in pieces."""

    index: int
    text: str


AnswerPart: TypeAlias = Content | Reasoning | CallStart | Arguments
_State: TypeAlias = "Callable[[], _State | None]"


class AnswerParser:
    """The parser of one answer.

    It reads text in which the markers of the shape are written out, and no other special token.
    """

    def __init__(self, shape: AnswerShape, call_id: Callable[[int], str], begun: str = "") -> None:
        """`call_id` gives the id of a call by its index, for example `Dialect.call_ids(seed)`.

        `begun` is the text of the answer before what is pushed; none of it is given.
        """
        self._dialect = shape.dialect if shape.allowed else None
        self._shape = shape
        self._heads = [(tool.name, _head(shape, tool.name)) for tool in shape.allowed]
        self._call_id = call_id
        self._held = ""
        """The text that is not decided yet."""
        self._length = 0
        """Of all text so far. What is held is its end."""
        self._known = len(begun)
        self._ended = False
        self._begun = False
        """Whether the present block of reasoning, or the content, has text."""
        self._calls = 0
        self._object = _ObjectEnd()
        self._parts: list[AnswerPart] = []
        states = {None: self._text, "may begin": self._open, "begun": self._reasoning}
        self._state: _State = states[shape.reasoning]
        self.push(begun)

    def push(self, text: str) -> list[AnswerPart]:
        """Add text; returns the parts that it decides."""
        self._held += text
        self._length += len(text)
        return self._read()

    def finish(self) -> list[AnswerPart]:
        """The parts that are left where the text ends, complete or not.

        A call whose arguments have begun stays as it is; of one that ends before them, nothing is given.
        """
        self._ended = True
        return self._read()

    @property
    def in_arguments(self) -> bool:
        """Whether the text so far ends within the arguments of a call."""
        return self._state == self._arguments

    def _read(self) -> list[AnswerPart]:
        while True:
            following = self._state()
            if following is None:
                break
            self._state = following
        parts, self._parts = self._parts, []
        return parts

    # Each state reads what it can of the held text, and returns the state that reads on; None waits for more text.

    def _open(self) -> _State | None:
        """Before a `<think>` that may come."""
        rest = self._held.lstrip(WHITESPACE)
        if rest.startswith(THINK):
            self._held = rest[len(THINK) :]
            return self._reasoning
        return None if THINK.startswith(rest) and not self._ended else self._text

    def _reasoning(self) -> _State | None:
        if not self._begun:
            self._held = self._held.lstrip(WHITESPACE)
        end = self._held.find(UNTHINK)
        if end < 0:
            self._give(Reasoning, self._decided(UNTHINK))
            return None
        self._give(Reasoning, len(self._held[:end].rstrip(WHITESPACE)))
        self._held = self._held.lstrip(WHITESPACE)[len(UNTHINK) :]
        self._begun = False
        return self._after

    def _after(self) -> _State | None:
        """After reasoning or calls: the white space before other text belongs to nothing."""
        self._held = self._held.lstrip(WHITESPACE)
        return self._text if self._held else None

    def _text(self) -> _State | None:
        """In text, in which calls may begin."""
        dialect = self._dialect
        first = not self._begun and not self._calls
        if dialect is None or (self._calls and self._shape.once):
            return self._rest
        try:
            if first and dialect.bare and (called := self._call(0)) is not None:
                return called
            # After constrained text there are no calls.
            if dialect.marker is None or (self._shape.content is not None and not first):
                return self._rest
            return self._marked(dialect.marker, dialect.opening[1:])
        except _UndecidedError:
            if not self._ended:
                return None
        marked = dialect.marker is not None and dialect.marker in self._held
        if marked or (self._shape.content is None and self._held.lstrip(WHITESPACE).startswith("{")):
            self._held = ""
        return self._rest

    def _marked(self, marker: str, opening: Sequence[str]) -> _State | None:
        """Text up to the marker, and the call after it."""
        if self._shape.content is not None and self._follow((marker,), 0) is None:
            return self._rest
        at = self._held.find(marker)
        if at < 0:
            self._give(Content, self._decided(marker))
            return None
        self._give(Content, len(self._held[:at].rstrip(WHITESPACE)))
        start = self._held.index(marker) + len(marker)
        after = self._follow(opening, start)
        called = None if after is None else self._call(after)
        if called is None:
            self._give(Content, start)
            return self._text
        return called

    def _rest(self) -> _State | None:
        """In text that no call can follow."""
        self._give(Content, len(self._held))
        return None

    def _arguments(self) -> _State | None:
        end = self._object.find(self._held)
        _, new = self._taken(len(self._held) if end is None else end)
        if new:
            self._parts.append(Arguments(self._calls - 1, new))
        return None if end is None else self._tail

    def _tail(self) -> _State | None:
        """After a call's arguments: its end, and then another call or the end of all."""
        assert self._dialect is not None
        at: int | None = 0
        try:
            at = 0 if self._shape.alone else self._follow(("}",), 0)
            if at is None:
                return self._after
            if not self._shape.once and (start := self._follow(self._dialect.between or (), at)) is not None:
                called = self._call(start)
                if called is not None:
                    return called
            closed = self._follow(self._dialect.closing, at)
        except _UndecidedError:
            if not self._ended:
                return None
            closed = len(self._held)
        self._held = self._held[at if closed is None else closed :]
        return self._after

    def _call(self, at: int) -> _State | None:
        """Read a call's head at this index of the held text: the state for its arguments, or None without a head."""
        undecided = False
        for name, head in self._heads:
            try:
                end = self._follow(head, at)
            except _UndecidedError:
                undecided = True
                continue
            if end is not None:
                self._parts.append(CallStart(self._calls, self._call_id(self._calls), name))
                self._held = self._held[end - 1 :]
                self._calls += 1
                self._object = _ObjectEnd()
                return self._arguments
        if undecided:
            raise _UndecidedError
        return None

    def _follow(self, pieces: Sequence[str], at: int) -> int | None:
        """The end of pieces that stand at a place of the held text, white space between; None if they do not."""
        held = self._held
        for piece in pieces:
            while at < len(held) and held[at] in WHITESPACE:
                at += 1
            if not held.startswith(piece, at):
                if piece.startswith(held[at:]):
                    raise _UndecidedError
                return None
            at += len(piece)
        return at

    def _decided(self, marker: str) -> int:
        """How much of the held text is neither a marker's beginning nor white space that may be before one."""
        if self._ended:
            return len(self._held)
        lengths = range(min(len(marker) - 1, len(self._held)), 0, -1)
        begun = next((n for n in lengths if marker.startswith(self._held[-n:])), 0)
        return len(self._held[: len(self._held) - begun].rstrip(WHITESPACE))

    def _give(self, kind: type[Content] | type[Reasoning], count: int) -> None:
        """Give the first characters that are held."""
        text, new = self._taken(count)
        self._begun = self._begun or bool(text)
        last = self._parts[-1] if self._parts else None
        if isinstance(last, kind):
            self._parts[-1] = kind(last.text + new)
        elif new:
            self._parts.append(kind(new))

    def _taken(self, count: int) -> tuple[str, str]:
        """The first characters that are held, now no more; and those of them that `begun` does not have."""
        known = max(self._known - (self._length - len(self._held)), 0)
        text, self._held = self._held[:count], self._held[count:]
        return text, text[known:]


def _head(shape: AnswerShape, tool: str) -> tuple[str, ...]:
    """The pieces of a call up to the first character of its arguments."""
    return ("{",) if shape.alone or shape.dialect is None else (*shape.dialect.head(tool), "{")


class _UndecidedError(Exception):
    """The held text ends where more of it is needed."""


class _ObjectEnd:
    """Finds the end of a JSON object in text that arrives in pieces."""

    def __init__(self) -> None:
        self._depth = 0
        self._quoted = False
        self._escaped = False

    def find(self, text: str) -> int | None:
        """The index after the object's last brace; None if it does not end in this text."""
        at = 1 if self._escaped and text else 0
        self._escaped = self._escaped and not text
        while (found := SIGNIFICANT.search(text, at)) is not None:
            character, at = found[0], found.end()
            if self._quoted:
                self._quoted = character != '"'
                if character == "\\":
                    self._escaped = at == len(text)
                    at += 1
            elif character == '"':
                self._quoted = True
            elif character != "\\":
                self._depth += 1 if character in "{[" else -1
                if self._depth == 0:
                    return at
        return None
