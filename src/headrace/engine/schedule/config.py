"""`SchedulerConfig`: the options of the scheduler."""

from __future__ import annotations

from dataclasses import dataclass

from headrace.config import one_of, require
from headrace.engine.schedule.batching import BATCHING
from headrace.engine.schedule.policies import POLICIES

__all__ = ["JUMPS", "PREEMPTION", "RESERVE", "SchedulerConfig"]

RESERVE = ("none", "max", "pow2", "oracle")
PREEMPTION = ("recompute", "swap")
JUMPS = ("together", "stepwise")


@dataclass(frozen=True, slots=True)
class SchedulerConfig:
    """Which request runs next (`policy`), how a step is filled (`batching`), what admission reserves (`reserve`).

    `reserve` other than "none" imitates the contiguous allocators that the PagedAttention paper compares with.
    `queue_depth`: plans that may be in flight. `lpm_patience`: steps for which longest-prefix-match may let others
    overtake a waiting request. `prefix_patience`: steps for which a request waits for a prefix that another request
    is computing. `jump_forward`: whether forced tokens are computed together or one in a step.
    """

    policy: str = "fcfs"
    batching: str = "sarathi"
    reserve: str = "none"
    preemption: str = "recompute"
    max_num_batched_tokens: int = 512
    max_num_seqs: int = 64
    queue_depth: int = 1
    lpm_patience: int = 64
    prefix_patience: int = 256
    jump_forward: str = "together"

    def __post_init__(self) -> None:
        one_of("scheduling_policy", self.policy, tuple(POLICIES))
        one_of("batching", self.batching, tuple(BATCHING))
        one_of("reserve", self.reserve, RESERVE)
        one_of("preemption", self.preemption, PREEMPTION)
        one_of("jump_forward", self.jump_forward, JUMPS)
        for name in ("max_num_batched_tokens", "max_num_seqs", "queue_depth"):
            require(getattr(self, name) >= 1, f"{name}={getattr(self, name)} must be at least 1")
        for name in ("lpm_patience", "prefix_patience"):
            require(getattr(self, name) >= 0, f"{name}={getattr(self, name)} must not be negative")
