"""Why a request took the time it took: the plans of every step, seen with a clock that the scheduler does not have."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from headrace.engine.schedule.plan import Plan
from headrace.engine.schedule.request import Request
from headrace.engine.schedule.scheduler import Scheduler
from headrace.instance.wire import Explanation

__all__ = ["Explainer"]

STEPS = 256
"""Batch sizes remembered of a long request."""


@dataclass(slots=True)
class _Story:
    """One request (a prompt and its choices) as it was seen. Times by the clock, None until it happens."""

    arrived: float
    known: int
    """Tokens to compute before the first new one: the prompt, and what another instance had generated."""
    requests: dict[int, Request] = field(default_factory=dict)
    seated: float | None = None
    prefilled: float | None = None
    chunks: int = 0
    batch_sizes: deque[int] = field(default_factory=lambda: deque(maxlen=STEPS))


class Explainer:
    """Watches the plans of one scheduler. What it holds of a request goes with `finish`."""

    def __init__(self, scheduler: Scheduler, clock: Callable[[], float] = time.monotonic) -> None:
        self._scheduler = scheduler
        self._clock = clock
        self._stories: dict[str, _Story] = {}
        self._names: dict[int, str] = {}

    def arrived(self, name: str, request_ids: Iterable[int]) -> None:
        """A request was added: the numbers of its choices, of which those that run are with the scheduler."""
        known = self._scheduler.requests
        requests = {number: known[number] for number in request_ids if number in known}
        self._names |= dict.fromkeys(requests, name)
        self._stories[name] = _Story(self._clock(), max(r.num_tokens for r in requests.values()), requests)

    def observe(self, plan: Plan, began: float) -> tuple[int, int]:
        """A plan that was computed since `began`; returns its tokens that are of prompts, and the others.

        Call it once before the plan's results are taken, or after: requests that ended with it are known still.
        """
        now = self._clock()
        prompts = 0
        computed: dict[str, bool] = {}
        for s in plan.slices:
            story = self._story(s.request_id)
            if story is None:
                continue
            request = story.requests[s.request_id]
            end = s.start + len(s.token_ids)
            tokens = max(0, min(end, request.num_prompt_tokens) - s.start)
            prompts += tokens
            name = self._names[s.request_id]
            computed[name] = computed.get(name, False) or tokens > 0
            if story.seated is None:
                story.seated = began
            if story.prefilled is None and end >= story.known:
                story.prefilled = now
        for name, chunk in computed.items():
            self._stories[name].chunks += chunk
            self._stories[name].batch_sizes.append(len(plan.slices))
        return prompts, plan.num_tokens - prompts

    def finish(self, name: str, num_cached_tokens: int) -> Explanation:
        """What is to be said of a request that is over."""
        story, now = self._stories.pop(name), self._clock()
        for number in story.requests:
            del self._names[number]
        seated = now if story.seated is None else story.seated
        prefilled = now if story.prefilled is None else story.prefilled
        return Explanation(
            queue_time=seated - story.arrived,
            prefill_time=prefilled - seated,
            decode_time=now - prefilled,
            num_cached_tokens=num_cached_tokens,
            chunks=story.chunks,
            preemptions=sum(request.epoch for request in story.requests.values()),
            batch_sizes=list(story.batch_sizes),
        )

    def _story(self, request_id: int) -> _Story | None:
        """The story that a scheduled request is part of: a beam joins that of its search when it is first seen."""
        name = self._names.get(request_id)
        if name is None:
            beam = self._scheduler.requests.get(request_id)
            name = None if beam is None else self._names.get(beam.group_id)
            if beam is None or name is None:  # it came and went, or its client did
                return None
            self._names[request_id] = name
            self._stories[name].requests[request_id] = beam
        return self._stories[name]
