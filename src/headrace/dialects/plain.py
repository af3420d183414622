"""The format for chat templates without tools: the whole answer is one call as JSON.

    {"name": "get_weather", "arguments": {"city": "Paris"}}

A tool that the request names is called by its arguments alone: {"city": "Paris"}.
"""

from __future__ import annotations

from headrace.dialects.base import Dialect

__all__ = ["PLAIN"]

PLAIN = Dialect(name="json", bare=True, named_alone=True)
