"""Activation recomputation: what backward computes again instead of keeping (Korthikanti et al., 2022, section 5).

Attention keeps only its queries, keys and values whatever the setting, never scores of every pair of tokens: the
kernels see to that. "selective" drops these too, and computes the attention part of a block again; "full" keeps
nothing of a block but its input. The second forward is the first one's bits, so gradients are those of "none".
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
        # No random numbers are drawn in forward: dropout is a hash of where it drops.
        part.forward = partial(  # type: ignore[method-assign]
            checkpoint, part.forward, use_reentrant=False, preserve_rng_state=False
        )
