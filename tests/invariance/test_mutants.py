"""Every axis of the matrix has a mutant: something deliberately wrong that must turn it red.

Each mutant is a mistake that a serving engine could really make, and that leaves a request alone in peace.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from headrace.cache.manager import CacheManager
from headrace.engine.run.runner import Runner
from headrace.engine.schedule.pool import RequestPool
from headrace.engine.schedule.scheduler import Scheduler
from headrace.kernels.cpu import CpuOps
from headrace.llm.records import ResumeRecord
from invariance.harness import AXES, Cell, chosen, first_difference, resume_here, run_alone, run_cell
from invariance.records import known_tokens


def sums_by_row_count(patch):
    """A product that takes another kernel, with another order of summation, for many rows."""
    right = CpuOps.linear

    def linear(self, x, weight, bias=None, bounds=None):
        return x @ weight.float().T if x.shape[0] > 8 and bias is None else right(self, x, weight, bias, bounds)

    patch.setattr(CpuOps, "linear", linear)


def sums_by_thread_count(patch):
    """A product that gives each thread a part of the sum."""

    def linear(self, x, weight, bias=None, bounds=None):
        parts = zip(x.chunk(self.threads, 1), weight.float().chunk(self.threads, 1))
        total = sum(a @ b.T for a, b in parts)
        return total if bias is None else total + bias

    patch.setattr(CpuOps, "linear", linear)


def block_at_a_time(q, blocks, layer, meta, scale, step):
    """Online softmax over `step` keys at a time: right, but with bits of its own."""
    out = torch.empty_like(q)
    size, group = blocks.shape[4], q.shape[1] // blocks.shape[3]
    for s, context in enumerate(meta.context_len_S.tolist()):
        begin, end = meta.query_start_S1[s : s + 2].tolist()
        table = meta.block_table_SM[s, : -(-context // size)].long()
        k, v = (
            blocks[table, layer, i].float().transpose(0, 1).flatten(1, 2).repeat_interleave(group, 0) for i in (0, 1)
        )
        for row in range(begin, end):
            seen = context - (end - row) + 1
            total, weight, top = 0.0, 0.0, torch.full((q.shape[1], 1), -1e30)
            for j in range(0, seen, step):
                score = (k[:, j : min(j + step, seen)] @ q[row, :, :, None])[..., 0] * scale
                new = torch.maximum(top, score.amax(1, keepdim=True))
                e, fade = (score - new).exp(), (top - new).exp()
                total = total * fade + (e[:, None] @ v[:, j : min(j + step, seen)])[:, 0]
                weight, top = weight * fade + e.sum(1, keepdim=True), new
            out[row] = total / weight
    return out


def attends_by_chunk(patch):
    """Attention whose splits are as long as the query, so that chunking moves them."""
    patch.setattr(
        CpuOps,
        "attention",
        lambda self, q, blocks, layer, meta, scale, window=0: block_at_a_time(
            q, blocks, layer, meta, scale, max(2, meta.max_query)
        ),
    )


def attends_by_block(patch):
    """Attention that merges one cache block after the other."""
    patch.setattr(
        CpuOps,
        "attention",
        lambda self, q, blocks, layer, meta, scale, window=0: block_at_a_time(
            q, blocks, layer, meta, scale, blocks.shape[4]
        ),
    )


def shares_the_wrong_blocks(patch):
    """A prefix cache that hands out the right blocks in the wrong order."""
    right = CacheManager.adopt
    patch.setattr(CacheManager, "adopt", lambda self, kv, path: right(self, kv, path[::-1]))


def noise_by_epoch(patch):
    """Noise that counts how often a request was admitted."""
    right = RequestPool.preempt

    def preempt(self, request, plan):
        right(self, request, plan)
        request.seed += 1

    patch.setattr(RequestPool, "preempt", preempt)


def swaps_in_reverse(patch):
    """Swapped blocks that come back in the wrong order."""
    right = Runner.submit

    def submit(self, plan):
        slots = [slot for slot, _ in plan.swap_in]
        plan.swap_in = list(zip(reversed(slots), (block for _, block in plan.swap_in)))
        return right(self, plan)

    patch.setattr(Runner, "submit", submit)


def noise_by_arrival(patch):
    """Noise that counts requests as they arrive."""
    right = Scheduler.add

    def add(self, request):
        right(self, request)
        request.seed = request.arrival

    patch.setattr(Scheduler, "add", add)


def forgets_what_is_output(patch):
    """A record that counts the output so far as prompt, so that penalties no longer see it."""
    right = ResumeRecord.requests

    def requests(self, request_ids, weights_version):
        [choice] = self.output.outputs
        params = replace(self.params, max_tokens=self.params.max_tokens - len(choice.token_ids))
        changed = ResumeRecord.begin("", None, known_tokens(self), params, self.priority)
        return right(changed, request_ids, weights_version)

    patch.setattr(ResumeRecord, "requests", requests)


def mixes_up_previous(patch):
    """A planned token that resolves to the neighbour's."""
    right = Runner._resolve_previous

    def resolve(self, batch):
        rows = list(self._sampled)
        batch.previous = [(row, rows[0]) for row, _ in batch.previous]
        right(self, batch)

    patch.setattr(Runner, "_resolve_previous", resolve)


def sums_what_it_holds_at_once(patch):
    """A rank that does not keep its virtual shards apart; alone, with all four, it does."""
    right = CpuOps.linear

    def linear(self, x, weight, bias=None, bounds=None):
        return right(self, x, weight, bias, bounds if bounds is None or len(bounds) > 3 else None)

    patch.setattr(CpuOps, "linear", linear)


class Here:
    """Resumes in this process, where the mutant lives."""

    resume = staticmethod(resume_here)


PREEMPTED = {"load": 16, "sampling": "seeded"}
MUTANTS = [
    ("load", sums_by_row_count, {"load": 16}),
    ("chunk", attends_by_chunk, {"chunk": 7}),
    ("prefix", shares_the_wrong_blocks, {"load": 2, "prefix": "warm"}),
    ("prefix", shares_the_wrong_blocks, {"load": 2, "prefix": "in-flight"}),
    ("preemption", noise_by_epoch, {**PREEMPTED, "preemption": "recompute"}),
    ("preemption", swaps_in_reverse, {**PREEMPTED, "preemption": "swap"}),
    ("block_size", attends_by_block, {"block_size": 8}),
    ("order", noise_by_arrival, {"load": 16, "sampling": "seeded", "order": "reverse"}),
    ("threads", sums_by_thread_count, {"threads": 1}),
    ("resumed", forgets_what_is_output, {"load": 64, "sampling": "penalised", "resumed": True}),
    ("depth", mixes_up_previous, {"load": 16, "depth": 2}),
    ("ranks", sums_what_it_holds_at_once, {"load": 2, "ranks": 2}),
]


@pytest.mark.parametrize(("axis", "mutant", "changes"), MUTANTS, ids=[f"{a}-{m.__name__}" for a, m, _ in MUTANTS])
def test_mutant_turns_its_axis_red(axis, mutant, changes, folders, alone, monkeypatch):
    cell = Cell(**changes)
    right = run_cell(cell, folders[cell.model], Here())
    assert first_difference(alone(cell.model, cell.sampling), right) is None
    mutant(monkeypatch)
    expected = run_alone(cell.model, cell.sampling, folders[cell.model], chosen(cell))
    assert first_difference(expected, run_cell(cell, folders[cell.model], Here())) is not None


def test_every_axis_has_a_mutant():
    what_is_asked = {"model", "sampling"}
    assert {axis for axis, _, _ in MUTANTS} == set(AXES) - what_is_asked
