"""Responses in the OpenAPI document: status codes, content types and schemas."""

from __future__ import annotations

from typing import Any

__all__ = [
    "CARD",
    "CHAT_ANSWER",
    "COMPLETION",
    "DETOKENIZED",
    "EMBEDDED",
    "GENERATING",
    "HEALTH",
    "MODELS",
    "TOKENIZED",
    "TOKENIZER",
    "UNHEALTHY",
    "UPDATED",
    "VERSION",
    "WITH_MODEL",
    "responses",
    "text_responses",
]

Schema = dict[str, Any]
Responses = dict[int | str, dict[str, Any]]


def object_with(**required: Schema) -> Schema:
    """An object that has at least these fields."""
    return {"type": "object", "properties": required, "required": list(required)}


def array_of(item: Schema) -> Schema:
    """An array of these items."""
    return {"type": "array", "items": item}


def any_of(*kinds: Schema) -> Schema:
    """One of these schemas."""
    return {"anyOf": list(kinds)}


STRING, INTEGER, BOOLEAN, NULL = ({"type": kind} for kind in ("string", "integer", "boolean", "null"))
MAPPING: Schema = {"type": "object"}

ERROR = object_with(
    error=object_with(message=STRING, type=STRING, param=any_of(STRING, NULL), code=any_of(STRING, NULL))
)
USAGE = object_with(prompt_tokens=INTEGER, total_tokens=INTEGER)
SPENT = object_with(
    prompt_tokens=INTEGER, completion_tokens=INTEGER, total_tokens=INTEGER, prompt_tokens_details=MAPPING
)
WHY = {"finish_reason": any_of(STRING, NULL), "logprobs": any_of(MAPPING, NULL)}
COMPLETION = object_with(
    id=STRING,
    object=STRING,
    created=INTEGER,
    model=STRING,
    weights_version=INTEGER,
    usage=SPENT,
    choices=array_of(object_with(index=INTEGER, text=STRING, **WHY)),
)
CHAT_ANSWER = object_with(
    id=STRING,
    object=STRING,
    created=INTEGER,
    model=STRING,
    weights_version=INTEGER,
    usage=SPENT,
    choices=array_of(object_with(index=INTEGER, message=object_with(role=STRING, content=any_of(STRING, NULL)), **WHY)),
)
VECTOR = any_of(array_of({"type": "number"}), STRING)
EMBEDDED = object_with(
    id=STRING,
    object=STRING,
    created=INTEGER,
    model=STRING,
    weights_version=INTEGER,
    usage=USAGE,
    data=array_of(object_with(object=STRING, index=INTEGER, embedding=VECTOR)),
)
UPDATED = object_with(weights_version=INTEGER)
TOKENIZED = object_with(
    count=INTEGER, max_model_len=INTEGER, tokens=array_of(INTEGER), token_strs=any_of(array_of(STRING), NULL)
)
TOKENIZER = object_with(tokenizer_class=STRING)
DETOKENIZED = object_with(prompt=STRING)
CARD = object_with(
    id=STRING,
    object=STRING,
    created=INTEGER,
    owned_by=STRING,
    root=STRING,
    max_model_len=INTEGER,
    vocab_size=INTEGER,
    fingerprint=STRING,
    weights_version=INTEGER,
    chat_template=BOOLEAN,
    default_sampling_params=MAPPING,
)
MODELS = object_with(object=STRING, data=array_of(CARD))
HEALTH = object_with(status=STRING, restarts=INTEGER)
UNHEALTHY = any_of(HEALTH, ERROR)
VERSION = object_with(version=STRING)

MEANINGS = {
    400: "The request is at fault: `param` is the field",
    401: "A key is asked for, and this is none",
    403: "The server was not started with the flag that allows it",
    404: "Not served here",
    408: "The body took too long",
    413: "The body is too large",
    415: "The body is compressed",
    429: "Too many wait already: the header Retry-After says when to come again",
    500: "The server failed: its log says why",
    503: "No engine, or no room for the body, just now",
}
ANYWHERE = (408, 413, 415, 500, 503)
"""Of any request."""
WITH_MODEL = (400, 404)
"""Also of a request with a body."""
GENERATING = (*WITH_MODEL, 429)
"""Also of a request that needs the engine."""


def responses(success: Schema, *errors: int, stream: bool = False, public: bool = False) -> Responses:
    """A route's `responses`: JSON of this shape, or as server-sent events where `stream`, or an error.

    A `public` route needs no key.
    """
    content: dict[str, Any] = {"application/json": {"schema": success}}
    if stream:
        content["text/event-stream"] = {"schema": STRING}
    return {200: {"description": "The answer", "content": content}, **_errors(errors if public else (401, *errors))}


def text_responses() -> Responses:
    """The same of a public route that responses with plain text."""
    return {200: {"description": "The text"}, **_errors(())}


def _errors(statuses: tuple[int, ...]) -> Responses:
    return {
        status: {"description": MEANINGS[status], "content": {"application/json": {"schema": ERROR}}}
        for status in sorted({*ANYWHERE, *statuses})
    }
