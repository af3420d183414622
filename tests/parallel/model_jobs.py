"""A model's loss and gradients on one rank, by checkpoint tensor and virtual shard."""

from __future__ import annotations

import hashlib
from unittest.mock import patch

import torch
from torch.utils.checkpoint import set_checkpoint_early_stop

from headrace.attention.context import packed_positions
from headrace.attention.dense import DenseContext
from headrace.config import ModelConfig
from headrace.kernels.autograd import AutogradOps
from headrace.kernels.load import load_ops
from headrace.kernels.shards import OutputShards
from headrace.model.transformer import Transformer
from headrace.train.recompute import recompute_

LENGTHS = (37, 1, 90, 64, 8)


def build(group, changes):
    shape = {
        "architecture": "Qwen3ForCausalLM",
        "vocab_size": 300,
        "hidden_size": 40,
        "intermediate_size": 172,
        "num_layers": 2,
        "num_heads": 4,
        "num_kv_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 128,
        "qk_norm": True,
    }
    config = ModelConfig(**{**shape, **changes})
    local = config.shards // group.size
    ops = AutogradOps(
        load_ops("cpu", threads=1 if group.size > 1 else 2), local, local if group.sequence else config.shards
    )
    model = Transformer(config, ops, group=group)
    model.init_weights(7, 0.3)
    return model


def digest(tensor):
    return hashlib.sha256(tensor.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()[:16]


def loss_and_gradients(group, changes, recompute="none"):
    model = build(group, changes)
    recompute_(model, recompute)
    draw = torch.Generator().manual_seed(1)
    total = sum(LENGTHS)
    ids = torch.randint(0, model.config.vocab_size, (total,), generator=draw)
    targets = torch.randint(0, model.config.vocab_size, (total,), generator=draw)
    rows = torch.arange(3, total)
    group.traffic.clear()
    ctx = DenseContext(model.ops, model.config, LENGTHS, torch.float32)
    hidden = model.hidden(ids, packed_positions(LENGTHS, model.ops.device), ctx)
    weights = torch.full((len(rows),), 1 / len(rows))
    loss, logprob = model.lm_head.loss(model.ops.embedding(rows, hidden), targets[rows], weights)
    forward = dict(group.traffic.messages)
    grads = torch.autograd.grad(loss, list(model.parameters()))
    by_memory = {p.data_ptr(): g for p, g in zip(model.parameters(), grads)}
    found = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            parameter.data.copy_(by_memory[parameter.data_ptr()])
    for name, piece in model.tensors():
        for shard, view in piece.shards(piece.tensor):
            found[f"{name} {shard}"] = digest(view)
    messages = {
        " ".join(key): [forward.get(key, 0), count - forward.get(key, 0)]
        for key, count in group.traffic.messages.items()
    }
    elements = {" ".join(key): count for key, count in group.traffic.elements.items()}
    return {
        "loss": loss.item(),
        "logprob": digest(logprob),
        "gradients": found,
        "messages": messages,
        "elements": elements,
    }


def recomputed_to_the_end(group, changes):
    """The same where backward repeats all of a block's forward, the last sum too."""
    with set_checkpoint_early_stop(False):
        return loss_and_gradients(group, changes, "full")


def adds_left_to_right(group, changes):
    """A wrong trainer: gradients of shards are added one after another, not in a tree."""
    right = vars(OutputShards)["spans"]
    wrong = property(lambda self: tuple((0, *span[1:]) for span in right.func(self)))
    with patch.object(OutputShards, "spans", wrong):
        return loss_and_gradients(group, changes)


def rounds_before_it_adds(group, changes):
    """A wrong all-reduce: sums over ranks are rounded to bf16, though those inside a rank are not."""
    right = type(group).all_reduce
    type(group).all_reduce = lambda self, x, *rest, **more: right(self, x, *rest, **more).bfloat16().to(x.dtype)
    try:
        return loss_and_gradients(group, changes)
    finally:
        type(group).all_reduce = right
