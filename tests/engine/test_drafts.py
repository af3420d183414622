"""Drafts change how many steps an output takes, and never what it is; each mistake here shows."""

from __future__ import annotations

import copy
import itertools
import random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.guesses import CONTEXT, KINDS, Guesses, alone, anything, drive, make, plain, record, run_both
from engine.test_masks import ToyMask, copy_of
from engine.test_scheduler import AXES, VOCAB, no_leak
from headrace.engine.schedule.constraint import Constraint
from headrace.engine.schedule.drafting import Drafting
from headrace.engine.schedule.edits import EditState
from headrace.engine.schedule.pool import RequestPool
from headrace.engine.schedule.request import Request
from headrace.engine.schedule.sampling import SamplingParams

NAMES = ("policy", "batching", "reserve", "preemption", "queue_depth", "max_num_batched_tokens", "blocks", "caching")
OPTIONS = st.fixed_dictionaries(
    {name: st.sampled_from(axis) for name, axis in zip(NAMES, AXES)}
    | {"jump_forward": st.sampled_from(["together", "stepwise"]), "slots": st.sampled_from([0, 20])}
)
TIGHT: list[dict[str, Any]] = [
    {"blocks": 26, "queue_depth": 2},
    {"blocks": 26, "preemption": "swap", "slots": 20, "max_num_batched_tokens": 24},
    {"reserve": "pow2", "blocks": 60},
    {},
]


@settings(max_examples=45)
@given(st.integers(0, 10**6), OPTIONS)
def test_requests_with_drafts_have_what_they_have_alone_without(seed, options):
    """Tokens, log-probabilities, scores and ends; and so do later prompts that go on from their outputs."""
    _, got, expected = run_both(seed, options)
    assert got == expected


@pytest.mark.parametrize("options", TIGHT, ids=str)
def test_the_property_is_about_drafts_preemptions_and_cached_prefixes(options):
    total: dict[str, int] = {}
    for seed in range(4):
        engine, got, expected = run_both(seed, options, 12)
        assert got == expected
        stats = engine.scheduler.stats
        for name in ("drafted_tokens", "accepted_tokens", "preemptions", "prefix_hits", "forced_tokens"):
            total[name] = total.get(name, 0) + getattr(stats, name)
    assert total["drafted_tokens"] > total["accepted_tokens"] + 100 > 200
    assert total["forced_tokens"] > 20 and total["prefix_hits"] > 100
    assert (total["preemptions"] > 2) == (options.get("blocks") == 26)


@settings(max_examples=20)
@given(st.integers(0, 10**6), st.sampled_from([1, 2]), st.sampled_from([26, 60]), st.sampled_from([0, 20]))
def test_aborts_and_late_stops_leave_the_others_and_the_cache_right(seed, depth, blocks, slots):
    draw = random.Random(seed)
    requests = anything(seed, 8)
    expected = {request.request_id: alone(request) for request in requests}
    guesses = Guesses(seed, {i: list(got[0]) for i, got in expected.items()})
    engine = make(guesses, blocks=blocks, slots=slots, preemption="swap", queue_depth=depth)
    given_: dict[int, int] = dict.fromkeys(expected, 0)
    updates, ended, kept = [], set(), []
    for update in drive(engine, requests, draw):
        updates.append(update)
        given_[update.request_id] += len(update.token_ids)
        victims = sorted(engine.scheduler.requests)
        if victims and draw.random() < 0.1:
            victim = draw.choice(victims)
            if given_[victim] and victim in engine.scheduler.requests:
                ended.add(victim)
                kept.append((victim, given_[victim] // 2))
                engine.scheduler.finish(victim, "stop", "text", keep_tokens=given_[victim] // 2)
            engine.scheduler.check_integrity()
    got = record(updates)
    for i, one in expected.items():
        assert got.get(i, [[]])[0] == one[0][: len(got.get(i, [[]])[0])] if i in ended else got[i] == one
    prompts = {request.request_id: request.prompt_token_ids for request in requests}
    later = [plain(9000 + i, [*prompts[i], *expected[i][0][:keep], 7], 5) for i, keep in kept]
    guesses.outputs.update({request.request_id: alone(request)[0] for request in later})
    assert record(drive(engine, later, draw)) == {request.request_id: alone(request) for request in later}


# ---- what drafts may not take


class All(Guesses):
    """Always asks for all the drafts that there is room for."""

    def choose(self, candidates, rows, spare):
        counts = []
        for candidate in candidates:
            counts.append(min(candidate.most, spare))
            spare -= counts[-1]
        return counts


def without_drafts(plan):
    return [
        (s.request_id, s.start, s.token_ids[: len(s.token_ids) - len(s.drafts)], len(s.targets) - len(s.drafts))
        for s in plan.slices
    ]


@pytest.mark.parametrize("batching", AXES[1])
@pytest.mark.parametrize("reserve", ["none", "oracle"])
@pytest.mark.parametrize("depth", [1, 2])
def test_a_plan_with_drafts_is_the_plan_without_them_and_drafts(batching, reserve, depth):
    """Each plan against that of a copy of the scheduler which drafts nothing: a full step cuts drafts alone."""
    drafted = cut = crowded = 0
    for seed in range(2):
        requests = anything(seed, 10)
        outputs = {request.request_id: list(alone(request)[0]) for request in requests}
        options = {"batching": batching, "reserve": reserve, "queue_depth": depth, "max_num_batched_tokens": 9}
        engine = make(All(seed, outputs), blocks=32, **options)
        scheduler = engine.scheduler
        schedule = scheduler.schedule

        def compared(scheduler=scheduler, schedule=schedule):
            nonlocal drafted, cut, crowded
            crowded += scheduler.cache.pool.num_free < 4 and any(r.spec_token_ids for r in scheduler.running)
            twin = copy.deepcopy(scheduler)
            twin._drafting = None
            for request in twin.running:  # those in flight take nothing from this plan either
                if request.spec_token_ids:
                    twin.pool._rewind(request, request.num_tokens)
            del twin.__dict__["schedule"]
            bare, plan = twin.schedule(), schedule()
            assert without_drafts(plan) == without_drafts(bare)
            assert plan.preempted == bare.preempted
            for moves, others in zip(
                (plan.swap_out, plan.swap_in, plan.copies), (bare.swap_out, bare.swap_in, bare.copies)
            ):
                assert [source for source, _ in moves] == [source for source, _ in others]
            assert scheduler.cache.tree.num_evictable == twin.cache.tree.num_evictable
            assert scheduler.cache.tree.num_nodes == twin.cache.tree.num_nodes
            drafted += sum(len(s.drafts) for s in plan.slices)
            cut += plan.num_tokens == 9
            return plan

        scheduler.schedule = compared  # type: ignore[method-assign]
        record(drive(engine, requests, random.Random(seed)))
    assert drafted > 30 and cut > 3 and (depth == 1 or crowded)


def step(engine):
    """One step; its plan."""
    plan = engine.scheduler.schedule()
    engine.scheduler.update(plan, engine.runner.result(engine.runner.submit(plan)))
    engine.scheduler.check_integrity()
    return plan


def test_a_full_step_drafts_nothing_and_keeps_nothing_for_the_next():
    first, long = plain(0, [1, 2, 3], 30), plain(1, list(range(20, 60)), 3)
    guesses = All(0, {0: alone(first)[0], 1: alone(long)[0]}, ["right"])
    engine = make(guesses, max_num_batched_tokens=8)
    engine.scheduler.add(first)
    assert [len(s.drafts) for s in step(engine).slices] == [5]
    engine.scheduler.add(long)
    for _ in range(5):  # 7 tokens of the long prompt a step, beside the one decode
        plan = step(engine)
        assert [(s.request_id, len(s.token_ids), s.drafts) for s in plan.slices] == [(0, 1, []), (1, 7, [])]
        assert first.spec_token_ids == [] and first.num_scheduled == first.num_tokens - 1
    assert [len(s.drafts) for s in step(engine).slices] == [2, 0]  # the rest of it leaves two tokens


@pytest.mark.parametrize("reserve,tokens,first", [("oracle", 9, 8), ("pow2", 9, 8), ("max", 9, 8), ("none", 9, 8)])
def test_drafts_stay_within_the_output_and_the_reservation(reserve, tokens, first):
    request = plain(0, list(range(10, 20)), tokens)
    engine = make(All(0, {0: alone(request)[0]}, ["right"]), reserve=reserve)
    engine.scheduler.add(request)
    assert len(step(engine).slices[0].drafts) == first
    assert request.finish_reason == "length" and request.output_token_ids == alone(request)[0]
    no_leak(engine.scheduler)


def test_two_steps_in_flight_leave_a_request_that_drafts_nothing_once_to_be_asked_again():
    request = plain(0, [1, 2, 3], 40)
    drafts = iter([[], [], [], *([[1] * 3] * 100)])

    class Later(All):
        def waits(self, request):
            return self.draw.random() < 0.5

        def guess(self, request, count):
            return next(drafts)[:count]

    engine = make(Later(0, {}), queue_depth=2)
    got = record(drive(engine, [copy_of(request)], random.Random(0)))
    assert got[0] == alone(request) and engine.scheduler.stats.drafted_tokens > 10


class Never(All):
    """Offers to draft, and never waits for a token to draft behind."""

    def waits(self, request):
        return False


def test_two_steps_in_flight_stay_so_where_nobody_waits_to_draft():
    request = plain(0, [1, 2, 3], 40)
    engine = make(guesses := Never(0, {0: alone(request)[0]}, ["none"]), queue_depth=2)
    engine.scheduler.add(copy_of(request))
    depths = []
    while engine.has_work:
        engine.step()
        depths.append(engine.scheduler.in_flight)
    assert guesses.learned == 40 and depths.count(1) >= 37


def test_drafts_stay_within_the_context():
    request = plain(0, list(range(90)), None)  # type: ignore[arg-type]
    engine = make(All(0, {0: alone(request)[0]}, ["right"]))
    engine.scheduler.add(request)
    plan = step(engine)
    assert plan.slices[0].start + plan.num_tokens == CONTEXT - 1 and request.num_tokens == CONTEXT


def test_drafts_take_free_blocks_alone():
    """Not those of a cached prefix, though it could be evicted, nor those that an earlier draft took."""
    engine = make(guesses := All(0, {}, ["right"]), blocks=26)
    cached = plain(5, list(range(40, 80)), 1)
    guesses.outputs[5] = alone(cached)[0]
    record(drive(engine, [cached], random.Random(0)))
    evictable = engine.scheduler.cache.tree.num_evictable
    assert evictable == 10 and engine.scheduler.cache.pool.num_free == 15
    requests = [plain(i, [i, *range(i, i + 19)], 40) for i in range(3)]
    guesses.outputs.update({r.request_id: alone(r)[0] for r in requests})
    for request in requests:
        engine.scheduler.add(request)
    plan = engine.scheduler.schedule()
    assert [len(s.drafts) for s in plan.slices] == [0, 0, 0] and engine.scheduler.cache.pool.num_free == 0
    assert engine.scheduler.cache.tree.num_evictable == evictable and not plan.preempted


# ---- what is counted


def test_drafts_are_counted_by_step_request_and_place():
    request = plain(0, [1, 2, 3], 12)
    truth = alone(request)[0]
    script = [[truth[0], truth[1], (truth[2] + 1) % VOCAB], [truth[3], truth[4]], [(truth[6] + 1) % VOCAB] * 4, []]

    class Script(Guesses):
        def choose(self, candidates, rows, spare):
            return [min(c.most, 4) for c in candidates]

        def guess(self, request, count):
            return script.pop(0)[:count] if script else []

    engine = make(Script(0, {}))
    updates = list(drive(engine, [request], random.Random(0)))
    assert [(u.drafted, u.accepted, len(u.token_ids)) for u in updates[:4]] == [
        (3, 2, 3),
        (2, 2, 3),
        (4, 0, 1),
        (0, 0, 1),
    ]
    stats = engine.scheduler.stats
    assert (stats.draft_steps, stats.drafted_tokens, stats.accepted_tokens) == (3, 9, 4)
    assert stats.accepted_at == [2, 2, 0, 0]
    assert (request.drafted_tokens, request.accepted_tokens) == (9, 4)
    assert stats.generated_tokens == 12 and record(updates)[0][0] == truth


def test_right_drafts_save_steps_and_wrong_ones_cost_none():
    request = plain(0, [1, 2, 3], 40)
    truth, steps = alone(request)[0], {}
    for kind in (*KINDS[:2], None):
        engine = make(All(0, {0: truth}, [kind]) if kind else None, max_num_batched_tokens=5)
        assert record(drive(engine, [copy_of(request)], random.Random(0)))[0][0] == truth
        steps[kind] = engine.scheduler.stats.steps
    assert steps["right"] <= 9 < 40 == steps["wrong"] == steps[None]


def test_drafts_may_be_forced_tokens_and_every_record_comes_once():
    """With log-probabilities, forced tokens are computed again for their scores, whatever was drafted."""
    seen = 0
    for key in range(60):
        params = SamplingParams(max_tokens=30, logprobs=1, constraint=Constraint.regex(str(key)))
        request = Request(0, [1, 2, 3], params)
        expected = alone(request)
        engine = make(All(key, {0: list(expected[0])}, ["right"]))
        got = record(drive(engine, [copy_of(request)], random.Random(0)))[0]
        assert got == expected and [r.token_id for r in got[1]] == got[0]
        seen += engine.scheduler.stats.accepted_tokens > 0
    assert seen > 20


# ---- mistakes, each of which the property shows


def blind_acceptance(patch):
    """Every row's token counts."""

    def absorb(self, request, sampled, drafts):
        count = 0
        for token in sampled:
            if not request.closing:
                self._append(request, token)
                count += 1
        return count

    patch.setattr(RequestPool, "_absorb", absorb)


def kept_when_ended(patch):
    """A request that ends keeps the KV of drafts that were replaced, and its blocks enter the tree."""
    rewind = RequestPool._rewind
    patch.setattr(RequestPool, "_rewind", lambda self, r, n: None if r.closing == "stop" else rewind(self, r, n))


def kept_always(patch):
    """Rejected drafts keep their KV."""
    patch.setattr(RequestPool, "_rewind", lambda self, request, tokens: None)


def edits_that_ignore_drafts(patch):
    """Every row has the edits of the first one."""
    patch.setattr(EditState, "behind", lambda self, output, drafts: [self.current(output)] * len(drafts))


def mask_behind_the_drafts(patch):
    """A mask stays behind the drafts that its rows were filled for."""
    patch.setattr(ToyMask, "fork", lambda self: self)


def mask_of_the_first_row(patch):
    """Every row has the mask of the first one."""

    def fill(s, words_NW):
        s.mask.fill(words_NW[0])
        words_NW[1:] = words_NW[0]

    patch.setattr("headrace.engine.run.null_runner.fill_rows", fill)


def without(name: str, value: Any, method: Any) -> Any:
    """A method of a pool or a `Drafting` for which a field of its request has another value."""

    def changed(self, request, *rest):
        kept = getattr(request, name)
        object.__setattr__(request, name, value(kept))
        try:
            return method(self, request, *rest)
        finally:
            object.__setattr__(request, name, kept)

    return changed


def planned_behind_drafts(patch):
    """The next token is planned before it is known how many drafts are right."""
    whole = Request.remaining
    remaining = without("spec_token_ids", lambda drafts: [], lambda self, request: whole(request))
    patch.setattr(Request, "remaining", lambda self: remaining(None, self))


def lost_reservation(patch):
    """What is taken back from drafts leaves the reservation."""
    patch.setattr(RequestPool, "_rewind", lambda self, request, tokens: self.cache.rewind(request.kv, tokens))


def past_the_output(patch):
    """Drafts are granted though the output has no room for them."""
    room = Drafting._room
    more = without("max_output", lambda most: most + 2, lambda self, request, grant: room(self, grant))
    patch.setattr(Drafting, "_room", lambda self, grant: more(self, grant.request, grant))


def drafts_that_end_the_output(patch):
    """An end token is drafted, and what follows it."""
    draft = RequestPool.draft
    blind = without("stop_ids", lambda ids: {}, lambda self, request, *rest: draft(self, *rest))
    patch.setattr(RequestPool, "draft", lambda self, i, *rest: blind(self, self.grants[i].request, i, *rest))


def forced_tokens_without_scores(patch):
    """Drafts that are forced tokens count as scored."""
    absorb = RequestPool._absorb

    def ignoring(self, request, sampled, drafts):
        count = absorb(self, request, sampled, drafts)
        if drafts and request.num_forced:
            request.num_scored = len(request.token_ids) - 1
        return count

    patch.setattr(RequestPool, "_absorb", ignoring)


def stuck_at_a_dead_end(patch):
    """All new tokens keep their KV though the last one's row has sampled nothing that counts."""
    settle = RequestPool._settle

    def whole(self, request, drafts, known, update):
        settle(self, request, drafts, known, update)
        if drafts and not request.closing and request.token_ids[known:] == list(drafts[: request.num_tokens - known]):
            self.cache.grow(request.kv, request.num_tokens)

    patch.setattr(RequestPool, "_settle", whole)


MUTANTS = [
    blind_acceptance,
    kept_when_ended,
    kept_always,
    edits_that_ignore_drafts,
    mask_behind_the_drafts,
    mask_of_the_first_row,
    planned_behind_drafts,
    lost_reservation,
    past_the_output,
    drafts_that_end_the_output,
    forced_tokens_without_scores,
    stuck_at_a_dead_end,
]


@pytest.mark.parametrize("mistake", MUTANTS, ids=lambda mistake: mistake.__name__)
def test_a_mistake_is_noticed(mistake, monkeypatch):
    mistake(monkeypatch)
    with pytest.raises((AssertionError, IndexError, KeyError)):
        for seed in range(40):
            _, got, expected = run_both(seed, TIGHT[seed % len(TIGHT)])
            assert got == expected


def ended_on_a_replaced_draft():
    """Later prompts over the outputs of requests that end on the token which replaces a draft, at every place."""
    for length, last in itertools.product(range(9, 13), range(1, 6)):
        prompt = list(range(10, 10 + length))
        truth = alone(plain(0, prompt, 9))[0]
        params = SamplingParams(max_tokens=9, ignore_eos=True, stop_token_ids=(truth[last],))
        known = truth[: truth.index(truth[last]) + 1]
        drafts = [*known[:-1], (known[-1] + 1) % VOCAB, 5]
        engine = make(All(0, {0: drafts, 1: []}, ["right"]))
        ended = record(drive(engine, [Request(0, prompt, params)], random.Random(0)))[0]
        assert ended[0] == known and ended[3] == "stop"
        later = plain(1, [*prompt, *known, 7], 3)
        yield record(drive(engine, [later], random.Random(0)))[1], alone(later)


def test_a_request_that_ends_on_a_replaced_draft_leaves_no_trace_of_it():
    for got, expected in ended_on_a_replaced_draft():
        assert got == expected


def test_a_trace_of_a_replaced_draft_is_noticed(monkeypatch):
    kept_when_ended(monkeypatch)
    assert any(got != expected for got, expected in ended_on_a_replaced_draft())
