"""Attention that is right, but whose bits depend on where it cuts the keys: a part of several mutants."""

import torch

__all__ = ["block_at_a_time"]


def block_at_a_time(q, blocks, layer, meta, scale, step):
    """Online softmax over `step` keys at a time."""
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
