"""The format for models whose template knows no tools: the answer is the JSON of one call, and nothing else.

    {"name": "get_weather", "arguments": {"city": "Paris"}}

A tool that the request names is called by its arguments alone: {"city": "Paris"}.
"""

from __future__ import annotations

from headrace.dialects.base import Dialect

__all__ = ["PLAIN"]

PLAIN = Dialect(name="json", bare=True, named_alone=True)
