"""The scheduler with a null runner: whatever the policy, a request's tokens are those it has alone."""

import copy
import itertools
import random
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headrace.cache.key import CacheKey
from headrace.config import CacheConfig
from headrace.engine.engine import Engine
from headrace.engine.run.null_runner import NullRunner
from headrace.engine.schedule.batching import Sarathi
from headrace.engine.schedule.config import SchedulerConfig
from headrace.engine.schedule.request import Request
from headrace.engine.schedule.sampling import SamplingParams
from headrace.engine.schedule.scheduler import Scheduler
from headrace.errors import ConfigError, RequestError

EOS = 3
VOCAB = 97


def make(num_blocks=64, block_size=4, host_slots=0, context=256, caching=True, eos=(EOS,), batcher=None, **options):
    cache = CacheConfig(block_size=block_size, num_blocks=num_blocks, prefix_caching=caching)
    scheduler = Scheduler(SchedulerConfig(**options), cache, context, eos, host_slots, batching=batcher)
    runner = NullRunner(num_blocks, block_size, host_slots, VOCAB, check=True)
    return Engine(scheduler, runner, options.get("queue_depth", 1))


def updates(engine, requests=(), limit=3000):
    """Every update until the end, under integrity checks."""
    for request in requests:
        engine.scheduler.add(request)
    for _ in range(limit):
        if not engine.has_work:
            break
        yield from engine.step()
        engine.scheduler.check_integrity()
    else:
        raise AssertionError("the engine makes no progress")
    no_leak(engine.scheduler)


def run(engine, requests=()):
    """Tokens, scores and finish reasons by request id, of a run to the end."""
    out: dict[int, tuple[list[int], list[Any], str | None]] = {}
    for update in updates(engine, requests):
        tokens, scores, _ = out.get(update.request_id, ([], [], None))
        out[update.request_id] = (tokens + update.token_ids, scores + update.scores, update.finish_reason)
    return out


def no_leak(scheduler):
    scheduler.check_integrity()
    stats = scheduler.stats
    assert (stats.num_running, stats.num_waiting, stats.held_slots, stats.used_slots) == (0, 0, 0, 0)
    assert stats.physical_blocks == 0 and scheduler.cache.host.num_owned == 0
    assert scheduler.cache.available == scheduler.cache.pool.num_usable


def alone(request, context=256, eos=(EOS,)):
    """The null model's output, without a scheduler."""
    runner, params = NullRunner(2, 1, vocab_size=VOCAB), request.params
    tokens = list(request.prompt_token_ids)
    output: list[int] = []
    last = params.max_tokens or context - len(tokens)
    ends = {*params.stop_token_ids, *(() if params.ignore_eos else eos)}
    while len(output) < last:
        state = runner.state(tokens + output)
        edits = None
        if request.edits_expected is not None:
            edits = request.edits_expected(output)
        output.append(runner.sample(state, request.seed, request.choice, edits, params.allowed_token_ids))
        if output[-1] in ends:
            return output, "stop"
    return output, "length"


class Case(Request):
    """A request that `alone` can run."""

    __slots__ = ("edits_expected",)

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.edits_expected = None


def workload(seed, count=12, longest=40):
    """Prompts that share prefixes at every possible point, with mixed output lengths."""
    rng = random.Random(seed)
    stem = [rng.randrange(VOCAB) for _ in range(longest)]
    requests = []
    for i in range(count):
        prompt = stem[: rng.randrange(longest)] + [rng.randrange(VOCAB) for _ in range(rng.randrange(1, 20))]
        params = SamplingParams(max_tokens=rng.randrange(1, 40))
        requests.append(Case(i, prompt, params, seed=rng.randrange(9), priority=rng.randrange(3)))
    return requests


def check(engine, requests):
    expected = {r.request_id: alone(r) for r in requests}
    got = run(engine, requests)
    assert {i: (tokens, reason) for i, (tokens, _, reason) in got.items()} == expected


AXES = [
    ("fcfs", "lpm", "priority"),
    ("sarathi", "orca", "static"),
    ("none", "max", "pow2", "oracle"),
    ("recompute", "swap"),
    (1, 2),
    (1, 7, 64),
    (26, 40, 300),
    (True, False),
]


def combinations():
    """Every pair of values on two axes at least once: a greedy pairwise cover of the product."""
    wanted = {(i, a, j, b) for i, j in itertools.combinations(range(len(AXES)), 2) for a in AXES[i] for b in AXES[j]}
    everything = list(itertools.product(*AXES))
    random.Random(5).shuffle(everything)
    while wanted:
        best = max(everything[:400], key=lambda c: len(pairs(c) & wanted))
        if not pairs(best) & wanted:
            random.Random(len(wanted)).shuffle(everything)
            continue
        wanted -= pairs(best)
        yield best


def pairs(values):
    return {(i, values[i], j, values[j]) for i, j in itertools.combinations(range(len(values)), 2)}


@pytest.mark.parametrize("policy,batching,reserve,preemption,depth,budget,blocks,caching", list(combinations()))
def test_tokens_do_not_depend_on_the_schedule(policy, batching, reserve, preemption, depth, budget, blocks, caching):
    engine = make(
        blocks,
        4,
        30 if preemption == "swap" else 0,
        context=100,
        caching=caching,
        policy=policy,
        batching=batching,
        reserve=reserve,
        preemption=preemption,
        queue_depth=depth,
        max_num_batched_tokens=budget,
    )
    check(engine, workload(1))
    preemptions = engine.scheduler.stats.preemptions
    assert preemptions == 0 if reserve != "none" or (blocks == 300 and policy != "priority") else preemptions >= 0


@pytest.mark.parametrize("preemption,depth", [("recompute", 1), ("recompute", 2), ("swap", 1), ("swap", 2)])
def test_forced_preemptions_change_nothing(preemption, depth):
    engine = make(26, 4, 60, context=100, preemption=preemption, queue_depth=depth, max_num_batched_tokens=16)
    check(engine, workload(2, count=16))
    stats = engine.scheduler.stats
    assert stats.preemptions > 5 and (stats.swapped_blocks > 0) == (preemption == "swap")


def test_swap_without_room_on_the_host_recomputes():
    engine = make(26, 4, 1, context=100, preemption="swap", max_num_batched_tokens=16)
    check(engine, workload(2, count=16))
    assert engine.scheduler.stats.preemptions > 5


@settings(max_examples=250, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    depth=st.sampled_from([1, 2, 3]),
    policy=st.sampled_from(AXES[0]),
    batching=st.sampled_from(AXES[1]),
    preemption=st.sampled_from(AXES[3]),
    blocks=st.integers(24, 60),
    size=st.sampled_from([1, 2, 4]),
    slots=st.sampled_from([0, 10, 50]),
    budget=st.sampled_from([1, 5, 16, 200]),
)
def test_any_mix_of_arrivals_aborts_and_stops(seed, depth, policy, batching, preemption, blocks, size, slots, budget):
    """Requests and choices come, are aborted and are stopped late at random times; no other request's tokens change."""
    rng = random.Random(seed)
    engine = make(
        blocks,
        size,
        slots,
        context=60,
        policy=policy,
        batching=batching,
        preemption=preemption,
        queue_depth=depth,
        max_num_seqs=8,
        max_num_batched_tokens=budget,
    )
    scheduler = engine.scheduler
    requests = [
        r
        for r in workload(seed, count=10, longest=16)
        if r.num_prompt_tokens + r.params.max_tokens <= scheduler.max_model_len
    ]
    requests += [
        Case(
            100 + r.request_id,
            r.prompt_token_ids,
            r.params,
            seed=r.seed,
            choice=1,
            priority=r.priority,
            parent_id=r.request_id,
            group_id=r.request_id,
        )
        for r in requests[::3]
    ]
    expected = {r.request_id: alone(r)[0] for r in requests}
    got: dict[int, list[int]] = {r.request_id: [] for r in requests}
    waiting, ended = list(requests), set()
    for _ in range(2500):
        if not waiting and not engine.has_work:
            break
        while waiting and rng.random() < 0.4:
            scheduler.add(waiting.pop(0))
        for update in engine.step():
            assert update.request_id not in ended
            got[update.request_id] += update.token_ids
        scheduler.check_integrity()
        if scheduler.requests and rng.random() < 0.1:
            victim = rng.choice(sorted(scheduler.requests))
            ended.add(victim)
            if rng.random() < 0.5:
                scheduler.abort(victim)
            else:
                keep = len(got[victim]) // 2
                scheduler.finish(victim, "stop", "text", keep_tokens=keep)
                del got[victim][keep:]
            scheduler.check_integrity()
    else:
        raise AssertionError("the engine makes no progress")
    no_leak(scheduler)
    for i, tokens in got.items():
        assert tokens == (expected[i][: len(tokens)] if i in ended else expected[i])


def test_choices_fork_the_prompt_and_copy_its_last_block():
    engine = make(64, 4, context=200)
    root = Case(0, list(range(10, 23)), SamplingParams(max_tokens=9, ignore_eos=True), seed=5)
    choices = [root, *(root.sibling(i, i) for i in range(1, 4))]
    got = run(engine, choices)
    runner = NullRunner(2, 1, vocab_size=VOCAB)
    for choice in choices:
        tokens = list(range(10, 23))
        for _ in range(9):
            tokens.append(runner.sample(runner.state(tokens), 5, choice.choice))
        assert got[choice.request_id][0] == tokens[13:]
    assert len({tuple(tokens) for tokens, _, _ in got.values()}) == 4
    stats = engine.scheduler.stats
    assert stats.scheduled_tokens == 13 + 3 + 4 * 8  # the prompt once, its last token for each other choice
    assert stats.copied_blocks == 0  # 12 tokens fill three blocks
    engine = make(64, 8, context=200)
    run(engine, [root := Case(0, list(range(10, 23)), SamplingParams(max_tokens=9)), root.sibling(1, 1)])
    assert engine.scheduler.stats.copied_blocks == 1


@pytest.mark.parametrize("early", ["abort", "one token"])
@pytest.mark.parametrize("blocks,budget", [(300, 64), (12, 5)])
def test_choices_outlive_their_parent(early, blocks, budget):
    engine = make(blocks, 4, context=40, max_num_batched_tokens=budget)
    prompt = list(range(10, 30))
    length = 1 if early == "one token" else 12
    root = Case(0, prompt, SamplingParams(max_tokens=length, ignore_eos=True))
    rest = [root.sibling(i, i) for i in range(1, 5)]
    for request in (root, *rest):
        engine.scheduler.add(request)
    if early == "abort":
        engine.step()
        engine.scheduler.abort(0)
    got = run(engine)
    for child in rest:
        child_case = Case(9, prompt, child.params, choice=child.choice)
        assert got[child.request_id][0] == alone(child_case)[0]


@pytest.mark.parametrize("batching", ["sarathi", "orca", "static"])
@pytest.mark.parametrize("blocks", [16, 300])
def test_groups_of_choices_under_pressure(batching, blocks):
    engine = make(blocks, 4, context=60, batching=batching, max_num_batched_tokens=9, queue_depth=2)
    requests = []
    for g in range(3):
        root = Case(10 * g, [g, *range(5, 14 + g)], SamplingParams(max_tokens=20), seed=g)
        requests += [root, *(root.sibling(10 * g + i, i) for i in range(1, 4))]
    got = run(engine, requests)
    for r in requests:
        case = Case(1, r.prompt_token_ids, r.params, seed=r.seed, choice=r.choice)
        assert got[r.request_id][0] == alone(case)[0]


@pytest.mark.parametrize("budget", [1, 5, 64])
@pytest.mark.parametrize("blocks", [14, 64])
def test_prompt_logprobs_score_every_position_once_and_touch_no_cached_block(budget, blocks):
    engine = make(blocks, 4, context=40, max_num_batched_tokens=budget)
    prompt = list(range(10, 24))
    run(engine, [Case(0, prompt, SamplingParams(max_tokens=2))])
    cached = [node.block for node in engine.scheduler.cache.match(prompt, (), 14)]
    others = [Case(i, [i, *prompt], SamplingParams(max_tokens=18)) for i in (2, 3)]
    request = Case(1, prompt, SamplingParams(max_tokens=20, prompt_logprobs=0), seed=1)
    submit = engine.runner.submit
    written: set[int] = set()

    def watch(plan):
        for s in plan.slices:
            if s.request_id == 1:
                written.update(s.block_table[at // 4] for at in range(s.start, s.start + len(s.token_ids)))
        return submit(plan)

    engine.runner.submit = watch
    got = run(engine, [others[0], request, others[1]])
    if blocks == 64:
        assert not written & set(cached) and request.num_cached_tokens == 0
    runner = NullRunner(2, 1, vocab_size=VOCAB)
    tokens, scores, _ = got[1]
    assert tokens == alone(request)[0]
    assert [s.token_id for s in scores] == prompt[1:]
    assert [s.logprob for s in scores] == [
        runner.logprob(runner.state(prompt[: i + 1]), t) for i, t in enumerate(prompt[1:])
    ]


class ShortChunks(Sarathi):
    """Chunks of 8 tokens with budget to spare: others could start while a prompt is half done."""

    def share(self, remaining, following):
        super().share(remaining, following)
        granted = [min(count, 8) for count in remaining]
        self._left = self.budget - sum(granted)
        return granted

    def first(self, remaining):
        return min(super().first(remaining), 8)


@pytest.mark.parametrize("patience", [256, 2, 0])
def test_prefixes_being_computed_are_shared_not_recomputed(patience):
    engine = make(300, 4, context=200, prefix_patience=patience, batcher=ShortChunks(64, 64))
    prompt = list(range(40))
    requests = [Case(i, [*prompt, 50 + i], SamplingParams(max_tokens=3, ignore_eos=True)) for i in range(6)]
    check(engine, requests)
    stats = engine.scheduler.stats
    if patience == 256:
        assert stats.scheduled_tokens == 41 + 5 * 1 + 6 * 2
        assert stats.prefix_hits == 5 * 40 and stats.prefix_waits == 5 * 4
    else:
        assert stats.prefix_waits == 5 * patience and stats.scheduled_tokens > 41 + 5 * 1 + 6 * 2


@pytest.mark.parametrize("depth", [1, 2])
def test_requests_of_one_step_share_a_prefix_and_generated_tokens_hit_later(depth):
    engine = make(300, 4, context=200, queue_depth=depth)
    prompt = list(range(10, 22))
    requests = [Case(i, [*prompt, 50 + i], SamplingParams(max_tokens=8, ignore_eos=True)) for i in range(2)]
    for request in requests:
        engine.scheduler.add(request)
    plan = engine.scheduler.schedule()
    assert [(s.request_id, s.start) for s in plan.slices] == [(0, 0), (1, 12)]
    engine.scheduler.update(plan, engine.runner.result(engine.runner.submit(plan)))
    got = run(engine)
    assert len(got) == 2
    follow = Case(7, [*prompt, 50, *alone(requests[0])[0], 1, 2], SamplingParams(max_tokens=1))
    run(engine, [follow])
    assert follow.num_cached_tokens == 20  # 13 + 8 tokens known, 20 of them computed


def test_a_whole_cached_prompt_still_computes_its_last_token():
    engine = make()
    prompt = list(range(10, 18))
    first, second = (Case(i, prompt, SamplingParams(max_tokens=2)) for i in range(2))
    check(engine, [first])
    check(engine, [second])
    assert (first.num_cached_tokens, second.num_cached_tokens) == (0, 4)


def test_cache_keys_do_not_share():
    engine = make()
    for i, salt in enumerate(["a", "b", "a"]):
        request = Case(i, list(range(10, 18)), SamplingParams(max_tokens=2), cache_key=CacheKey(salt=salt))
        check(engine, [request])
        assert request.num_cached_tokens == (4 if i == 2 else 0)


def test_penalties_bias_and_bans_follow_the_output():
    from headrace.engine.schedule.edits import EditState

    penalties = SamplingParams(
        max_tokens=30,
        min_tokens=12,
        repetition_penalty=1.3,
        presence_penalty=0.5,
        frequency_penalty=0.25,
        logit_bias={5: 2.0},
        stop_token_ids=tuple(range(40)),
    )
    bans = SamplingParams(max_tokens=30, min_tokens=12, stop_token_ids=tuple(range(40)))  # planned ahead
    for depth, params in itertools.product((1, 2), (penalties, bans)):
        case = Case(0, [1, 5, 9, 1], params)

        def edits(output, prompt=case.prompt_token_ids, params=params):
            state = EditState(params, {EOS, *range(40)}, prompt)
            for token in output:
                state.append(token)
            return state.current(len(output))

        case.edits_expected = edits
        engine = make(queue_depth=depth, max_num_batched_tokens=3)
        check(engine, [case, *workload(3, 4)[1:]])


def test_edits_are_what_the_formulas_say():
    from headrace.engine.schedule.edits import EditState

    params = SamplingParams(
        min_tokens=3,
        max_tokens=9,
        repetition_penalty=2.0,
        presence_penalty=0.5,
        frequency_penalty=0.25,
        logit_bias={5: 2.0, 8: -1.0},
    )
    state = EditState(params, [3], [1, 5, 1])
    for token in (5, 6, 5):
        state.append(token)
    ban = state.current(2)
    assert ban is not None
    table = {t: (d, a) for t, d, a in zip(ban.token_ids, ban.divide, ban.add)}
    assert table == {1: (2.0, 0.0), 5: (2.0, 2.0 - 0.5 - 0.5), 6: (2.0, -0.75), 8: (1.0, -1.0), 3: (1.0, float("-inf"))}
    after = state.current(3)
    assert after is not None
    assert dict(zip(after.token_ids, after.add))[3] == 0.0


def test_the_edits_behind_drafts_are_those_of_an_output_with_them_and_leave_the_live_ones():
    from headrace.engine.schedule.edits import EditState

    params = SamplingParams(
        min_tokens=3, max_tokens=9, presence_penalty=0.5, frequency_penalty=0.25, logit_bias={5: 2.0}
    )
    for penalties in (params, replace(params, repetition_penalty=2.0), SamplingParams(min_tokens=3)):
        drafts = [5, 6, 5, 7]
        rows = [EditState(penalties, [3], [1, 5, 1]) for _ in range(5)]
        for count, state in enumerate(rows):
            for token in drafts[:count]:
                state.append(token)
        live = EditState(penalties, [3], [1, 5, 1])
        before = copy.deepcopy(live.current(0))
        assert live.behind(0, drafts) == [state.current(i) for i, state in enumerate(rows)][1:]
        assert live.after(0, drafts) == rows[4].current(4) and live.current(0) == before


def test_a_stop_comes_a_step_late_and_its_overrun_is_discarded():
    engine = make(queue_depth=2)
    case = Case(0, [1, 2, 3], SamplingParams(max_tokens=200))
    check(engine, [case])
    assert case.finish_reason == "stop" and engine.scheduler.stats.discarded_tokens == 1
    engine = make(queue_depth=2)
    check(engine, [Case(0, [1, 2, 3], SamplingParams(max_tokens=10, ignore_eos=True))])
    assert engine.scheduler.stats.discarded_tokens == 0  # an end by length is known when the step is planned


def test_results_come_in_order():
    engine = make(queue_depth=2)
    engine.scheduler.add(Case(0, [1, 2], SamplingParams(ignore_eos=True)))
    first, second = engine.scheduler.schedule(), engine.scheduler.schedule()
    assert second.slices[0].token_ids == [-1]
    results = [engine.runner.result(engine.runner.submit(plan)) for plan in (first, second)]
    with pytest.raises(ValueError, match="oldest in flight"):
        engine.scheduler.update(second, results[1])


@pytest.mark.parametrize(
    "prompt,params,message",
    [
        (list(range(90)), {"max_tokens": 20}, "90 tokens and max_tokens=20 make 110, more than the context of 100"),
        (list(range(100)), {"max_tokens": None}, "prompt has 100 tokens, which leaves no room in the context of 100"),
        ([1], {"max_tokens": 9, "min_tokens": 4, "allowed_token_ids": (EOS,)}, "min_tokens=4 bans every"),
    ],
)
def test_what_can_never_fit_is_refused_with_the_numbers(prompt, params, message):
    engine = make(context=100)
    with pytest.raises(RequestError, match=message):
        engine.scheduler.add(Case(0, prompt, SamplingParams(**params)))
    assert not engine.has_work


def test_a_pool_smaller_than_the_context_is_the_limit():
    engine = make(num_blocks=6, block_size=4, context=100)
    with pytest.raises(RequestError, match=r"31, more than the KV cache of 20 tokens \(the context is 100\)"):
        engine.scheduler.add(Case(0, [1], SamplingParams(max_tokens=30)))
    request = Case(0, [1, 2], SamplingParams(max_tokens=None, ignore_eos=True))
    got = run(engine, [request])
    assert len(got[0][0]) == 18 and got[0][2] == "length"
    with pytest.raises(RequestError, match="already in use"):
        engine.scheduler.add(Case(1, [1], SamplingParams()))
        engine.scheduler.add(Case(1, [1], SamplingParams()))
    with pytest.raises(ConfigError, match="leaves no KV block"):
        make(num_blocks=1)


def test_aborting_frees_blocks_at_once():
    engine = make(num_blocks=10, block_size=4, context=36, max_num_batched_tokens=16)
    engine.scheduler.add(Case(0, list(range(30)), SamplingParams(max_tokens=4)))
    engine.step()
    assert engine.scheduler.stats.physical_blocks == 4
    engine.scheduler.abort(0)
    engine.scheduler.abort(0)
    no_leak(engine.scheduler)
    assert engine.scheduler.stats.finished["abort"] == 1


def test_resetting_the_cache_forgets_every_prefix():
    engine = make()
    check(engine, workload(4))
    assert engine.scheduler.stats.cached_blocks > 0
    assert engine.scheduler.reset_prefix_cache() > 0 and engine.scheduler.stats.cached_blocks == 0
    again = workload(4)[:1]
    check(engine, again)
    assert again[0].num_cached_tokens == 0
