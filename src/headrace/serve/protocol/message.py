"""`MessageReader`: the text of a choice as the parts of an assistant's message: reasoning, content, calls."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from headrace.dialects.base import THINK, UNTHINK, AnswerShape
from headrace.dialects.parser import AnswerParser, AnswerPart, Arguments, CallStart, Content, Reasoning
from headrace.text.detokenizer import Detokenizer

__all__ = ["MessagePart", "MessageReader", "ReasoningCounter"]


@dataclass(slots=True)
class MessagePart:
    """What a part of a text adds to a message. `calls` are OpenAI's deltas, one for each call that goes on in it."""

    content: str = ""
    reasoning: str = ""
    calls: list[dict[str, Any]] = field(default_factory=list)

    def one_call_each(self) -> list[MessagePart]:
        """The same in parts that go on with one call at most: clients read a chunk's first one."""
        if len(self.calls) < 2:
            return [self]
        first, *others = self.calls
        return [MessagePart(self.content, self.reasoning, [first]), *(MessagePart(calls=[call]) for call in others)]

    def __bool__(self) -> bool:
        return bool(self.content or self.reasoning or self.calls)


class MessageReader:
    """Reads one choice's text as it comes. Where nothing but content is possible, the text is the content."""

    def __init__(self, shape: AnswerShape | None, seed: str, begun: str = "", include_reasoning: bool = True) -> None:
        """`seed` decides the ids of calls.

        `begun` is the text of the message before this one's: it was sent, but its calls are given with those behind.
        """
        self._shape = shape
        self._include_reasoning = include_reasoning
        self.calls = 0
        """Calls of tools so far."""
        self._parser: AnswerParser | None = None
        self._sent: list[AnswerPart] = []
        """Calls of `begun` that are to be given; its last one may go on."""
        if shape is not None:
            self._parser = AnswerParser(shape, shape.call_ids(seed), begun)
            parts = AnswerParser(shape, shape.call_ids(seed)).push(begun)
            self._sent = [part for part in parts if isinstance(part, CallStart | Arguments)]

    def take(self, text: str, ended: bool) -> MessagePart:
        """Add a text, after which the choice has `ended` or not."""
        if self._parser is None:
            return MessagePart(text)
        parts = [*self._sent, *self._parser.push(text)]
        self._sent = []
        if ended:
            parts += self._parser.finish()
        part = MessagePart()
        for one in parts:
            if isinstance(one, Content):
                part.content += one.text
            elif isinstance(one, Reasoning):
                part.reasoning += one.text if self._include_reasoning else ""
            else:
                self.calls += isinstance(one, CallStart)
                _add_call(part.calls, one)
        return part

    def finish_reason(self, reason: str | None) -> str | None:
        """OpenAI's reason for an engine's: a message ends with the calls that the model chose to make.

        A stop string may cut a call's arguments; then there is nothing to call.
        """
        if reason != "stop" or not self.calls or self._shape is None or self._shape.choice.name is not None:
            return reason
        return "stop" if self._parser is not None and self._parser.in_arguments else "tool_calls"


class ReasoningCounter:
    """Counts the tokens of one choice's reasoning, with those of its markers."""

    def __init__(self, detokenizer: Detokenizer, opened: bool, begun: str = "") -> None:
        """`opened`: the prompt has opened the block. `begun` is the text of the message before these tokens."""
        self._detokenizer = detokenizer
        self._text = THINK if opened else ""
        self._waiting = 0
        """Tokens that may be white space before a block."""
        self._over = False
        self.count = 0
        self._read(begun)

    def take(self, token_ids: Sequence[int]) -> None:
        """Add a part's tokens."""
        for token in token_ids:
            if self._over:
                return
            self._waiting += 1
            self._read(self._detokenizer.push((token,)))

    def _read(self, text: str) -> None:
        self._text += text
        begin = self._text.lstrip()
        if begin.startswith(THINK):
            self.count += self._waiting
            self._waiting = 0
            self._over = UNTHINK in begin
            # What a later token may complete.
            self._text = THINK + begin[len(THINK) :][1 - len(UNTHINK) :]
        elif not THINK.startswith(begin):
            self._over = True


def _add_call(calls: list[dict[str, Any]], part: CallStart | Arguments) -> None:
    if isinstance(part, CallStart):
        function = {"name": part.name, "arguments": ""}
        calls.append({"index": part.index, "id": part.id, "type": "function", "function": function})
    elif calls and calls[-1]["index"] == part.index:
        calls[-1]["function"]["arguments"] += part.text
    else:
        calls.append({"index": part.index, "function": {"arguments": part.text}})
