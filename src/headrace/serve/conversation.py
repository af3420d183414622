"""A chat request's conversation: its prompt, and what the assistant's message may be."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

from headrace.dialects.base import AnswerShape
from headrace.dialects.choose import answer_dialect, opens_reasoning, template_reasons
from headrace.dialects.grammar import answer_constraint
from headrace.dialects.request import described_tools, read_tool_choice
from headrace.errors import renamed_fields
from headrace.serve.errors import RefusedError
from headrace.serve.models import ServedModel
from headrace.serve.protocol.bodies import Body
from headrace.serve.protocol.requests import GenerationRequest
from headrace.serve.text_service import TokenizedPrompt
from headrace.text.messages import read_messages, read_tools
from headrace.text.tokenizer import Tokenizer

__all__ = ["Conversation", "read_conversation", "shaped"]


@dataclass(frozen=True)
class Conversation:
    """The prompt that a conversation becomes, and the shape of the message that may follow."""

    prompt: TokenizedPrompt
    shape: AnswerShape
    begun: str
    """The text of the last message, where the answer goes on with it."""


async def read_conversation(body: Body, model: ServedModel) -> Conversation:
    """Of a chat request, or of one that asks for its tokens. Raises `RequestError` with the field at fault."""
    continuing = body.get("continue_final_message", False)
    if continuing and body.get("add_generation_prompt", False):
        raise RefusedError(
            "continue_final_message and add_generation_prompt are opposites: send one of them", "continue_final_message"
        )
    given = read_tools(body.get("tools"))
    tools = described_tools(given)
    choice = read_tool_choice(body.get("tool_choice"), tools)
    source = model.text.template_source(body.get("chat_template"))
    dialect = answer_dialect(source, tools, choice, model.tool_format)
    prompt = await model.text.chat(
        body["messages"],
        add_generation_prompt=body.get("add_generation_prompt", True),
        continue_final_message=continuing,
        chat_template=body.get("chat_template"),
        variables=_variables(body),
        tools=given,
        add_special_tokens=body.get("add_special_tokens", False),
    )
    reasoning: Literal["may begin", "begun"] | None = None
    if prompt.text is not None and opens_reasoning(prompt.text):
        reasoning = "begun"
    elif template_reasons(source):
        reasoning = "may begin"
    begun = str(read_messages(body["messages"])[-1]["content"]) if continuing else ""
    parallel = body.get("parallel_tool_calls", True)
    return Conversation(prompt, AnswerShape(dialect, tools, choice, parallel, reasoning), begun)


def shaped(generation: GenerationRequest, conversation: Conversation, tokenizer: Tokenizer) -> GenerationRequest:
    """The request with its message's shape, and with the constraint that holds the message to it."""
    shape = replace(conversation.shape, content=generation.params.constraint)
    names = {**generation.names, **({"constraint": "tools"} if shape.allowed else {})}
    with renamed_fields(names):
        constraint = answer_constraint(shape, lambda text: _special(tokenizer, text))
        if constraint is not None and conversation.begun:
            constraint = replace(constraint, prefix=conversation.begun)
        shown = [token for text in shape.markers if (token := _special(tokenizer, text)) is not None]
        params = replace(generation.params, constraint=constraint, shown_special_ids=tuple(shown))
    plain = not shape.allowed and shape.reasoning is None
    return replace(
        generation,
        params=params,
        shape=None if plain else shape,
        begun="" if generation.echo else conversation.begun,
        names=names,
    )


def _special(tokenizer: Tokenizer, text: str) -> int | None:
    """The id of a text that is one special token."""
    token = tokenizer.token_id(text)
    return token if token in tokenizer.special_ids else None


def _variables(body: Body) -> dict[str, tuple[str, Any]]:
    """The chat template's variables, each with the field that it came from."""
    variables: dict[str, tuple[str, Any]] = {
        name: ("chat_template_kwargs", value) for name, value in body.get("chat_template_kwargs", {}).items()
    }
    if "reasoning_effort" in body:
        variables["reasoning_effort"] = "reasoning_effort", body["reasoning_effort"]
    return variables
