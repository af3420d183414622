"""The format of Mistral's models until version 7 of their tokenizer: one marker, then a list of calls.

    [TOOL_CALLS][{"name": "get_weather", "arguments": {"city": "Paris"}}]

Their templates take ids of nine letters and digits only.
"""

from __future__ import annotations

from headrace.dialects.base import Dialect

__all__ = ["MISTRAL"]

MISTRAL = Dialect(
    name="mistral",
    opening=("[TOOL_CALLS]", "["),
    between=(",",),
    closing=("]",),
    short_ids=True,
)
