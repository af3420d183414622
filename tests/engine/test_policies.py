"""Order, starvation and preemption, by policy; how each batching fills a step."""

import random

import pytest

from headrace.config import CacheConfig
from headrace.engine.engine import Engine
from headrace.engine.run.null_runner import NullRunner
from headrace.engine.schedule.batching import BATCHING, Orca, Sarathi, Static
from headrace.engine.schedule.batching.sarathi import TILE
from headrace.engine.schedule.config import SchedulerConfig
from headrace.engine.schedule.request import Request
from headrace.engine.schedule.sampling import SamplingParams
from headrace.engine.schedule.scheduler import Scheduler


def make(num_blocks=200, block_size=4, context=400, **options):
    scheduler = Scheduler(
        SchedulerConfig(**options), CacheConfig(block_size=block_size, num_blocks=num_blocks), context, ()
    )
    return Engine(scheduler, NullRunner(num_blocks, block_size, check=True), options.get("queue_depth", 1))


def request(i, prompt, tokens=4, **extra):
    return Request(i, prompt, SamplingParams(max_tokens=tokens), **extra)


def finish_order(engine, limit=3000):
    order: list[int] = []
    for _ in range(limit):
        if not engine.has_work:
            return order
        order += [u.request_id for u in engine.step() if u.finish_reason]
        engine.scheduler.check_integrity()
    raise AssertionError("the engine makes no progress")


def test_first_come_first_served():
    engine = make(max_num_seqs=1)
    for i in (3, 1, 2):
        engine.scheduler.add(request(i, [i] * 5))
    assert finish_order(engine) == [3, 1, 2]


def test_longest_prefix_goes_first_and_ties_go_by_arrival():
    engine = make(max_num_seqs=1, policy="lpm")
    engine.scheduler.add(request(0, list(range(16))))
    finish_order(engine)
    for i, prompt in enumerate([[90, 91], [*range(8), 77], [80, 81], [*range(16), 77]], 1):
        engine.scheduler.add(request(i, prompt))
    assert finish_order(engine) == [4, 2, 1, 3]


def test_lpm_reaches_the_depth_first_hit_rate():
    """With the cache holding the longest request, longest-prefix-first equals a depth-first walk (SGLang §3)."""
    rng = random.Random(0)
    prompts = [
        [a] * 8 + [10 * a + b] * 8 + [rng.randrange(1000, 9999) for _ in range(8)]
        for a in range(4)
        for b in range(4)
        for _ in range(3)
    ]
    tree = sum(8 for _ in {p[0] for p in prompts}) + sum(8 for _ in {tuple(p[:16]) for p in prompts})
    rng.shuffle(prompts)
    computed = {}
    for policy in ("fcfs", "lpm"):
        engine = make(num_blocks=9, max_num_seqs=1, policy=policy, context=32, lpm_patience=10**6)
        for i, prompt in enumerate(prompts):
            engine.scheduler.add(request(i, prompt, 1))
        finish_order(engine)
        computed[policy] = engine.scheduler.stats.scheduled_tokens
    assert computed["lpm"] == tree + 8 * len(prompts) < computed["fcfs"]


@pytest.mark.parametrize("patience", [0, 5, 20])
def test_lpm_starves_no_request(patience):
    engine = make(max_num_seqs=1, policy="lpm", lpm_patience=patience)
    engine.scheduler.add(request(0, list(range(16)), 1))
    finish_order(engine)
    engine.scheduler.add(request(1, [99, 98], 1))
    ended = []
    for i in range(2, 60):  # a steady stream of better matches
        engine.scheduler.add(request(i, [*range(16), i], 1))
        engine.scheduler.add(request(i + 100, [*range(16), i], 1))
        ended += [u.request_id for u in engine.step() if u.finish_reason]
    assert ended.index(1) == patience


def test_lower_priority_numbers_run_first_and_preempt_higher_ones():
    engine = make(num_blocks=12, context=40, policy="priority")
    low = [request(i, list(range(i, i + 14)), 20, priority=5) for i in (1, 2)]
    for r in low:
        engine.scheduler.add(r)
    for _ in range(3):
        engine.step()
    engine.scheduler.add(request(7, list(range(50, 80)), 5, priority=0))
    engine.scheduler.add(request(8, list(range(80, 90)), 2, priority=5))
    plan = engine.scheduler.schedule()
    assert plan.preempted == [2, 1] and plan.slices[0].request_id == 7
    engine.scheduler.update(plan, engine.runner.result(engine.runner.submit(plan)))
    assert finish_order(engine)[0] == 7


def test_equal_priorities_do_not_preempt():
    engine = make(num_blocks=12, context=40, policy="priority")
    engine.scheduler.add(request(1, list(range(30)), 8, priority=1))
    engine.step()
    engine.scheduler.add(request(2, list(range(50, 80)), 8, priority=1))
    assert finish_order(engine) == [1, 2] and engine.scheduler.stats.preemptions == 0


@pytest.mark.parametrize("policy", ["fcfs", "priority"])
@pytest.mark.parametrize("batching", ["sarathi", "orca"])
@pytest.mark.parametrize("preemption", ["recompute", "swap"])
@pytest.mark.parametrize("depth", [1, 2])
def test_the_oldest_request_always_progresses(policy, batching, preemption, depth):
    """In a pool that holds little more than one request, the first in order gains tokens in every step."""
    engine = make(
        num_blocks=12,
        context=40,
        policy=policy,
        batching=batching,
        preemption=preemption,
        max_num_batched_tokens=5,
        queue_depth=depth,
    )
    for i in range(6):
        engine.scheduler.add(request(i, [i * 7 + k for k in range(10 + i)], 24))
    scheduler, last = engine.scheduler, (-1, 0)
    for _ in range(2000):
        if not engine.has_work:
            break
        engine.step()
        if scheduler.requests:
            oldest = min(scheduler.requests.values(), key=lambda r: r.arrival)
            now = (oldest.request_id, oldest.num_scheduled + oldest.num_output_tokens)
            assert now[0] != last[0] or now[1] > last[1], f"request {now[0]} did not move"
            last = now
    assert not scheduler.requests and scheduler.stats.preemptions > 0


def test_preemption_takes_the_latest_arrived():
    engine = make(num_blocks=10, context=36)
    for i in range(3):
        engine.scheduler.add(request(i, [i * 9 + k for k in range(9)], 20))
    preempted: list[int] = []
    while engine.has_work and not preempted:
        plan = engine.scheduler.schedule()
        preempted = plan.preempted
        engine.scheduler.update(plan, engine.runner.result(engine.runner.submit(plan)))
    assert preempted == [2]


@pytest.mark.parametrize("reserve,held", [("max", 64), ("oracle", 27), ("pow2", 29), ("none", 17)])
def test_what_admission_reserves(reserve, held):
    engine = make(block_size=1, context=64, reserve=reserve)
    engine.scheduler.add(request(0, list(range(17)), 10) if reserve != "pow2" else request(0, list(range(13)), 9))
    engine.scheduler.schedule()
    assert engine.scheduler.stats.held_slots == held
    assert engine.scheduler.stats.used_slots == (13 if reserve == "pow2" else 17)


def test_reservations_admit_fewer_and_never_preempt():
    waste, steps = {}, {}
    for reserve in ("none", "oracle", "pow2", "max"):
        engine = make(num_blocks=60, context=60, reserve=reserve)
        for i in range(30):
            engine.scheduler.add(request(i, [i, *range(5 + i % 7)], 9 + i % 13))
        finish_order(engine)
        stats = engine.scheduler.stats
        waste[reserve] = 1 - stats.used_slot_steps / stats.held_slot_steps
        steps[reserve] = stats.steps
        assert reserve == "none" or stats.preemptions == 0
    assert waste["none"] < waste["oracle"] < waste["pow2"] < waste["max"]
    assert steps["none"] < steps["oracle"] <= steps["pow2"] < steps["max"]


def test_paged_waste_is_only_in_the_last_block():
    engine = make(block_size=16, num_blocks=40, context=200)
    engine.scheduler.add(request(0, list(range(35)), 30))
    while engine.has_work:
        engine.scheduler.check_integrity()
        stats = engine.scheduler.stats
        assert stats.held_slots - stats.used_slots <= 15
        engine.step()


def test_sarathi_gives_decodes_first_then_chunks_up_to_the_budget():
    batching = Sarathi(16, 64)
    assert batching.share([1, 40, 1, 9], [0] * 4) == [1, 14, 1, 0]
    assert batching.first(5) == 0
    assert batching.share([1, 3, 1], [0] * 3) == [1, 3, 1] and batching.first(99) == 11
    batching.take(11)
    assert not batching.first(1)


def test_sarathi_cuts_a_step_at_a_tile():
    batching = Sarathi(2 * TILE + 9, 64)
    assert batching.share([1, 1000, 1, 1000], [0] * 4) == [1, 2 * TILE - 2, 1, 0]
    assert batching.first(100) == 0  # a second cut would break the first one's alignment
    assert batching.share([2 * TILE + 5, 1], [0, 0]) == [2 * TILE + 5, 1]  # nothing is cut: nothing to align
    assert Sarathi(TILE - 1, 64).share([1000], [0]) == [TILE - 1]


def test_sarathi_never_starves_a_prompt_behind_decodes():
    engine = make(max_num_batched_tokens=4, max_num_seqs=64)
    for i in range(8):
        engine.scheduler.add(request(i, [i * 5 + k for k in range(6)], 30))
    plan = engine.scheduler.schedule()
    while plan.slices:
        assert plan.num_tokens <= 4
        engine.scheduler.update(plan, engine.runner.result(engine.runner.submit(plan)))
        plan = engine.scheduler.schedule()
    assert not engine.has_work


def test_no_decode_waits_behind_a_prompt_under_sarathi_and_every_one_does_under_orca():
    longest = {}
    for batching in ("sarathi", "orca"):
        engine = make(batching=batching, max_num_batched_tokens=16)
        engine.scheduler.add(request(0, [1, 2, 3], 40))
        engine.step()
        engine.scheduler.add(request(1, list(range(10, 210)), 4))
        sizes = []
        while engine.has_work:
            plan = engine.scheduler.schedule()
            assert 0 not in engine.scheduler.requests or plan.slices[0].request_id == 0
            sizes.append(plan.num_tokens)
            engine.scheduler.update(plan, engine.runner.result(engine.runner.submit(plan)))
        longest[batching] = max(sizes)
    assert longest == {"sarathi": 16, "orca": 201}


def test_orca_never_cuts_a_prompt():
    batching = Orca(16, 64)
    assert batching.share([1, 40, 9], [0] * 3) == [1, 40, 0]  # whole, though longer than the budget
    assert batching.share([1, 10, 9, 5], [0] * 4) == [1, 10, 0, 5]
    assert batching.share([1], [0]) == [1] and batching.first(99) == 99
    batching.take(99)
    assert batching.first(1) == 0


def test_static_batches_enter_and_leave_together():
    engine = make(batching="static", max_num_seqs=3, max_num_batched_tokens=8)
    for i in range(7):
        engine.scheduler.add(request(i, [i] * 6, 2 + 3 * (i % 3)))
    batches = []
    while engine.has_work:
        running = {r.request_id for r in engine.scheduler.running}
        plan = engine.scheduler.schedule()
        now = {r.request_id for r in engine.scheduler.running}
        if now - running:
            assert not running, "a request joined a running batch"
            batches.append(now)
        engine.scheduler.update(plan, engine.runner.result(engine.runner.submit(plan)))
    assert batches == [{0, 1, 2}, {3, 4, 5}, {6}]


def test_spare_is_what_no_prompt_could_use():
    batching = Sarathi(16, 64)
    batching.share([1, 3, 1], [0] * 3)
    assert batching.spare == 11
    batching.take(4)
    assert batching.spare == 7
    batching.share([1, 40, 1], [0] * 3)
    assert batching.spare == 0
    cut = Sarathi(2 * TILE + 9, 64)
    cut.share([1, 1000], [0, 0])
    assert cut.spare == 0  # the prompt was cut at a tile: what is left of the budget is its next chunk's
    orca = Orca(16, 64)
    orca.share([1, 10, 9], [0] * 3)
    assert orca.spare == 5  # the second prompt is longer, and is never cut
    orca.share([40], [0])
    assert orca.spare == 0


def test_a_batching_is_made_by_name():
    assert [type(BATCHING[n](8, 4)) for n in ("orca", "sarathi", "static")] == [Orca, Sarathi, Static]
    assert Sarathi(8, 64).seats == 8 and Orca(8, 64).seats == 64
