"""`template_variables`: which of a caller's variables a chat template gets."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from headrace.errors import RequestError
from headrace.text.chat import ChatTemplate

__all__ = ["template_variables"]

SWITCHES = ("enable_thinking", "thinking")
"""Variables that switch thinking on and off, by Qwen's and DeepSeek's names."""
NO_THINKING = {**dict.fromkeys(SWITCHES, False), "reasoning_effort": "none"}
"""Values that ask for no thinking: nothing, from a template that has none."""


def template_variables(template: ChatTemplate, given: Mapping[str, tuple[str, Any]]) -> dict[str, Any]:
    """The values of a template's variables. `given` has each with the request field that it came from.

    Raises `RequestError` for a variable that the template does not use, unless its value asks for nothing.
    """
    variables = {name: value for name, (_, value) in given.items() if template.uses(name)}
    for name, (field, value) in given.items():
        if name in variables or value is None:
            continue
        if name not in NO_THINKING or value != NO_THINKING[name]:
            raise RequestError(f"{field}: the chat template does not use {name[:60]}", field)
        # Switched off by the name that this template has for it.
        variables |= {other: False for other in SWITCHES if other not in given and template.uses(other)}
    return variables
