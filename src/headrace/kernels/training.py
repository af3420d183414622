"""What training adds to the op set: gradients, the optimizer, dropout.

Shape suffixes are those of `headrace.kernels.ops`; g_… is the gradient of the loss by …. An element's bits never depend
on where it stands: a range of columns, or of a flat tensor, computed alone equals that range of the whole.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from headrace.kernels.ops import Ops
from headrace.kernels.shards import Span

__all__ = ["TrainingOps"]


class TrainingOps(Ops, Protocol):
    """What a trainer needs in addition."""

    def rms_norm_backward(
        self, g_TD: Tensor, x_TD: Tensor, weight_D: Tensor, eps: float, bounds: Sequence[int]
    ) -> tuple[Tensor, Tensor]:
        """(g_x [T, D], g_weight [S, D] fp32) of `rms_norm`; any leading axes count as T rows.

        `bounds` = (0, …, T) cuts the rows into S shards, each summed alone for the weight's gradient (an empty one is
        zeros): chunks of 64 rows counted from the shard's first, each in order, then a balanced tree over the chunks,
        neighbours first, an odd one passing up. The caller adds the shards.
        """
        ...

    def linear_backward_input(self, g_TN: Tensor, weight_NK: Tensor, spans: Sequence[Span]) -> Tensor:
        """g_x [T, K] of `linear`: the sum of g[:, column] · weight[row] over what the spans name.

        A shard's spans are cut into chunks of 256 terms from the start of each; a chunk is one chain of FMAs, chunks
        are added in order, then the shards (1, 2, 4, 8 or 16; each has a span, if an empty one) in a balanced tree.
        """
        ...

    def linear_backward_weight(self, g_TN: Tensor, x_TK: Tensor, into_NK: Tensor | None = None) -> Tensor:
        """g_weight [N, K] fp32 of `linear`, or `into_NK` to which it has been added: Σ g[t, n] · x[t, k].

        The sum over t is one shard's in chunks of 256 rows, as above, so rows that come in multiples of 256 may come in
        several calls.
        """
        ...

    def attention_backward(
        self,
        g_THd: Tensor,
        q_THd: Tensor,
        k_TGd: Tensor,
        v_TGd: Tensor,
        out_THd: Tensor,
        lse_TH: Tensor,
        query_start_S1: Tensor,
        scale: float,
        window: int = 0,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(g_q, g_k, g_v) of `attention` over whole sequences, rows `query_start[s] : query_start[s + 1]` each.

        k and v, all in fp32, are as the cache holds them, and may be strided views whose last axis is contiguous; out
        and lse are the forward's. A kv head's gradients in a sequence depend on no other head or sequence, and sums
        have one order: over keys ascending, over query heads of the kv head, then rows, ascending.
        """
        ...

    def silu_mul_backward(self, g_TI: Tensor, gate_up_T2I: Tensor) -> Tensor:
        """g_gate_up [T, 2I] of `silu_mul`."""
        ...

    def cross_entropy_backward_(self, logits_RV: Tensor, lse_R: Tensor, targets_R: Tensor, g_R: Tensor) -> None:
        """logits[r, v] ← g[r] · ([v = target] − exp(z − lse)): the gradient of Σ g · log p(target).

        Target -1: the row's target lies in another rank's part of the vocabulary.
        """
        ...

    def adamw_(
        self,
        master: Tensor,
        grad: Tensor,
        first: Tensor,
        second: Tensor,
        stored: Tensor | None,
        *,
        rate: float,
        beta1: float,
        beta2: float,
        eps: float,
        decay: float,
        step: int,
        scale: float,
    ) -> None:
        """One step of AdamW on flat contiguous tensors of one length; `step` counts from 1.

        master and the moments are fp32, grad fp32, bf16 or fp16, and so is `stored`, which receives the master,
        rounded. With g = grad · scale: first += (1 − β1)·(g − first), second = β2·second + (1 − β2)·g², and
        master = master·(1 − rate·decay) − rate/(1 − β1ᵗ) · first / (√second/√(1 − β2ᵗ) + eps).
        """
        ...

    def sum_of_squares(self, flat: Tensor, chunk: int) -> Tensor:
        """Σ x² in fp64 of every `chunk` elements from the start of a flat fp32, bf16 or fp16 tensor."""
        ...

    def dropout(self, x_TD: Tensor, key: int, row_T: Tensor, first_feature: int, rate: float) -> Tensor:
        """x / (1 − rate) where kept, else 0; rate 0 returns x itself, and 1 is refused.

        Whether x[t, j] is kept is a function of (key modulo 2⁶⁴, row_T[t], first_feature + j) and `rate`, and of
        nothing else: the gradient of dropout is dropout of the gradient.
        """
        ...
