"""The draft model: what it drafts is a function of the prefix and the request, wherever its KV comes from."""

import random
from collections.abc import Sequence
from typing import Any

import pytest

from headrace.engine.schedule.plan import Plan
from headrace.engine.schedule.request import Request
from headrace.engine.schedule.sampling import SamplingParams
from headrace.kernels.load import load_ops
from headrace.llm.assemble import assemble
from headrace.llm.options import EngineOptions
from headrace.llm.speculation import draft_model
from headrace.model.huggingface import load_model
from headrace.speculate.draft import DraftModel
from headrace.speculate.gamma import FixedGamma
from headrace.speculate.speculation import Speculation

SEEDED: dict[str, Any] = {"temperature": 0.8, "max_tokens": 24, "ignore_eos": True}
BLOCKS, SIZE = 90, 8


@pytest.fixture(scope="module")
def loaded(tinyworld_checkpoint):
    """The target, and the same model with weights rounded to bf16, which is right often."""
    ops = load_ops("cpu", threads=1)
    return load_model(tinyworld_checkpoint, ops), load_model(tinyworld_checkpoint, ops, "bfloat16", serving=True), ops


class Drafts:
    """What a draft model drafts, by request and number of known tokens."""

    def __init__(self, model: DraftModel) -> None:
        self.seen: dict[tuple[int, int], list[int]] = {}
        self.rows: list[int] = []
        """Tokens that each step of the draft model computes."""
        draft, submit = model.draft, model.runner.submit

        def counted(plan: Plan) -> Any:
            self.rows += [plan.num_tokens] * (plan.num_tokens > 0)
            return submit(plan)

        model.runner.submit = counted  # type: ignore[method-assign]

        def spy(asked: Sequence[tuple[Request, int]], passed: Any = None) -> list[list[int]]:
            keys = [(request.request_id % 100, request.num_tokens) for request, _ in asked]
            made = draft(asked, passed or (lambda rows, seconds: None))
            for key, (_, count), tokens in zip(keys, asked, made):
                if len(tokens) == count == 3:
                    assert self.seen.setdefault(key, tokens) == tokens
            return made

        model.draft = spy  # type: ignore[method-assign]


def engine_for(loaded, drafter=None, blocks=BLOCKS, **options):
    model, rounded, ops = loaded
    settings = EngineOptions(threads=1, num_kv_blocks=blocks, block_size=SIZE, **options)
    draft = draft_model(rounded if drafter is None else drafter, ops, settings, blocks)
    drafts = Drafts(draft)
    return assemble(model, ops, settings, speculator=Speculation([], FixedGamma(3), draft)), drafts


def run(engine, requests):
    for request in requests:
        engine.scheduler.add(request)
    tokens: dict[int, list[int]] = {}
    while engine.has_work:
        for update in engine.step():
            tokens.setdefault(update.request_id, []).extend(update.token_ids)
        engine.scheduler.check_integrity()
    return tokens


def requests(first=0, **params):
    draw = random.Random(3)
    common = [draw.randrange(5, 400) for _ in range(21)]
    return [
        Request(first + i, [*common[: draw.randrange(9, 21)], 7 + i], SamplingParams(**{**SEEDED, **params}), seed=i)
        for i in range(8)
    ]


def one_by_one(loaded, **options):
    tokens: dict[int, list[int]] = {}
    engine, drafts = engine_for(loaded, **options)
    for request in requests():
        tokens |= run(engine, [request])
        engine.scheduler.reset_prefix_cache()
    return tokens, drafts.seen


def agree(seen, expected):
    """Drafts behind the same known tokens are the same; most of them occur in both runs."""
    both = seen.keys() & expected.keys()
    assert len(both) > len(expected) / 2
    assert {key: seen[key] for key in both} == {key: expected[key] for key in both}


def test_drafts_are_the_same_cold_warm_batched_and_preempted(loaded):
    tokens, expected = one_by_one(loaded)
    assert any(len(set(drafts)) > 1 for drafts in expected.values())
    engine, drafts = engine_for(loaded)
    assert run(engine, requests()) == tokens
    agree(drafts.seen, expected)
    warm = run(engine, requests(first=100))
    assert {number % 100: ids for number, ids in warm.items()} == tokens
    for preemption in ("recompute", "swap"):
        crowded, drafts = engine_for(loaded, blocks=18, preemption=preemption)
        assert run(crowded, requests()) == tokens and crowded.scheduler.stats.preemptions > 0
        agree(drafts.seen, expected)


def test_forked_choices_draft_as_requests_of_their_own(loaded):
    def choices(first):
        params = SamplingParams(**SEEDED, n=4)
        parent = Request(first, [9, 8, 7, 6, 5, 4, 3, 11, 12, 13, 14], params, seed=5)
        return [parent, *(parent.sibling(first + i, i) for i in (1, 2, 3))]

    engine, drafts = engine_for(loaded)
    together = run(engine, choices(0))
    assert engine.scheduler.stats.copied_blocks > 0
    apart, alone = engine_for(loaded)
    for made in choices(0):
        item = Request(made.request_id, made.prompt_token_ids, made.params, seed=5, choice=made.choice)
        assert run(apart, [item])[made.request_id] == together[made.request_id]
        apart.scheduler.reset_prefix_cache()
    agree(drafts.seen, alone.seen)


@pytest.mark.parametrize(
    "params",
    [
        {"temperature": 0.0},
        {"temperature": 1.5},
        {"temperature": 1.0, "repetition_penalty": 1.3, "presence_penalty": 0.5, "top_p": 0.9},
        {"temperature": 1.0, "min_tokens": 9, "ignore_eos": False, "logit_bias": {7: 3.0}},
    ],
)
def test_a_model_that_drafts_for_itself_is_accepted_to_the_last_token(loaded, params):
    engine, _ = engine_for(loaded, drafter=loaded[0])
    run(engine, requests(**params))
    stats = engine.scheduler.stats
    assert stats.drafted_tokens == stats.accepted_tokens > 50


def test_a_prefix_that_another_request_drafted_for_is_not_computed_again(loaded):
    engine, drafts = engine_for(loaded)
    rows = drafts.rows
    prompt = list(range(20, 20 + 5 * SIZE))
    run(engine, [Request(1, prompt, SamplingParams(**SEEDED), seed=1)])
    assert rows[0] == len(prompt)
    rows.clear()
    run(engine, [Request(2, [*prompt, 3], SamplingParams(**SEEDED), seed=2)])
    assert rows[0] == 1


def test_a_draft_model_catches_up_in_chunks(loaded):
    engine, drafts = engine_for(loaded, max_num_batched_tokens=16)
    reference, whole = engine_for(loaded)
    each = [Request(1, list(range(20, 70)), SamplingParams(**SEEDED), seed=1) for _ in range(2)]
    assert run(engine, each[:1]) == run(reference, each[1:])
    assert drafts.rows[:3] == [16, 16, 16] and max(drafts.rows) == 16 and whole.rows[0] == 50


def test_a_fork_whose_draft_kv_is_not_copied_is_noticed(loaded, monkeypatch):
    def forgets(self, moves):
        for source, target in moves.copies:
            self._held[target] = self._held.get(source, (0, []))

    monkeypatch.setattr(DraftModel, "move", forgets)
    with pytest.raises(AssertionError):
        test_forked_choices_draft_as_requests_of_their_own(loaded)
