"""Activation recomputation: what backward computes again instead of keeping (Korthikanti et al., 2022, section 5).

At every setting the attention kernels keep only queries, keys and values, never the scores. "selective" drops these
too, and recomputes the attention of a block; "full" keeps only a block's input. The second forward has the bits of the
first, so gradients equal those of "none".
"""

from __future__ import annotations

from functools import partial

from torch.utils.checkpoint import checkpoint

from headrace.model.transformer import Transformer

__all__ = ["recompute_"]


def recompute_(model: Transformer, what: str) -> None:
    """Make blocks ("full") or their attention ("selective") recompute in backward; "none" changes nothing."""
    if what == "none":
        return
    for block in model.blocks:
        part = block if what == "full" else block.attention
        # Forward draws no random numbers: dropout is a hash.
        part.forward = partial(  # type: ignore[method-assign]
            checkpoint, part.forward, use_reentrant=False, preserve_rng_state=False
        )
