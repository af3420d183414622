"""The format of Hermes and Qwen: each call between two tags, after any text.

<tool_call>
{"name": "get_weather", "arguments": {"city": "Paris"}}
</tool_call>
"""

from __future__ import annotations

from headrace.dialects.base import Dialect

__all__ = ["HERMES"]

HERMES = Dialect(
    name="hermes",
    opening=("<tool_call>",),
    between=("</tool_call>", "<tool_call>"),
    closing=("</tool_call>",),
)
