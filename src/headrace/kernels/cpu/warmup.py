"""Compiling ahead: every kernel that serving a model, or training it, will call, run once on a few numbers."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from headrace.kernels.layers import LayerForm, LayerWeights
from headrace.kernels.ops import AttentionMeta, SampleParams
from headrace.kernels.training import TrainingOps

__all__ = ["warm_up", "warm_up_steps"]

Step = tuple[str, Callable[[], object]]
"""A name, and the call that compiles."""
WIDTH = 1024  # of a product large enough for the threads


def warm_up(
    ops: TrainingOps,
    weights: torch.dtype,
    cache: torch.dtype,
    progress: Callable[[int, int, str], None] | None,
    training: bool,
    one_call: bool,
) -> None:
    """Call each operation of `ops` once, with weights and cache of these dtypes. What is on disk is only loaded.

    progress(done, total, name) is called before each, and once more when all are done.
    """
    steps = warm_up_steps(ops, weights, cache, training, one_call)
    for done, (name, run) in enumerate(steps):
        if progress is not None:
            progress(done, len(steps), name)
        run()
    if progress is not None:
        progress(len(steps), len(steps), "")


def warm_up_steps(
    ops: TrainingOps, weights: torch.dtype, cache: torch.dtype, training: bool, one_call: bool
) -> list[Step]:
    """What `warm_up` calls. No step needs another, so several processes may share them out."""
    steps = [*_layers_steps(ops, weights, cache)] if one_call else []
    steps += [*_model_steps(ops, weights), *_logit_steps(ops)]
    if training or not one_call:
        steps += _block_steps(ops, cache)
    return [*steps, *_training_steps(ops, weights)] if training else steps


def _one_token(cache: torch.dtype) -> tuple[torch.Tensor, AttentionMeta]:
    """A cache of one block, of one layer with one head, and a step of one token."""
    ends, slots = torch.tensor([0, 1], dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
    return torch.zeros(1, 1, 2, 1, 1, 8, dtype=cache), AttentionMeta(slots[None], ends, ends[1:], slots, 1, 1)


def _layers_steps(ops: TrainingOps, weights: torch.dtype, cache: torch.dtype) -> Iterator[Step]:
    blocks, meta = _one_token(cache)
    one, at = torch.ones(16), torch.zeros(1, dtype=torch.int64)
    qkv, out, gate_up, down = (ops.store(n, k, weights) for n, k in ((24, 16), (16, 8), (32, 16), (16, 16)))
    layer = LayerWeights(one, qkv, None, None, None, out, None, one, gate_up, None, down, None, 0, None)
    layers = ops.layers(LayerForm(16, 1, 1, 8, 16, 1.0, (0, 8), (0, 16), torch.zeros(1, 8)), [layer])
    if layers is not None:
        yield "layers", lambda: layers(torch.zeros(1, 16), at, blocks, meta, 1.0)


def _block_steps(ops: TrainingOps, cache: torch.dtype) -> Iterator[Step]:
    (blocks, meta), x = _one_token(cache), torch.zeros(1, WIDTH)
    heads, table, at = torch.zeros(1, 3, 8), torch.zeros(1, 8), torch.zeros(1, dtype=torch.int64)
    yield "attention", lambda: ops.attention(heads[:, :1].contiguous(), blocks, 0, meta, 1.0)
    yield "rotary", lambda: ops.rotary(heads[:, :2], at, table)
    yield "silu_mul", lambda: ops.silu_mul(x)
    yield "store_kv", lambda: ops.store_kv_(heads[:, :1], heads[:, 1:2], blocks, 0, meta.slots_T)


def _model_steps(ops: TrainingOps, weights: torch.dtype) -> Iterator[Step]:
    x, weight, one = torch.zeros(1, WIDTH), torch.zeros(WIDTH, WIDTH, dtype=weights), torch.ones(WIDTH)
    at = torch.zeros(1, dtype=torch.int64)
    yield "linear", lambda: ops.linear(x, weight)
    yield "linear, one thread", lambda: ops.linear(x[:, :8].contiguous(), weight[:8, :8].contiguous())
    yield "embedding", lambda: ops.embedding(at, weight)
    yield "embedding of rows", lambda: ops.embedding(at, x)
    yield "rms_norm", lambda: ops.rms_norm(x, one, 1.0)
    yield "add_rms_norm", lambda: ops.add_rms_norm(x, x, one, 1.0)


def _logit_steps(ops: TrainingOps) -> Iterator[Step]:
    logits, at = torch.zeros(1, 64), torch.zeros(1, dtype=torch.int64)
    lse, mask = torch.zeros(1), torch.full((1, 2), -1, dtype=torch.int32)
    params = SampleParams(lse + 1, at, lse + 1, lse, at, at, at)
    yield "edit_logits", lambda: ops.edit_logits_(logits, at, at, lse + 1, lse)
    yield "mask_logits", lambda: ops.mask_logits_(logits, at, mask)
    yield "logsumexp", lambda: ops.logsumexp(logits, (0, 64))
    yield "score", lambda: ops.score(logits, lse, at)
    yield "top_logprobs", lambda: ops.top_logprobs(logits, lse, 2)
    yield "sample", lambda: ops.sample(logits, params)


def _training_steps(ops: TrainingOps, weights: torch.dtype) -> Iterator[Step]:
    x, at, one = torch.zeros(1, 16), torch.zeros(1, dtype=torch.int64), torch.zeros(1)
    master, first, second, grad = torch.zeros(16), torch.zeros(16), torch.zeros(16), torch.zeros(16, dtype=weights)
    stored = None if weights == torch.float32 else torch.zeros(16, dtype=weights)
    yield "rms_norm_backward", lambda: ops.rms_norm_backward(x, x, torch.ones(16, dtype=weights), 1.0, (0, 1))
    wide, weight = torch.zeros(WIDTH, 16), torch.zeros(16, WIDTH, dtype=weights)
    yield "linear_backward_input", lambda: ops.linear_backward_input(wide, weight, ((0, 0, 0, 16),))
    yield (
        "linear_backward_input, one thread",
        lambda: ops.linear_backward_input(x, weight[:, :8].contiguous(), ((0, 0, 0, 16),)),
    )
    yield "linear_backward_weight", lambda: ops.linear_backward_weight(wide, wide)
    yield "linear_backward_weight, one thread", lambda: ops.linear_backward_weight(x, x)
    heads = torch.zeros(1, 1, 8)
    yield (
        "attention_backward",
        lambda: ops.attention_backward(
            heads, heads, heads, heads, heads, one[None], torch.tensor([0, 1], dtype=torch.int32), 1.0
        ),
    )
    yield "silu_mul_backward", lambda: ops.silu_mul_backward(x[:, :8].contiguous(), x)
    yield "cross_entropy_backward", lambda: ops.cross_entropy_backward_(x.clone(), one, at, one)
    yield (
        "adamw",
        lambda: ops.adamw_(
            master, grad, first, second, stored, rate=0.0, beta1=0.9, beta2=0.9, eps=1.0, decay=0.0, step=1, scale=1.0
        ),
    )
    yield "sum_of_squares", lambda: ops.sum_of_squares(grad, 8)
    yield "dropout", lambda: ops.dropout(x, 0, at, 0, 0.5)
