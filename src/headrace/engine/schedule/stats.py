"""`SchedulerStats`: what the scheduler counts, for metrics and benchmarks."""

from __future__ import annotations

from dataclasses import dataclass, field

__all__ = ["SchedulerStats"]


@dataclass(slots=True)
class SchedulerStats:
    """Gauges of this moment and counters since the start. Tokens, blocks and steps; no clock.

    Waste in the sense of PagedAttention's figure 2 is 1 − used_slot_steps / held_slot_steps: token slots that
    requests held and did not fill, summed over steps. A shared block counts once for each request.
    """

    num_running: int = 0
    num_waiting: int = 0
    kv_usage: float = 0.0
    """Share of the pool's blocks that requests hold."""
    held_slots: int = 0
    used_slots: int = 0
    physical_blocks: int = 0
    """Blocks that requests hold, a shared one counted once."""
    cached_blocks: int = 0
    """Blocks that only the prefix tree keeps."""
    steps: int = 0
    scheduled_tokens: int = 0
    generated_tokens: int = 0
    forced_tokens: int = 0
    """Output tokens about which a mask left no choice: they were not sampled."""
    draft_steps: int = 0
    """Times that drafts of a request were verified."""
    drafted_tokens: int = 0
    accepted_tokens: int = 0
    """Drafts that were verified, and those that became output."""
    accepted_at: list[int] = field(default_factory=list)
    """Accepted drafts by their place among the drafts of a step."""
    prompt_tokens: int = 0
    """Prompt tokens of admitted requests."""
    preemptions: int = 0
    swapped_blocks: int = 0
    """Blocks moved to the host and back."""
    copied_blocks: int = 0
    """Copy-on-write."""
    prefix_queries: int = 0
    """Tokens looked up in the prefix tree at first admission."""
    prefix_hits: int = 0
    """Of these, tokens found."""
    prefix_waits: int = 0
    """Steps that requests waited for a prefix being computed by another."""
    discarded_tokens: int = 0
    """Tokens computed for requests that had stopped meanwhile."""
    held_slot_steps: int = 0
    used_slot_steps: int = 0
    finished: dict[str, int] = field(default_factory=lambda: {"stop": 0, "length": 0, "abort": 0, "error": 0})
    """Finished requests by reason."""

    def count_drafts(self, drafted: int, accepted: int) -> None:
        """Count the drafts of one request in one step."""
        self.draft_steps += 1
        self.drafted_tokens += drafted
        self.accepted_tokens += accepted
        self.accepted_at += [0] * (drafted - len(self.accepted_at))
        for place in range(accepted):
            self.accepted_at[place] += 1
