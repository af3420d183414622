"""The contract of an executor of plans, held by the null runner and by the one with a model."""

from dataclasses import dataclass
from typing import Any

import pytest
import torch

from headrace.attention.store import KVStore
from headrace.engine.run.null_runner import NullRunner
from headrace.engine.run.ranks import Ranks
from headrace.engine.run.runner import Runner
from headrace.engine.run.shard import ModelShard
from headrace.engine.run.words import set_ids
from headrace.engine.schedule.plan import PREVIOUS, SAMPLE, LogitEdits, Plan, Slice
from headrace.engine.schedule.sampling import SamplingParams
from headrace.kernels.load import load_ops
from headrace.model.huggingface import load_model

SIZE = 8
BLOCKS = 40
HOST_SLOTS = 6
GREEDY = SamplingParams(temperature=0.0)
PROMPT = [11, 42, 7, 23, 64, 5, 38, 19, 71, 30, 9, 55, 14, 62, 27, 33, 48, 6, 81, 12]


@dataclass
class Subject:
    """An executor, and a counter of its unused blocks."""

    executor: Any
    next_block: int = 1

    def table(self, tokens):
        """Fresh blocks for `tokens` tokens."""
        first, self.next_block = self.next_block, self.next_block + -(-tokens // SIZE)
        assert self.next_block <= BLOCKS
        return list(range(first, self.next_block))

    def run(self, *slices, step=1, **moves):
        return self.executor.result(self.executor.submit(Plan(step, list(slices), **moves)))

    def after(self, tokens, params=GREEDY, **extra):
        """What one whole slice of `tokens` gives."""
        return self.run(part(1, 0, tokens, self.table(len(tokens)), params=params, **extra)).slices[1]

    def continued(self, tokens, count):
        """`count` tokens after `tokens`, each from a slice of its own over the whole prefix."""
        out: list[int] = []
        for _ in range(count):
            out += self.after([*tokens, *out]).token_ids
        return out


def ban(token):
    return LogitEdits([token], [1.0], [float("-inf")])


def part(request_id, start, tokens, table, targets=(SAMPLE,), params=GREEDY, **extra):
    return Slice(request_id, start, list(tokens), list(table), list(targets), params, 5, 0, **extra)


@pytest.fixture(scope="module")
def shard(tinyworld_checkpoint):
    ops = load_ops("cpu", threads=1)
    model = load_model(tinyworld_checkpoint, ops)
    config = model.config
    store = KVStore(BLOCKS, config.num_layers, model.kv_heads, SIZE, config.head_dim, torch.float32, ops.device)
    return ModelShard(model, ops, store, HOST_SLOTS)


@pytest.fixture(params=["null", "model"])
def subject(request):
    if request.param == "null":
        return Subject(NullRunner(BLOCKS, SIZE, HOST_SLOTS, check=True))
    return Subject(Runner(request.getfixturevalue("shard"), Ranks()))


def test_a_result_has_the_step_and_the_requests_of_its_plan(subject):
    slices = [part(i, 0, PROMPT[i:], subject.table(20)) for i in (4, 2, 9)]
    result = subject.run(*slices, step=17)
    assert result.step == 17 and list(result.slices) == [4, 2, 9]


def test_a_slice_samples_as_its_targets_ask(subject):
    middle, end = part(1, 0, PROMPT[:9], subject.table(9), []), part(2, 0, PROMPT, subject.table(20))
    result = subject.run(middle, end)
    assert result.slices[1].token_ids == [] and len(result.slices[2].token_ids) == 1
    assert result.slices[1].logprobs == result.slices[1].scores == result.slices[2].logprobs == []
    only_middles = subject.run(part(3, 0, PROMPT[:9], subject.table(9), []))
    assert only_middles.slices[3].token_ids == []


@pytest.mark.parametrize("cut", [1, 8, 13])
def test_chunks_and_neighbours_do_not_change_a_token(subject, cut):
    whole = subject.after(PROMPT).token_ids
    table, other = subject.table(20), subject.table(20)
    for start in range(0, 20, cut):
        chunk = PROMPT[start : start + cut]
        last = start + cut >= 20
        result = subject.run(
            part(2, 0, PROMPT[::-1], other), part(1, start, chunk, table, [SAMPLE] if last else []), step=start
        )
    assert result.slices[1].token_ids == whole


def test_a_seed_and_a_choice_give_the_same_token_again(subject):
    params = SamplingParams(temperature=1.5)
    assert subject.after(PROMPT, params).token_ids == subject.after(PROMPT, params).token_ids


def test_bans_and_allowed_tokens_hold(subject):
    [best] = subject.after(PROMPT).token_ids
    assert subject.after(PROMPT, edits=[ban(best)]).token_ids != [best]
    allowed = SamplingParams(temperature=0.0, allowed_token_ids=(best + 1,))
    assert subject.after(PROMPT, allowed).token_ids == [best + 1]


@pytest.mark.parametrize("top", [0, 3])
def test_log_probabilities_come_where_they_are_asked_for(subject, top):
    targets = [*PROMPT[12:], SAMPLE]
    got = subject.after(PROMPT, targets=targets, top=top)
    assert [record.token_id for record in got.scores] == PROMPT[12:]
    assert [record.token_id for record in got.logprobs] == got.token_ids
    for record in (*got.scores, *got.logprobs):
        assert record.logprob <= 0 and record.rank >= 1
        assert len(record.top_ids) == len(record.top_logprobs) == top
        assert record.top_logprobs == sorted(record.top_logprobs, reverse=True)
        if record.rank <= top:
            assert record.top_ids[record.rank - 1] == record.token_id
            assert record.top_logprobs[record.rank - 1] == record.logprob


def test_no_log_probabilities_come_unasked(subject):
    got = subject.after(PROMPT, targets=[*PROMPT[12:], SAMPLE])
    assert got.scores == got.logprobs == [] and len(got.token_ids) == 1


def test_a_score_is_that_of_the_token_alone(subject):
    scores = subject.after(PROMPT, targets=[*PROMPT[12:], SAMPLE], top=0).scores
    for at, record in enumerate(scores, 12):
        alone = subject.run(part(1, 0, PROMPT[:at], subject.table(at), [PROMPT[at]], top=0)).slices[1]
        assert alone.token_ids == [] and alone.scores == [record]


def test_previous_is_the_token_of_the_plan_before_at_depth_two(subject):
    prompts = {1: PROMPT, 2: PROMPT[::-1]}
    expected = {i: subject.continued(prompt, 3) for i, prompt in prompts.items()}
    tables = {i: subject.table(23) for i in prompts}
    submit = subject.executor.submit
    got: dict[int, list[int]] = {1: [], 2: []}
    handles = [submit(Plan(0, [part(i, 0, prompts[i], tables[i]) for i in (1, 2)]))]
    for step in (1, 2):  # the next plan is submitted before the result of the one before is taken
        order = (2, 1) if step == 1 else (1, 2)
        handles.append(submit(Plan(step, [part(i, 19 + step, [PREVIOUS], tables[i]) for i in order])))
        taken = subject.executor.result(handles.pop(0))
        assert taken.step == step - 1
        for i in got:
            got[i] += taken.slices[i].token_ids
    for i, result in subject.executor.result(handles.pop()).slices.items():
        got[i] += result.token_ids
    assert got == expected


def test_previous_may_follow_known_tokens(subject):
    first = subject.after(PROMPT[:10]).token_ids
    expected = subject.after([*PROMPT[:10], *first]).token_ids
    table = subject.table(11)
    subject.run(part(1, 0, PROMPT[:10], table))
    assert subject.run(part(1, 8, [*PROMPT[8:10], PREVIOUS], table), step=2).slices[1].token_ids == expected


def test_previous_without_a_token_before_is_refused(subject):
    subject.after(PROMPT)
    with pytest.raises(RuntimeError, match="request 77 has no token"):
        subject.run(part(77, 0, [PREVIOUS], subject.table(1)))


def test_a_plan_without_slices_moves_blocks_and_keeps_previous(subject):
    expected = subject.continued(PROMPT[:16], 2)
    table, other = subject.table(17), subject.table(8)
    assert subject.run(part(1, 0, PROMPT[:16], table)).slices[1].token_ids == expected[:1]
    assert subject.run(step=2).slices == {}
    assert subject.run(step=3, copies=[(table[1], other[0])]).slices == {}
    moved = [table[0], other[0], table[2]]
    assert subject.run(part(1, 16, [PREVIOUS], moved), step=4).slices[1].token_ids == expected[1:]


def test_blocks_move_out_then_in_then_copy_before_a_slice_is_computed(subject):
    expected = subject.after([*PROMPT[:16], 3]).token_ids
    table, second, third = subject.table(16), subject.table(8), subject.table(16)
    subject.run(part(1, 0, PROMPT[:16], table))
    result = subject.run(
        part(2, 0, PROMPT[::-1][:8], table[:1]),  # writes over the block that leaves
        part(1, 16, [3], [third[0], table[1], third[1]]),
        swap_out=[(table[0], 2)],
        swap_in=[(2, second[0])],
        copies=[(second[0], third[0])],
    )
    assert result.slices[1].token_ids == expected


def test_a_slice_reads_what_an_earlier_slice_of_its_plan_computes(subject):
    expected = subject.after([*PROMPT[:16], 3]).token_ids
    table, own = subject.table(16), subject.table(1)
    result = subject.run(part(1, 0, PROMPT[:16], table, []), part(2, 16, [3], [*table, *own]))
    assert result.slices[2].token_ids == expected


def test_a_plan_is_read_in_submit(subject):
    [best] = subject.after(PROMPT).token_ids
    expected = subject.after(PROMPT, edits=[LogitEdits([best], [1.0], [1.0])]).token_ids
    edits = LogitEdits([best], [1.0], [1.0])
    s = part(1, 0, PROMPT, subject.table(20), edits=[edits], top=0)
    plan = Plan(1, [s])
    handle = subject.executor.submit(plan)
    s.block_table[:] = [0] * 9
    edits.add[0] = float("-inf")
    assert subject.executor.result(handle).slices[1].token_ids == expected


class Ranges:
    """Behind n tokens, those of [8n + 1, 8n + 9) may come."""

    ended = False

    def __init__(self, count=0):
        self.count, self.failed = count, None

    def fill(self, words_W):
        set_ids(words_W, range(8 * self.count + 1, 8 * self.count + 9))

    def accept(self, tokens):
        self.count += len(tokens)

    def fork(self):
        return Ranges(self.count)


def drafted(subject, drafts, params=GREEDY, scored=(), **extra):
    """The result of a slice that ends in drafts."""
    tokens = [*PROMPT, *drafts]
    targets = [*scored, *[SAMPLE] * (1 + len(drafts))]
    return subject.run(part(1, 0, tokens, subject.table(len(tokens)), targets, params, **extra)).slices[1]


@pytest.mark.parametrize("right", [0, 1, 3])
@pytest.mark.parametrize("params", [GREEDY, SamplingParams(temperature=1.5, top_k=40)], ids=["greedy", "noise"])
def test_every_row_samples_what_it_would_alone(subject, right, params):
    """Noise is that of the row's own position, and a row behind a wrong draft samples too."""
    truth: list[int] = []
    for _ in range(3):
        truth += subject.after([*PROMPT, *truth], params).token_ids
    drafts = [*truth[:right], *(token + 1 for token in truth[right:])]
    rows = [subject.after([*PROMPT, *drafts[:i]], params).token_ids for i in range(4)]
    assert drafted(subject, drafts, params).token_ids == [token for [token] in rows]
    assert [token for [token] in rows][: right + 1] == [*truth, *rows[3]][: right + 1]


def test_every_row_has_its_own_edits(subject):
    drafts = [5, 6, 7]
    best = [subject.after([*PROMPT, *drafts[:i]]).token_ids[0] for i in range(4)]
    edits = [None if i == 2 else ban(token) for i, token in enumerate(best)]
    alone = [subject.after([*PROMPT, *drafts[:i]], edits=[edits[i]]).token_ids[0] for i in range(4)]
    assert drafted(subject, drafts, edits=edits).token_ids == alone
    assert [a == b for a, b in zip(alone, best)] == [False, False, True, False]


def test_every_row_has_its_own_mask_which_stays_where_it_was(subject):
    drafts, mask = [3, 12, 20], Ranges()
    alone = [subject.after([*PROMPT, *drafts[:i]], mask=Ranges(i)).token_ids[0] for i in range(4)]
    other = part(2, 0, PROMPT[::-1], subject.table(20))
    unmasked = subject.run(other).slices[2].token_ids
    s = part(1, 0, [*PROMPT, *drafts], subject.table(23), [SAMPLE] * 4, mask=mask)
    got = subject.run(s, other).slices
    assert got[1].token_ids == alone and got[2].token_ids == unmasked
    assert [token - 1 >> 3 for token in alone] == [0, 1, 2, 3] and mask.count == 0


def test_allowed_tokens_hold_for_every_row(subject):
    params = SamplingParams(temperature=0.0, allowed_token_ids=(9, 33, 60))
    drafts = [5, 6, 7]
    alone = [subject.after([*PROMPT, *drafts[:i]], params).token_ids[0] for i in range(4)]
    assert drafted(subject, drafts, params).token_ids == alone and set(alone) <= {9, 33, 60}


@pytest.mark.parametrize("top", [0, 3])
def test_every_row_has_its_own_log_probabilities(subject, top):
    drafts = [5, 6, 7]
    alone = [subject.after([*PROMPT, *drafts[:i]], top=top).logprobs[0] for i in range(4)]
    got = drafted(subject, drafts, scored=PROMPT[12:], top=top)
    assert got.logprobs == alone and [record.token_id for record in got.logprobs] == got.token_ids
    assert [record.token_id for record in got.scores] == PROMPT[12:]


def test_slices_with_drafts_and_without_do_not_disturb_each_other(subject):
    tokens = {1: [*PROMPT, 5, 6], 2: PROMPT[::-1], 3: [*PROMPT[3:], 8], 4: PROMPT[5:]}
    samples = {1: 3, 2: 1, 3: 2, 4: 0}

    def parts(*ids):
        return [part(i, 0, tokens[i], subject.table(len(tokens[i])), [SAMPLE] * samples[i]) for i in ids]

    alone = {i: subject.run(*parts(i)).slices[i].token_ids for i in tokens}
    together = subject.run(*parts(4, 1, 2, 3)).slices
    assert {i: together[i].token_ids for i in tokens} == alone
    assert {i: len(alone[i]) for i in tokens} == samples
