"""The field `prediction`: text that an answer may be like, as OpenAI's clients send it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from headrace.serve.errors import RefusedError
from headrace.serve.protocol.bodies import Body

__all__ = ["read_prediction"]

FIELD = "prediction"
FORM = 'send {"type": "content", "content": text}'
PART = '{"type": "text", "text": text}'


def read_prediction(body: Body) -> str:
    """The predicted text, its parts joined as they are; empty without one. Raises `RefusedError` about `prediction`."""
    sent = body.get(FIELD)
    if sent is None:
        return ""
    _only(sent, ("type", "content"), FIELD)
    _need(sent.get("type") == "content", f'{FIELD}.type must be "content": {FORM}')
    content = sent.get("content")
    if isinstance(content, str):
        return content
    _need(isinstance(content, list), f"{FIELD}.content must be text, or a list of text parts: {FORM}")
    return "".join(_part(part, f"{FIELD}.content[{i}]") for i, part in enumerate(content or ()))


def _part(part: Any, where: str) -> str:
    _need(isinstance(part, Mapping) and part.get("type") == "text", f"{where} must be a text part: {PART}")
    _only(part, ("type", "text"), where)
    text = part.get("text")
    _need(isinstance(text, str), f"{where}.text must be text: {PART}")
    return str(text)


def _only(sent: Mapping[str, Any], names: tuple[str, ...], where: str) -> None:
    """Refuse other keys, unless they are null: clients that write out all their options send nulls."""
    for name, value in sent.items():
        shown = str(name)[:60]
        _need(name in names or value is None, f"{where} has no key {shown!r}: it may have {', '.join(names)}")


def _need(ok: bool, message: str) -> None:
    if not ok:
        raise RefusedError(message, FIELD)
