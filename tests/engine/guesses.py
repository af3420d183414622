"""Speculation without a model: a speculator that guesses, requests of every kind, and runs that check every plan.

`verify` is the claim of the whole room: with drafts, each request has what it has alone without them.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from engine.test_masks import copy_of, toys
from engine.test_scheduler import EOS, VOCAB, no_leak
from headrace.cache.manager import BlockMoves
from headrace.config import CacheConfig
from headrace.engine.engine import Engine
from headrace.engine.run.null_runner import NullRunner
from headrace.engine.schedule.config import SchedulerConfig
from headrace.engine.schedule.constraint import Constraint
from headrace.engine.schedule.plan import PREVIOUS, Plan
from headrace.engine.schedule.request import Request, RequestUpdate
from headrace.engine.schedule.sampling import SamplingParams
from headrace.engine.schedule.scheduler import Scheduler
from headrace.engine.schedule.speculator import Candidate

__all__ = ["CONTEXT", "KINDS", "Guesses", "alone", "anything", "drive", "make", "plain", "record", "run_both"]

CONTEXT, SIZE = 100, 4
KINDS = ("right", "wrong", "partly", "random", "short", "none")


class Guesses:
    """Drafts of random number and truth, from known `outputs`. It asserts what the engine owes a speculator."""

    def __init__(
        self, seed: int, outputs: dict[int, list[int]], kinds: Sequence[str] = KINDS, longest: int = 7
    ) -> None:
        self.draw = random.Random(seed)
        self.outputs, self.kinds, self.longest = outputs, kinds, longest
        self.proposed: dict[int, tuple[int, list[int]]] = {}
        """By request: its known tokens when its drafts were proposed, and these."""
        self.steps: deque[tuple[int, set[int]]] = deque()
        """Of the steps in flight: rows, and the requests with drafts."""
        self.finished: set[int] = set()
        self.learned = self.accepted = 0
        self._drafted: set[int] = set()
        self._ended: set[int] = set()

    def wants(self, request: Request) -> bool:
        return not request.is_beam and request.request_id % 8 != 7

    def choose(self, candidates: Sequence[Candidate], rows: int, spare: int) -> list[int]:
        assert candidates and rows >= len(candidates) and spare > 0
        counts, left = [], spare
        for request, most in ((c.request, c.most) for c in candidates):
            assert most >= 1 and request.num_pending == 1 and not request.closing and not request.is_beam
            assert request.num_scheduled == request.num_tokens and request.request_id not in self.finished
            counts.append(self.draw.randint(0, min(most, left, self.longest)) if self.wants(request) else 0)
            left -= counts[-1]
        return counts

    def propose(self, candidates: Sequence[Candidate], counts: Sequence[int], moves: BlockMoves) -> list[list[int]]:
        assert isinstance(moves, BlockMoves)
        out = []
        for request, count in zip((c.request for c in candidates), counts):
            assert count >= 1 and request.num_scheduled == request.num_tokens + count <= len(request.kv.blocks) * SIZE
            drafts = self.guess(request, count)
            self.proposed[request.request_id] = (request.num_tokens, drafts)
            self._drafted.add(request.request_id)
            out.append(drafts)
        return out

    def guess(self, request: Request, count: int) -> list[int]:
        draw, at = self.draw, request.num_output_tokens
        truth = self.outputs[request.request_id][at : at + count]
        truth += [draw.randrange(VOCAB) for _ in range(count - len(truth))]
        kind = draw.choice(self.kinds)
        if kind == "wrong":
            truth[0] = (truth[0] + 1) % VOCAB
        elif kind == "partly":
            i = draw.randrange(count)
            truth[i] = draw.randrange(VOCAB)
        elif kind == "random":
            truth = [draw.randrange(VOCAB) for _ in truth]
        elif kind == "short":
            truth = truth[: draw.randint(0, count)]
        return [] if kind == "none" else truth

    def began(self, rows: int) -> None:
        self.steps.append((rows, self._drafted))
        self._drafted = set()

    def learn(self, request: Request, drafts: Sequence[int], accepted: int) -> None:
        assert request.request_id not in self.finished
        self.learned += 1
        self.accepted += accepted
        if drafts:
            known, proposed = self.proposed.pop(request.request_id)
            assert request.request_id in self._ended, "drafts of another step than that whose result is taken"
            assert list(drafts) == proposed[: len(drafts)]
            assert list(drafts[:accepted]) == request.token_ids[known : known + accepted]

    def waits(self, request: Request) -> bool:
        return self.wants(request) and self.draw.random() < 0.8

    def ended(self, rows: int) -> None:
        began, self._ended = self.steps.popleft()
        assert began == rows

    def finish(self, request: Request) -> None:
        assert request.request_id not in self.finished
        self.finished.add(request.request_id)


def make(
    speculator: Any = None,
    *,
    blocks: int = 300,
    caching: bool = True,
    slots: int = 0,
    **options: Any,
) -> Engine[NullRunner]:
    """An engine whose every plan is checked."""
    cache = CacheConfig(block_size=SIZE, num_blocks=blocks, prefix_caching=caching)
    config = SchedulerConfig(**options)
    scheduler = Scheduler(config, cache, CONTEXT, (EOS,), slots, masks=toys, speculator=speculator)
    runner = NullRunner(blocks, SIZE, slots, VOCAB, check=True)
    engine = Engine(scheduler, runner, config.queue_depth)
    submit = runner.submit

    def checked(plan: Plan) -> Any:
        check_plan(scheduler, config, plan)
        return submit(plan)

    runner.submit = checked  # type: ignore[method-assign]
    return engine


def check_plan(scheduler: Scheduler, config: SchedulerConfig, plan: Plan) -> None:
    """A slice computes known tokens, then at most one of the step before, or drafts within every limit."""
    assert all(request.remaining() >= 0 for request in scheduler.running)
    assert not any(s.drafts for s in plan.slices) or plan.num_tokens <= config.max_num_batched_tokens
    for s in plan.slices:
        request, end = scheduler.requests[s.request_id], s.start + len(s.token_ids)
        known = len(request.token_ids)
        assert s.start <= known, "a slice starts behind a token that is not known"
        ahead = s.token_ids[: known - s.start]
        assert ahead == request.token_ids[s.start : s.start + len(ahead)]
        assert s.token_ids[known - s.start :] in ([], [PREVIOUS], s.drafts or [])
        assert len(s.edits) in (0, s.samples) and end <= len(s.block_table) * SIZE
        if s.drafts:
            assert request.spec_token_ids == s.drafts and end == known + len(s.drafts)
            assert end <= (request.reserve or CONTEXT) and end - request.num_prompt_tokens < request.max_output
            assert not set(s.drafts) & set(request.stop_ids)


def anything(seed: int, count: int = 8, first: int = 0) -> list[Request]:
    """Requests of every kind over shared prefixes; some have siblings."""
    draw = random.Random(seed)
    stem = [draw.randrange(VOCAB) for _ in range(30)]
    requests: list[Request] = []
    for i in range(count):
        most = draw.choice([None, *[draw.randrange(1, 40) for _ in range(5)]])
        constraint = Constraint.regex(str(draw.randrange(1000))) if draw.random() < 0.4 else None
        few = draw.random() < 0.2 and constraint is None
        params = SamplingParams(
            max_tokens=most,
            min_tokens=draw.choice([0, 0, min(most or 9, 9)]),
            stop_token_ids=tuple(draw.sample(range(VOCAB), draw.choice([0, 0, 5]))),
            ignore_eos=draw.random() < 0.3,
            logprobs=draw.choice([None, None, 0, 2]),
            prompt_logprobs=draw.choice([None, None, None, 1]),
            constraint=constraint,
            jump_forward=draw.random() < 0.7,
            allowed_token_ids=tuple(draw.sample(range(VOCAB), 8)) if few else None,
            repetition_penalty=draw.choice([1.0, 1.0, 1.5]),
            presence_penalty=draw.choice([0.0, 0.0, 0.5]),
            frequency_penalty=draw.choice([0.0, 0.0, 0.25]),
            logit_bias=draw.choice([{}, {}, {5: 2.0, 8: -1.0}]),
        )
        prompt = stem[: draw.randrange(30)] + [draw.randrange(VOCAB) for _ in range(draw.randrange(1, 12))]
        request = Request(first + i, prompt, params, seed=draw.randrange(9), priority=draw.randrange(3))
        requests.append(request)
        if draw.random() < 0.2:
            requests += [request.sibling(first + 1000 * k + i, k) for k in (1, 2)]
    return requests


def plain(request_id: int, prompt: Sequence[int], tokens: int, **more: Any) -> Request:
    """A request that ends by length alone."""
    return Request(request_id, prompt, SamplingParams(max_tokens=tokens, ignore_eos=True, **more))


def drive(engine: Engine[NullRunner], requests: Iterable[Request], draw: random.Random) -> Iterator[RequestUpdate]:
    """Every update until the end, with requests that arrive at random times, under integrity checks."""
    coming = deque(requests)
    for _ in range(4000):
        while coming and (not engine.has_work or draw.random() < 0.5):
            engine.scheduler.add(coming.popleft())
        yield from engine.step()
        engine.scheduler.check_integrity()
        assert all(request.remaining() >= 0 for request in engine.scheduler.running)
        if not coming and not engine.has_work:
            return no_leak(engine.scheduler)
    raise AssertionError("the engine makes no progress")


def record(updates: Iterable[RequestUpdate]) -> dict[int, list[Any]]:
    """Tokens, log-probabilities, the prompt's scores and the end of each request."""
    out: dict[int, list[Any]] = {}
    for update in updates:
        got = out.setdefault(update.request_id, [[], [], [], None, None, False])
        assert got[3] is None, "an update after the end"
        assert 0 <= update.accepted <= update.drafted
        got[0] += update.token_ids
        got[1] += update.logprobs
        got[2] += update.scores
        got[3:] = update.finish_reason, update.stop_reason, update.stop_token
    return out


def alone(request: Request) -> list[Any]:
    """What a request has by itself, without drafts, in an engine where nothing is cut, cached or preempted."""
    engine = make(caching=False, max_num_batched_tokens=512)
    return record(drive(engine, [copy_of(request)], random.Random(0)))[request.request_id]


def run_both(
    seed: int, options: dict[str, Any], count: int = 8, kinds: Sequence[str] = KINDS
) -> tuple[Engine[NullRunner], list[dict[int, list[Any]]], list[dict[int, list[Any]]]]:
    """What requests have with drafts, and what they have alone; then prompts that go on from their outputs; the engine.

    Raises AssertionError where the counts of drafts are not those of the speculator.
    """
    draw = random.Random(seed)
    guesses = Guesses(seed, {}, kinds)
    engine = make(guesses, **options)
    requests = anything(seed, count)
    with_drafts, without = [], []
    for wave in range(2):
        expected = {request.request_id: alone(request) for request in requests}
        guesses.outputs.update({i: list(got[0]) for i, got in expected.items()})
        with_drafts.append(record(drive(engine, requests, draw)))
        without.append(expected)
        assert not guesses.steps and guesses.finished >= expected.keys()
        requests = [] if wave else list(followers(requests, expected, draw))
    stats = engine.scheduler.stats
    assert stats.accepted_tokens == guesses.accepted == sum(stats.accepted_at)
    return engine, with_drafts, without


def followers(requests: Sequence[Request], known: dict[int, list[Any]], draw: random.Random) -> Iterator[Request]:
    """Prompts that begin with what these requests had: all of it, or a part."""
    for request in requests:
        output = known[request.request_id][0]
        kept = output[: draw.choice([len(output), draw.randint(0, len(output))])]
        prompt = [*request.prompt_token_ids, *kept, draw.randrange(VOCAB)][: CONTEXT - 10]
        yield plain(10_000 + request.request_id, prompt, draw.randrange(1, 8))
