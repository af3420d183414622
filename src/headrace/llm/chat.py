"""Conversations with tools: what an assistant's message may be, the parameters that hold it to that, what it says."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

from headrace.dialects.base import AnswerShape, ReasoningStart
from headrace.dialects.choose import answer_dialect, opens_reasoning, template_reasons
from headrace.dialects.grammar import answer_constraint
from headrace.dialects.parser import AnswerParser, Arguments, CallStart, Content, Reasoning
from headrace.dialects.request import described_tools, read_tool_choice
from headrace.engine.schedule.sampling import SamplingParams
from headrace.llm.outputs import RequestOutput
from headrace.text.tokenizer import Tokenizer

__all__ = ["ChatMessage", "ChatOutput", "ToolCall", "ToolRequest", "chat_output", "message_shape", "shaped_params"]


@dataclass(frozen=True, slots=True)
class ToolRequest:
    """The tools of a request, and what it says of them."""

    tools: Sequence[Mapping[str, Any]] | None = None
    """As `read_tools` gives them."""
    choice: Any = None
    """OpenAI's `tool_choice`."""
    parallel: bool = True
    """Whether a message may have several calls."""
    format: str | None = None
    """The dialect of calls; None: as the chat template writes them."""


@dataclass(slots=True)
class ToolCall:
    """A call of a tool. `arguments` are JSON, as the model wrote them."""

    id: str
    name: str
    arguments: str


@dataclass(slots=True)
class ChatMessage:
    """What an assistant's message says."""

    content: str = ""
    reasoning: str = ""
    tool_calls: list[ToolCall] = field(default_factory=list)


@dataclass(slots=True)
class ChatOutput(RequestOutput):
    """The answer to a conversation; `messages[i]` is what `outputs[i].text` says."""

    messages: list[ChatMessage] = field(default_factory=list)


def message_shape(source: str, asked: ToolRequest) -> AnswerShape:
    """What a message may be, before its prompt is known; `source` is the text of the chat template.

    Raises `RequestError` about {tools} or {tool_choice}.
    """
    tools = described_tools(asked.tools)
    choice = read_tool_choice(asked.choice, tools)
    dialect = answer_dialect(source, tools, choice, asked.format)
    reasoning: ReasoningStart | None = "may begin" if template_reasons(source) else None
    return AnswerShape(dialect, tools, choice, asked.parallel, reasoning)


def shaped_params(
    shape: AnswerShape, prompt_text: str | None, params: SamplingParams, tokenizer: Tokenizer, begun: str = ""
) -> tuple[AnswerShape, SamplingParams]:
    """The shape behind a prompt, and the parameters that hold the message to it. `params.constraint` is its content's.

    `begun` is the text that the message goes on with. Raises `RequestError` about {constraint} or {tools}.
    """

    def special(text: str) -> int | None:
        token = tokenizer.token_id(text)
        return token if token in tokenizer.special_ids else None

    opened = prompt_text is not None and opens_reasoning(prompt_text)
    shape = replace(shape, reasoning="begun" if opened else shape.reasoning, content=params.constraint)
    constraint = answer_constraint(shape, special)
    if constraint is not None and begun:
        constraint = replace(constraint, prefix=begun)
    shown = [token for text in shape.markers if (token := special(text)) is not None]
    return shape, replace(params, constraint=constraint, shown_special_ids=(*params.shown_special_ids, *shown))


def chat_output(output: RequestOutput, shape: AnswerShape) -> ChatOutput:
    """An answer with what its texts say. Ids of calls are the same for the same request name."""
    values = {f.name: getattr(output, f.name) for f in fields(output)}
    messages = [_message(shape, choice.text, f"{output.request_id}/{choice.index}") for choice in output.outputs]
    return ChatOutput(**values, messages=messages)


def _message(shape: AnswerShape, text: str, seed: str) -> ChatMessage:
    parser = AnswerParser(shape, shape.call_ids(seed))
    message = ChatMessage()
    for part in (*parser.push(text), *parser.finish()):
        if isinstance(part, Content):
            message.content += part.text
        elif isinstance(part, Reasoning):
            message.reasoning += part.text
        elif isinstance(part, CallStart):
            message.tool_calls.append(ToolCall(part.id, part.name, ""))
        elif isinstance(part, Arguments):
            message.tool_calls[part.index].arguments += part.text
    return message
