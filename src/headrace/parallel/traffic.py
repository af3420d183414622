"""Counts of what ranks exchange: messages, the papers' volume, and the bytes that were sent."""

from __future__ import annotations

from collections import Counter

__all__ = ["VOLUME", "Traffic"]

VOLUME = {"all_reduce": 2, "reduce_scatter": 1, "all_gather": 1, "gather": 1}
"""What a collective's message is multiplied by in the papers' volume (Megatron-LM §3, ZeRO §7.1)."""


class Traffic:
    """What one rank's collectives moved since `clear`.

    `messages` and `elements` are by (collective, purpose); a message is one logical collective, its elements those
    of its whole tensor. `bytes_sent` is what this rank wrote to others, however the collective was carried out.
    """

    def __init__(self) -> None:
        self.messages: Counter[tuple[str, str]] = Counter()
        self.elements: Counter[tuple[str, str]] = Counter()
        self.bytes_sent = 0
        self.seconds = 0.0
        """Time that this rank spent in collectives, waiting for others included."""

    def count(self, collective: str, purpose: str, elements: int) -> None:
        """One collective over a tensor of so many elements."""
        self.messages[collective, purpose] += 1
        self.elements[collective, purpose] += elements

    def volume(self, purpose: str | None = None) -> int:
        """Elements by the papers' measure: an all-reduce is twice its message, the others once."""
        return sum(VOLUME[kind] * n for (kind, why), n in self.elements.items() if purpose in (None, why))

    def clear(self) -> None:
        """Set all counts to 0."""
        self.messages.clear()
        self.elements.clear()
        self.bytes_sent = 0
        self.seconds = 0.0
