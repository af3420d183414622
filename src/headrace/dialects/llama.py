"""The format of Llama 3: the message is the call, or calls with semicolons between them.

    {"name": "get_weather", "parameters": {"city": "Paris"}}; {"name": "get_time", "parameters": {}}

A model may write `<|python_tag|>` first, also after some text. Text alone cannot begin with a brace.
"""

from __future__ import annotations

from headrace.dialects.base import Dialect

__all__ = ["LLAMA3"]

LLAMA3 = Dialect(
    name="llama3",
    opening=("<|python_tag|>",),
    between=(";",),
    key="parameters",
    bare=True,
)
