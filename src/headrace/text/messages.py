"""Conversations and tools in the form that chat templates expect, however a client or a file writes them.

`ChatTemplate.render` reads its arguments here, so serving and training give a template the same values:

    content     a text: text parts are joined by line breaks; null and a missing key are an empty text
    tool calls  {"function": {"name", "arguments"}} with arguments as an object; `function_call` becomes one of them
    roles       developer is system and function is tool, by the names that templates know
    nulls       a key of a message whose value is null is left out, and so is an empty list of tool calls
    tools       a list of objects, or None without any
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from headrace.errors import RequestError

__all__ = ["read_messages", "read_tools"]

REASONING_NAMES = ("reasoning_content", "thinking", "reasoning")
ROLES = {"developer": "system", "function": "tool"}
"""Roles of OpenAI's API that templates know by another name."""


def read_messages(messages: Any, field: str = "messages") -> list[dict[str, Any]]:
    """The messages in templates' form, as new objects. What is in that form already stays as it is.

    Raises `RequestError` whose message begins with the place of the fault, as `messages[3].content`.
    """
    if isinstance(messages, (str, bytes, Mapping)) or not isinstance(messages, Sequence) or not messages:
        raise _wrong(field, "must be a list of messages, at least one, each an object with role and content")
    return [_message(message, f"{field}[{i}]") for i, message in enumerate(messages)]


def read_tools(tools: Any, field: str = "tools") -> list[dict[str, Any]] | None:
    """The tools in templates' form; None where there are none.

    The list, each of its tools and each tool's `parameters` may be JSON text. Raises `RequestError` whose message
    begins with the place of the fault, as `tools[0].function.parameters`.
    """
    found = [_tool(tool, f"{field}[{i}]") for i, tool in enumerate(_listed(tools, field, "tools"))]
    return found or None


def _message(message: Any, where: str) -> dict[str, Any]:
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
        raise _wrong(where, "must be an object with a role (a string) and content")
    kept = {key: value for key, value in message.items() if value is not None}
    role = ROLES.get(message["role"], message["role"])
    found = {**kept, "role": role, "content": _content(kept.get("content"), f"{where}.content")}
    calls = _tool_calls(found.pop("tool_calls", None), found.pop("function_call", None), where)
    if calls:
        found["tool_calls"] = calls
    reasoning = next((kept[name] for name in REASONING_NAMES if name in kept), None)
    # Templates read either name.
    return found if reasoning is None else {"thinking": reasoning, **found, "reasoning_content": reasoning}


def _content(content: Any, where: str) -> str:
    if content is None or isinstance(content, str):
        return content or ""
    if not isinstance(content, (list, tuple)):
        raise _wrong(where, f"must be text or a list of text parts, not {type(content).__name__}")
    texts = []
    for i, part in enumerate(content):
        text = part.get("text") if isinstance(part, Mapping) and part.get("type") == "text" else None
        if not isinstance(text, str):
            raise _wrong(f"{where}[{i}]", "is not a text part, and models here read only text")
        texts.append(text)
    return "\n".join(texts)


def _tool_calls(calls: Any, legacy: Any, where: str) -> list[dict[str, Any]]:
    found = [
        _tool_call(call, f"{where}.tool_calls[{i}]")
        for i, call in enumerate(_listed(calls, f"{where}.tool_calls", "calls"))
    ]
    if legacy is None:
        return found
    if found:
        raise _wrong(where, "has tool_calls and function_call, its older name: leave one out")
    return [{"type": "function", "function": _function(legacy, f"{where}.function_call")}]


def _tool_call(call: Any, where: str) -> dict[str, Any]:
    if not isinstance(call, Mapping):
        raise _wrong(where, f"must be an object, not {type(call).__name__}")
    kept = {key: value for key, value in call.items() if value is not None}
    if "function" in kept:
        return {**kept, "function": _function(kept["function"], f"{where}.function")}
    function = {key: kept.pop(key) for key in ("name", "arguments") if key in kept}
    return {"type": "function", **kept, "function": _function(function, where)}


def _function(function: Any, where: str) -> dict[str, Any]:
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise _wrong(where, "must be a function with a name (a string) and arguments")
    return {**function, "arguments": _object(function.get("arguments"), f"{where}.arguments")}


def _tool(tool: Any, where: str) -> dict[str, Any]:
    found = _object(tool, where)
    if not found:
        raise _wrong(where, "must be an object that describes a tool: it is empty")
    inner = found.get("function")
    if isinstance(inner, Mapping):
        return {**found, "function": _with_schema(inner, f"{where}.function")}
    return _with_schema(found, where)


def _with_schema(function: Mapping[str, Any], where: str) -> dict[str, Any]:
    if not isinstance(function.get("parameters"), str):
        return dict(function)
    return {**function, "parameters": _object(function["parameters"], f"{where}.parameters")}


def _object(value: Any, where: str) -> dict[str, Any]:
    """An object, or JSON text of one; null and empty text are an empty one."""
    found = _parsed(value, where, "a JSON object")
    if found is None:
        return {}
    if not isinstance(found, Mapping):
        raise _wrong(where, f"must be a JSON object, or text that holds one, not {type(found).__name__}")
    return dict(found)


def _listed(value: Any, where: str, what: str) -> Sequence[Any]:
    """A list, or JSON text of one; null and empty text are an empty one."""
    found = _parsed(value, where, "a JSON list")
    if found is None:
        return []
    if not isinstance(found, (list, tuple)):
        raise _wrong(where, f"must be a list of {what}, or JSON text that holds one, not {type(found).__name__}")
    return found


def _parsed(value: Any, where: str, what: str) -> Any:
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value, parse_constant=_no_constant) if value.strip() else None
    except (ValueError, RecursionError) as error:
        raise _wrong(where, f"must be {what}, or text that holds one: not JSON: {error}") from None


def _wrong(where: str, what: str) -> RequestError:
    """The error of a place such as messages[3].content. Its `param` is the first name, the request's field."""
    return RequestError(f"{where} {what}", where.partition("[")[0])


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON number")
