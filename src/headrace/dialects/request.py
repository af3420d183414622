"""The fields of a request that concern tools, as this room takes them."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from headrace.dialects.base import Tool, ToolChoice
from headrace.errors import RequestError

__all__ = ["described_tools", "read_tool_choice"]

NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")
MOST = 128
"""OpenAI's limit, too."""


def described_tools(tools: Sequence[Mapping[str, Any]] | None) -> tuple[Tool, ...]:
    """The tools that `read_tools` gives, with the schemas of their arguments.

    Raises `RequestError` for what OpenAI refuses: other kinds of tools, two of one name, a name or a schema of another
    form, too many.
    """
    given = tools or ()
    if len(given) > MOST:
        raise RequestError.about("tools", "{tools} has {} tools: at most {}", len(given), MOST)
    found: dict[str, Tool] = {}
    for i, tool in enumerate(given):
        if tool.get("type", "function") != "function":
            raise RequestError.about("tools", "{tools}[{}].type is {}: only functions can be called", i, tool["type"])
        function = tool.get("function", tool)
        name = function.get("name") if isinstance(function, Mapping) else None
        if not isinstance(name, str) or not NAME.fullmatch(name):
            reason = "{tools}[{}] needs a name of 1 to 64 letters, digits, _, - and ., not {}"
            raise RequestError.about("tools", reason, i, "nothing" if name is None else repr(name))
        if name in found:
            raise RequestError.about("tools", "{tools}[{}] has the name of another tool: {}", i, name)
        found[name] = Tool(name, _schema(function.get("parameters"), i))
    return tuple(found.values())


def read_tool_choice(value: Any, tools: Sequence[Tool]) -> ToolChoice:
    """The field `tool_choice`; None: "auto" where there are tools. Raises `RequestError` for what it cannot be."""
    if value is None or value in ("auto", "none"):
        return ToolChoice("auto" if tools and value != "none" else "none")
    if value == "required":
        if not tools:
            raise RequestError.about("tool_choice", "{tool_choice} is required, but {tools} has none")
        return ToolChoice("required")
    function = value.get("function") if isinstance(value, Mapping) and value.get("type") == "function" else None
    name = function.get("name") if isinstance(function, Mapping) else None
    if not isinstance(name, str):
        form = '{"type": "function", "function": {"name": …}}'
        raise RequestError.about("tool_choice", "{tool_choice} must be none, auto, required or {}", form)
    if name not in [tool.name for tool in tools]:
        raise RequestError.about("tool_choice", "{tool_choice} names {}, which is not one of {tools}", name)
    return ToolChoice("required", name)


def _schema(parameters: Any, i: int) -> str:
    """The JSON of a schema, which describes an object: of none, the empty one."""
    if parameters is None or parameters == {}:
        return json.dumps({"type": "object", "properties": {}, "additionalProperties": False})
    where = "{tools}[{}].function.parameters"
    if not isinstance(parameters, Mapping):
        raise RequestError.about("tools", where + " must be a JSON schema, an object", i)
    kind = parameters.get("type", "object")
    if kind != "object" and not (isinstance(kind, list) and "object" in kind):
        raise RequestError.about("tools", where + ' must describe an object: its type is {}, not "object"', i, kind)
    try:
        return json.dumps({**parameters, "type": "object"}, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise RequestError.about("tools", where + " is not plain JSON: {}", i, error) from None
