"""`Explainer`: where a request's time went, from the plans of every step and a clock (the scheduler has none)."""

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
"""Batch sizes kept of a long request, the latest ones."""


@dataclass(slots=True)
class _Timeline:
    """One request (a prompt and its choices). Times by the clock, None until the event happens."""

    arrived: float
    known: int
    """Tokens to compute before the first new one: the prompt, and what a previous process had generated."""
    compile_time: float
    requests: dict[int, Request] = field(default_factory=dict)
    started: float | None = None
    prefilled: float | None = None
    chunks: int = 0
    batch_sizes: deque[int] = field(default_factory=lambda: deque(maxlen=STEPS))
    gammas: deque[int] = field(default_factory=lambda: deque(maxlen=STEPS))


class Explainer:
    """Observes the plans of one scheduler. `finish` removes what is kept of a request."""

    def __init__(self, scheduler: Scheduler, clock: Callable[[], float] = time.monotonic) -> None:
        self._scheduler = scheduler
        self._clock = clock
        self._timelines: dict[str, _Timeline] = {}
        self._names: dict[int, str] = {}

    def arrived(self, name: str, request_ids: Iterable[int], compile_time: float = 0.0) -> None:
        """A request was added. `request_ids` are those of its choices; the scheduler has the unfinished ones.

        It has waited for its grammar for `compile_time` seconds.
        """
        unfinished = self._scheduler.requests
        requests = {number: unfinished[number] for number in request_ids if number in unfinished}
        self._names |= dict.fromkeys(requests, name)
        known = max(request.num_tokens for request in requests.values())
        self._timelines[name] = _Timeline(self._clock(), known, compile_time, requests)

    def observe(self, plan: Plan, began: float) -> tuple[int, int]:
        """Record a plan that was computed from `began` to now; returns its (prompt tokens, other tokens).

        Call it once a plan, before or after the scheduler's update: requests that the plan finished are still known.
        """
        now = self._clock()
        prompts = 0
        computed: dict[str, bool] = {}
        gammas: dict[str, int] = {}
        for s in plan.slices:
            timeline = self._timeline(s.request_id)
            if timeline is None:
                continue
            request = timeline.requests[s.request_id]
            end = s.start + len(s.token_ids)
            tokens = max(0, min(end, request.num_prompt_tokens) - s.start)
            prompts += tokens
            name = self._names[s.request_id]
            computed[name] = computed.get(name, False) or tokens > 0
            gammas[name] = max(gammas.get(name, 0), len(s.drafts))
            if timeline.started is None:
                timeline.started = began
            if timeline.prefilled is None and end >= timeline.known:
                timeline.prefilled = now
        for name, chunk in computed.items():
            self._timelines[name].chunks += chunk
            self._timelines[name].batch_sizes.append(len(plan.slices))
            self._timelines[name].gammas.append(gammas[name])
        return prompts, plan.num_tokens - prompts

    def finish(self, name: str, num_cached_tokens: int) -> Explanation:
        """The explanation of a request that ended."""
        timeline, now = self._timelines.pop(name), self._clock()
        for number in timeline.requests:
            del self._names[number]
        started = now if timeline.started is None else timeline.started
        prefilled = now if timeline.prefilled is None else timeline.prefilled
        return Explanation(
            queue_time=started - timeline.arrived,
            prefill_time=prefilled - started,
            decode_time=now - prefilled,
            num_cached_tokens=num_cached_tokens,
            chunks=timeline.chunks,
            preemptions=sum(request.epoch for request in timeline.requests.values()),
            compile_time=timeline.compile_time,
            forced_tokens=sum(request.forced_tokens for request in timeline.requests.values()),
            drafted_tokens=sum(request.drafted_tokens for request in timeline.requests.values()),
            accepted_tokens=sum(request.accepted_tokens for request in timeline.requests.values()),
            batch_sizes=list(timeline.batch_sizes),
            gammas=list(timeline.gammas) if any(timeline.gammas) else [],
        )

    def _timeline(self, request_id: int) -> _Timeline | None:
        """The timeline of a scheduled request. A beam is added to its search's when it is first seen."""
        name = self._names.get(request_id)
        if name is None:
            beam = self._scheduler.requests.get(request_id)
            name = None if beam is None else self._names.get(beam.group_id)
            if beam is None or name is None:  # the beam was dropped before it was seen, or its request was aborted
                return None
            self._names[request_id] = name
            self._timelines[name].requests[request_id] = beam
        return self._timelines[name]
