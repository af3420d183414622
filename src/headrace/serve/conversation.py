"""A chat request's conversation: its prompt, and what the assistant's message may be."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from headrace.dialects.base import AnswerShape
from headrace.errors import renamed_fields
from headrace.llm.chat import ToolRequest, message_shape, shaped_params
from headrace.serve.errors import RefusedError
from headrace.serve.models import ServedModel
from headrace.serve.protocol.bodies import Body
from headrace.serve.protocol.prediction import read_prediction
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
    prediction: tuple[int, ...] = ()
    """Tokens of the text that the answer may be like, as many as the context holds."""


async def read_conversation(body: Body, model: ServedModel) -> Conversation:
    """Of a chat request, or of one that asks for its tokens. Raises `RequestError` with the field at fault."""
    continuing = body.get("continue_final_message", False)
    if continuing and body.get("add_generation_prompt", False):
        raise RefusedError(
            "continue_final_message and add_generation_prompt are opposites: send one of them", "continue_final_message"
        )
    predicted = read_prediction(body)
    tools = read_tools(body.get("tools"))
    parallel = body.get("parallel_tool_calls", True)
    source = model.text.template_source(body.get("chat_template"))
    shape = message_shape(source, ToolRequest(tools, body.get("tool_choice"), parallel, model.tool_format))
    prompt = await model.text.chat(
        body["messages"],
        add_generation_prompt=body.get("add_generation_prompt", True),
        continue_final_message=continuing,
        chat_template=body.get("chat_template"),
        variables=_variables(body),
        tools=tools,
        add_special_tokens=body.get("add_special_tokens", False),
    )
    begun = str(read_messages(body["messages"])[-1]["content"]) if continuing else ""
    prediction = await model.text.encode(predicted, False, "prediction") if predicted else []
    return Conversation(prompt, shape, begun, tuple(prediction[: model.gateway.info.max_model_len]))


def shaped(generation: GenerationRequest, conversation: Conversation, tokenizer: Tokenizer) -> GenerationRequest:
    """The request with its message's shape, and with the constraint that holds the message to it."""
    field = generation.names["constraint"]
    if conversation.shape.choice.mode == "required" and generation.params.constraint and field == "structured_outputs":
        raise RefusedError(
            "structured_outputs constrains the text, and with this tool_choice there is none: send one of them", field
        )
    names = {**generation.names, **({"constraint": "tools"} if conversation.shape.allowed else {})}
    with renamed_fields(names):
        shape, params = shaped_params(
            conversation.shape, conversation.prompt.text, generation.params, tokenizer, conversation.begun
        )
        params = replace(params, prediction=conversation.prediction)
    plain = not shape.allowed and shape.reasoning is None
    return replace(
        generation,
        params=params,
        shape=None if plain else shape,
        begun="" if generation.echo else conversation.begun,
        names=names,
    )


def _variables(body: Body) -> dict[str, tuple[str, Any]]:
    """The chat template's variables, each with the field that it came from."""
    variables: dict[str, tuple[str, Any]] = {
        name: ("chat_template_kwargs", value) for name, value in body.get("chat_template_kwargs", {}).items()
    }
    if "reasoning_effort" in body:
        variables["reasoning_effort"] = "reasoning_effort", body["reasoning_effort"]
    return variables
