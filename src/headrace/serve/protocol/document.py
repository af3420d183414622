"""What the OpenAPI document says of answers: their status codes, content types and shapes."""

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
    "UNHEALTHY",
    "UPDATED",
    "VERSION",
    "WITH_MODEL",
    "answers",
    "text_answers",
]

Schema = dict[str, Any]
Responses = dict[int | str, dict[str, Any]]


def thing(**required: Schema) -> Schema:
    """An object that has at least these fields."""
    return {"type": "object", "properties": required, "required": list(required)}


def series(item: Schema) -> Schema:
    """A list of these."""
    return {"type": "array", "items": item}


def either(*kinds: Schema) -> Schema:
    """One of these."""
    return {"anyOf": list(kinds)}


TEXT, WHOLE, BOOLEAN, NULL = ({"type": kind} for kind in ("string", "integer", "boolean", "null"))
MAPPING: Schema = {"type": "object"}

ERROR = thing(error=thing(message=TEXT, type=TEXT, param=either(TEXT, NULL), code=WHOLE))
USAGE = thing(prompt_tokens=WHOLE, total_tokens=WHOLE)
SPENT = thing(prompt_tokens=WHOLE, completion_tokens=WHOLE, total_tokens=WHOLE, prompt_tokens_details=MAPPING)
WHY = {"finish_reason": either(TEXT, NULL), "logprobs": either(MAPPING, NULL)}
COMPLETION = thing(
    id=TEXT,
    object=TEXT,
    created=WHOLE,
    model=TEXT,
    weights_version=WHOLE,
    usage=SPENT,
    choices=series(thing(index=WHOLE, text=TEXT, **WHY)),
)
CHAT_ANSWER = thing(
    id=TEXT,
    object=TEXT,
    created=WHOLE,
    model=TEXT,
    weights_version=WHOLE,
    usage=SPENT,
    choices=series(thing(index=WHOLE, message=thing(role=TEXT, content=TEXT), **WHY)),
)
VECTOR = either(series({"type": "number"}), TEXT)
EMBEDDED = thing(
    object=TEXT,
    model=TEXT,
    weights_version=WHOLE,
    usage=USAGE,
    data=series(thing(object=TEXT, index=WHOLE, embedding=VECTOR)),
)
UPDATED = thing(weights_version=WHOLE)
TOKENIZED = thing(count=WHOLE, max_model_len=WHOLE, tokens=series(WHOLE))
DETOKENIZED = thing(prompt=TEXT)
CARD = thing(
    id=TEXT,
    object=TEXT,
    created=WHOLE,
    owned_by=TEXT,
    root=TEXT,
    max_model_len=WHOLE,
    fingerprint=TEXT,
    weights_version=WHOLE,
    chat_template=BOOLEAN,
    default_sampling_params=MAPPING,
)
MODELS = thing(object=TEXT, data=series(CARD))
HEALTH = thing(status=TEXT, restarts=WHOLE)
UNHEALTHY = either(HEALTH, ERROR)
VERSION = thing(version=TEXT)

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
"""What may come of any request."""
WITH_MODEL = (400, 404)
"""Of one that has a body with fields, too."""
GENERATING = (*WITH_MODEL, 429)
"""Of one that needs the engine, too."""


def answers(success: Schema, *errors: int, stream: bool = False, public: bool = False) -> Responses:
    """A route's `responses`: JSON of this shape, or as server-sent events where `stream`, or an error.

    What is `public` needs no key.
    """
    content: dict[str, Any] = {"application/json": {"schema": success}}
    if stream:
        content["text/event-stream"] = {"schema": TEXT}
    return {200: {"description": "The answer", "content": content}, **_errors(errors if public else (401, *errors))}


def text_answers() -> Responses:
    """The same of a public route that answers with plain text."""
    return {200: {"description": "The text"}, **_errors(())}


def _errors(statuses: tuple[int, ...]) -> Responses:
    return {
        status: {"description": MEANINGS[status], "content": {"application/json": {"schema": ERROR}}}
        for status in sorted({*ANYWHERE, *statuses})
    }
