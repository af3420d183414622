"""The runner: only our kernels compute on the CPU, and a plan's blocks move before its tokens."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from headrace import LLM, SamplingParams
from headrace.engine.schedule.plan import SAMPLE, Plan, Slice

BOOKKEEPING = {
    "aten.empty.memory_format",
    "aten.new_empty.default",
    "aten.view.default",
    "aten.slice.Tensor",
    "aten.select.int",
    "aten.detach.default",
    "aten.alias.default",
    "aten.as_strided.default",
    "aten.split_with_sizes.default",
    "aten.split.Tensor",
    "aten.view.dtype",
    "aten.t.default",
    "aten.unsqueeze.default",
    "aten._unsafe_view.default",
    "aten.lift_fresh.default",
    "aten.empty_like.default",
    "aten.empty_strided.default",
    "aten._reshape_alias.default",
    "aten.reshape.default",
    "aten.unflatten.int",
    "aten.flatten.using_ints",
    "aten.narrow.default",
}
"""Allocation, and views of memory: they compute nothing."""


class Raiser(TorchDispatchMode):
    """Refuses every torch operation that computes."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if str(function) not in BOOKKEEPING:
            raise AssertionError(f"the CPU step called {function}")
        return function(*args, **(kwargs or {}))


@pytest.fixture(scope="module")
def llm(tinyworld_checkpoint):
    return LLM(tinyworld_checkpoint, num_kv_blocks=100)


def test_a_step_runs_only_our_kernels(llm):
    params = [
        SamplingParams(temperature=0.0, max_tokens=6, ignore_eos=True),
        SamplingParams(temperature=0.9, top_k=5, top_p=0.9, min_p=0.01, seed=1, max_tokens=6, ignore_eos=True),
        SamplingParams(repetition_penalty=1.2, logit_bias={3: 1.0}, seed=1, max_tokens=6, ignore_eos=True),
    ]
    with Raiser():
        outputs = llm.generate(["One day", "Once upon a time", "Mia"], params)
    assert all(len(o.outputs[0].token_ids) == 6 for o in outputs)


def test_the_raiser_raises():
    with pytest.raises(AssertionError, match="called"), Raiser():
        torch.ones(3) + 1


def test_blocks_move_before_tokens_are_computed(llm):
    runner = llm.frontend.engine.runner
    store = runner.store
    ids = llm.tokenizer.encode("One day Mia went to the market and found a red ball and a green hat. " * 2)[:16]
    assert len(ids) == store.block_size  # all that attention reads has been written
    greedy = SamplingParams(temperature=0.0)

    def step(table, start, tokens, **moves):
        plan = Plan(0, [Slice(1, start, tokens, table, [SAMPLE], greedy, 0, 0)], **moves)
        return runner.result(runner.submit(plan)).slices[1].token_ids

    step([90], 0, ids)
    expected = step([90, 91], 16, [5])
    store.blocks[92].zero_()
    assert step([92, 91], 16, [5]) != expected or not torch.equal(store.blocks[92], store.blocks[90])
    assert step([92, 91], 16, [5], copies=[(90, 92)]) == expected and torch.equal(store.blocks[92], store.blocks[90])
