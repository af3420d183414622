"""How many tokens a step computes at most, so into how many chunks a prompt is cut."""

from headrace.kernels.cpu import CpuOps
from invariance.axis import Axis, Mutant, Setup
from invariance.wrong_attention import block_at_a_time


def setup(setup: Setup, tokens: int) -> None:
    setup.options["max_num_batched_tokens"] = tokens


def attends_by_chunk(patch):
    """Attention whose splits are as long as the query, so that chunking moves them."""
    patch.setattr(
        CpuOps,
        "attention",
        lambda self, q, blocks, layer, meta, scale, window=0: block_at_a_time(
            q, blocks, layer, meta, scale, max(2, meta.max_query)
        ),
    )


AXIS = Axis(values=(4096, 64, 7, 1), setup=setup, mutants=(Mutant(attends_by_chunk, chunk=7),))
