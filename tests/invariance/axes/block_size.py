"""Tokens in a block of the KV cache."""

from headrace.kernels.cpu import CpuOps
from invariance.axis import Axis, Mutant, Setup
from invariance.wrong_attention import block_at_a_time


def setup(setup: Setup, size: int) -> None:
    setup.options["block_size"] = size


def attends_by_block(patch):
    """Attention that merges one cache block after the other."""
    patch.setattr(
        CpuOps,
        "attention",
        lambda self, q, blocks, layer, meta, scale, window=0: block_at_a_time(
            q, blocks, layer, meta, scale, blocks.shape[4]
        ),
    )


AXIS = Axis(values=(16, 8, 32), setup=setup, mutants=(Mutant(attends_by_block, block_size=8),))
