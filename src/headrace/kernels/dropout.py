"""Integers that every implementation of dropout shares."""

from __future__ import annotations

__all__ = ["dropout_bar", "signed64"]


def dropout_bar(rate: float) -> int:
    """What 31 bits of an element's hash must reach for dropout to keep it: about rate · 2³¹."""
    if not 0 <= rate < 1:
        raise ValueError(f"a dropout rate of {rate} is not in [0, 1)")
    return round(rate * 2**31)


def signed64(key: int) -> int:
    """The int64 with the bits of `key` modulo 2⁶⁴."""
    return (key + 2**63) % 2**64 - 2**63
