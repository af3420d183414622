"""What one answer may be, as plain data: the tools it may call, the format of its calls, its reasoning."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, TypeAlias

from headrace.engine.schedule.constraint import Constraint

__all__ = ["THINK", "UNTHINK", "WHITESPACE", "AnswerShape", "Dialect", "ReasoningStart", "Tool", "ToolChoice"]

THINK = "<think>"
UNTHINK = "</think>"
WHITESPACE = " \n\r\t"

ReasoningStart: TypeAlias = Literal["may begin", "begun"]
"""Of an answer that may begin with a `<think>` block; "begun": the prompt has opened it."""


@dataclass(frozen=True, slots=True)
class Tool:
    """A function that the model may call."""

    name: str
    schema: str
    """The JSON schema of its arguments, as JSON text; it describes an object."""


@dataclass(frozen=True, slots=True)
class ToolChoice:
    """Whether the answer calls tools. With "required" and a `name`, it is one call of that tool."""

    mode: Literal["none", "auto", "required"]
    name: str | None = None


@dataclass(frozen=True, slots=True)
class Dialect:
    """A format of tool calls, as the texts around them. Between any two of its pieces there may be white space.

    An answer's calls are `opening`, calls with `between` from one to the next, and `closing`. A call is
    `{"name": "…", key: {…}}`.
    """

    name: str
    opening: tuple[str, ...] = ()
    """What comes before the first call. Its first piece is the marker that ends free text."""
    between: tuple[str, ...] | None = None
    """None: an answer has one call."""
    closing: tuple[str, ...] = ()
    key: str = "arguments"
    bare: bool = False
    """Whether an answer may begin with a call that has no `opening`."""
    named_alone: bool = False
    """Whether a call of a tool that the request names is its arguments alone."""
    short_ids: bool = False
    """Whether ids of calls have nine characters; `call_` and 24 otherwise."""

    @property
    def marker(self) -> str | None:
        """The text that ends free text and begins calls, wherever it stands."""
        return self.opening[0] if self.opening else None

    def head(self, tool: str) -> tuple[str, ...]:
        """The pieces of a call from its first character to its arguments."""
        return ("{", '"name"', ":", json.dumps(tool), ",", json.dumps(self.key), ":")

    def call_ids(self, seed: str) -> Callable[[int], str]:
        """The ids of an answer's calls by their index: equal ones for an equal seed."""

        def call_id(index: int) -> str:
            digest = hashlib.sha256(f"{seed}/{index}".encode()).hexdigest()
            return digest[:9] if self.short_ids else f"call_{digest[:24]}"

        return call_id


@dataclass(frozen=True, slots=True)
class AnswerShape:
    """What one answer may be. Without a dialect it has no calls."""

    dialect: Dialect | None = None
    tools: tuple[Tool, ...] = ()
    choice: ToolChoice = ToolChoice("none")
    parallel: bool = True
    """Whether there may be more than one call."""
    reasoning: ReasoningStart | None = None
    content: Constraint | None = None
    """What the text beside reasoning and calls must be."""

    @property
    def allowed(self) -> tuple[Tool, ...]:
        """The tools that this answer may call."""
        if self.dialect is None or self.choice.mode == "none":
            return ()
        return tuple(tool for tool in self.tools if self.choice.name in (None, tool.name))

    @property
    def once(self) -> bool:
        """Whether one call is the most."""
        return not self.parallel or self.choice.name is not None or self.dialect is None or self.dialect.between is None

    @property
    def alone(self) -> bool:
        """Whether a call is its arguments and nothing else."""
        return self.dialect is not None and self.dialect.named_alone and self.choice.name is not None

    def call_ids(self, seed: str) -> Callable[[int], str]:
        """As `Dialect.call_ids`. Without a dialect there are no calls to name."""
        return str if self.dialect is None else self.dialect.call_ids(seed)

    @property
    def markers(self) -> tuple[str, ...]:
        """The texts of this answer that a tokenizer may have as one special token each.

        Where it has, the answer must be detokenized with these tokens written out and every other special token
        left out.
        """
        found = [THINK, UNTHINK] if self.reasoning else []
        if self.allowed and self.dialect is not None:
            pieces = (*self.dialect.opening, *(self.dialect.between or ()), *self.dialect.closing)
            found += [piece for piece in pieces if len(piece) > 1]
        return tuple(dict.fromkeys(found))
