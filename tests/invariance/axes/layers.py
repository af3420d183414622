"""Whether the model's blocks run operation by operation or as one compiled call."""

from dataclasses import replace

import torch

from headrace.kernels.cpu.layers import APART
from headrace.kernels.cpu.program import CpuLayers
from headrace.kernels.ops import AttentionMeta
from invariance.axis import Axis, Mutant


def prepare(engine, requests, layers):
    if layers == "op by op":
        engine.runner._shard.layers = None


def a_stage_is_over_early(patch):
    """The second stage counts a task as done that no thread has run."""
    counters = CpuLayers._counters

    def wrong(self, halves):
        made = counters(self, halves)
        for word in (1 + 2 * 1, 1 + 2 * 1 + 1):  # the ticket and the done of stage 1, after the sleepers
            made[word * APART // 8] = 1
        return made

    patch.setattr(CpuLayers, "_counters", wrong)


def the_last_steps_meta(patch):
    """A step of as many rows as the one before attends with that one's lengths."""
    call, seen = CpuLayers.__call__, list[AttentionMeta]()

    def wrong(self, x, positions, blocks, meta, scale):
        seen.append(meta)
        last = seen[-2] if len(seen) > 1 else meta
        if last.block_table_SM.shape == meta.block_table_SM.shape and torch.equal(
            last.query_start_S1, meta.query_start_S1
        ):
            meta = replace(meta, context_len_S=last.context_len_S)
        return call(self, x, positions, blocks, meta, scale)

    patch.setattr(CpuLayers, "__call__", wrong)


AXIS = Axis(
    values=("op by op", "one call"),
    prepare=prepare,
    mutants=(
        Mutant(a_stage_is_over_early, layers="one call"),
        Mutant(the_last_steps_meta, layers="one call"),
    ),
)
