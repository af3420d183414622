"""The op set: everything the model computes, as one protocol with three implementations.

Tokens are packed: the first axis is T, the tokens of all sequences of a step in a row. Shape suffixes:

    T tokens   R rows with logits   D hidden   N outputs   K inputs   V vocabulary   H query heads   G kv heads
    d head_dim   S sequences   M blocks of a block table   I intermediate   P positions of a rotary table

Activations are fp32 on the CPU. A row's result never depends on other rows: every reduction has one fixed shape,
written in the kernel.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Protocol

import torch
from torch import Tensor

from headrace.kernels.layers import LayerForm, LayerWeights
from headrace.kernels.panels import Weight
from headrace.kernels.partials import Partials
from headrace.kernels.shards import OutputShards
from headrace.kernels.vocab import VocabPart

__all__ = ["AttentionMeta", "Kernel", "Layers", "Ops", "SampleParams"]

Kernel = Callable[[Tensor], Tensor]
"""What a linear's kernel slot holds: x [T, K] → [T, N] fp32."""


@dataclass(slots=True)
class AttentionMeta:
    """Where each sequence's rows and blocks are. All int32, on the ops' device.

    Rows `query_start[s] : query_start[s + 1]` belong to sequence s and are the *last* positions of its
    `context_len[s]` tokens (which count the rows themselves). `block_table[s, i]` holds positions
    `i·block_size …`; unused entries are 0, the null block. `slots[t]` is block·block_size + offset, where row t's
    key and value are stored.
    """

    block_table_SM: Tensor
    query_start_S1: Tensor
    context_len_S: Tensor
    slots_T: Tensor
    max_query: int
    max_context: int


Layers = Callable[[Tensor, Tensor, Tensor, AttentionMeta, float], tuple[Tensor, Tensor]]
"""All blocks as one call (x [T, D], positions [T], cache, meta, scale): the last block's (x, residual), [T, D] fp32,
which live until the next call. The bits are those of the single operations."""


@dataclass(slots=True)
class SampleParams:
    """Per-row sampling parameters, on the CPU. temperature 0 is argmax; top_k 0, top_p 1, min_p 0 are off.

    The Gumbel noise of a token is a function of (seed, choice, position, token id) and nothing else; `position` is
    the absolute position of the token being sampled.
    """

    temperature_R: Tensor
    top_k_R: Tensor
    top_p_R: Tensor
    min_p_R: Tensor
    seed_R: Tensor
    choice_R: Tensor
    position_R: Tensor

    def take(self, rows: list[int]) -> SampleParams:
        """The parameters of some rows."""
        return SampleParams(*(getattr(self, column.name)[rows] for column in fields(self)))


class Ops(Protocol):
    """What an implementation provides. Every method returns new tensors unless its name ends in an underscore."""

    name: str
    device: torch.device

    def fingerprint(self) -> str:
        """What the bits depend on: implementation, its version, instruction set or GPU, compiler versions."""
        ...

    def warm_up(
        self,
        weights: torch.dtype = torch.float32,
        cache: torch.dtype = torch.float32,
        progress: Callable[[int, int, str], None] | None = None,
        training: bool = False,
        one_call: bool = False,
    ) -> None:
        """Compile ahead what serving a model with these dtypes needs, and training it, if `training`.

        `one_call`: the model's blocks will run by `layers`, so what only single blocks need can wait.

        progress(done, total, name) is called before each kernel, and once more at the end. Gradients have the weights'
        dtype.
        """
        ...

    def embedding(self, ids_T: Tensor, table_VD: Weight) -> Tensor:
        """Rows of `table_VD` (fp32, bf16 or fp16) as fp32. Also picks the rows that need logits."""
        ...

    def linear(
        self,
        x_TK: Tensor,
        weight_NK: Weight,
        bias_N: Tensor | None = None,
        bounds: Sequence[int] | None = None,
    ) -> Tensor:
        """x @ weight.T + bias, fp32 sums over K in one order whatever T, N and the weight's storage are.

        `bounds` (None means (0, K)) cuts K into virtual shards. A shard is cut into chunks of 256 inputs from its
        start; a chunk is one chain of fused multiply-adds from +0, K ascending; chunks are added in order, then the
        shards in a balanced binary tree, then the bias. Weights are fp32, bf16 or fp16 and are read as they are.
        """
        ...

    def rms_norm(self, x_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
        """x · rsqrt(mean(x²) + eps) · weight, over the last axis."""
        ...

    def add_rms_norm(self, x_TD: Tensor, residual_TD: Tensor, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        """(rms_norm(r), r) with r = x + residual."""
        ...

    def rotary(
        self, x_THd: Tensor, positions_T: Tensor, table_Pd: Tensor, weight_d: Tensor | None = None, eps: float = 0.0
    ) -> Tensor:
        """Half-split rotary embedding; with `weight_d`, each head is rms-normed first (qk-norm).

        `table_Pd` holds cos in its first d/2 columns and sin in the last d/2, fp32. x may be a strided view whose
        last axis is contiguous; the result is contiguous.
        """
        ...

    def silu_mul(self, gate_up_TI: Tensor) -> Tensor:
        """silu(gate) · up, where gate and up are the two halves of the last axis."""
        ...

    def store_kv_(self, k_TGd: Tensor, v_TGd: Tensor, blocks: Tensor, layer: int, slots_T: Tensor) -> None:
        """Write keys and values into `blocks` [block, layer, 2, kv_head, token, dim], rounded to its dtype.

        k and v may be strided views whose last axis is contiguous. Slot -1 writes nothing.
        """
        ...

    def attention(
        self,
        q_THd: Tensor,
        blocks: Tensor,
        layer: int,
        meta: AttentionMeta,
        scale: float,
        window: int = 0,
        lse_TH: Tensor | None = None,
    ) -> Tensor:
        """Causal attention straight from the paged cache (PagedAttention §4.3), no gather.

        Sums over each sequence's keys in splits of `SPLIT` tokens aligned to position 0, each an
        (MA, m, e) partial, merged in a binary tree of power-of-two aligned nodes, then the maximal nodes left to
        right (Infinite-LLM's merge). With `window` > 0 a row sees only the last `window` positions, itself
        included. Returns [T, H, d], contiguous fp32; `lse_TH` receives each row's m + log e, for `attention_backward`.
        """
        ...

    def attention_partials(
        self,
        q_THd: Tensor,
        blocks: Tensor,
        layer: int,
        meta: AttentionMeta,
        scale: float,
        range_S2: Tensor,
        window: int = 0,
    ) -> Partials:
        """`attention` over a range of each sequence's context, not yet merged: one owner's part.

        `range_S2`, integers on the CPU, are positions [first, last): first is a multiple of `SPLIT`, and so is last,
        or it is not less than the context. `meta` is that of the whole context, but no block outside the range is read.
        """
        ...

    def fold_partials(
        self,
        parts: Sequence[Partials],
        ranges: Sequence[Tensor],
        meta: AttentionMeta,
        window: int = 0,
        lse_TH: Tensor | None = None,
    ) -> Tensor:
        """`attention` [T, H, d] from its owners' partials, with the same bits whatever the cut.

        `parts` and `ranges` are given in the order of the context; a range may be empty. Raises `ValueError` where the
        ranges leave out something that a row sees.
        """
        ...

    def logsumexp(self, logits_RV: Tensor, bounds: Sequence[int]) -> Tensor:
        """log Σ exp per row, fp32: `merge_logsumexp` of `logsumexp_parts`."""
        ...

    def logsumexp_parts(self, logits_RV: Tensor, bounds: Sequence[int]) -> Tensor:
        """[R, S, 2] fp32: (m, e) = (max, Σ exp(z − m)) of every vocabulary shard; an empty one is (-inf, 0)."""
        ...

    def merge_logsumexp(self, parts_RS2: Tensor) -> Tensor:
        """log Σ exp [R] of a row's shards, a power of two of them, in a balanced tree, neighbours first."""
        ...

    def score(self, logits_RV: Tensor, lse_R: Tensor, targets_R: Tensor) -> tuple[Tensor, Tensor]:
        """(log-probability fp32, rank int32 from 1) of one token per row, under the logits as they are.

        rank = 1 + number of tokens that stand before it by (logit descending, id ascending).
        """
        ...

    def top_logprobs(self, logits_RV: Tensor, lse_R: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """The k best tokens per row by (logit descending, id ascending): (log-probabilities, ids int32)."""
        ...

    def edit_logits_(self, logits_RV: Tensor, rows_E: Tensor, ids_E: Tensor, divide_E: Tensor, add_E: Tensor) -> None:
        """Sparse edits in order: z ← (z/divide if z > 0 else z·divide) + add. add = -inf bans a token."""
        ...

    def mask_logits_(self, logits_RV: Tensor, rows_E: Tensor, mask_EW: Tensor) -> None:
        """Ban every token whose bit is 0: bit (id & 31) of int32 word id >> 5 of `mask_EW`, for row rows_E[e]."""
        ...

    def sample(self, logits_RV: Tensor, params: SampleParams) -> Tensor:
        """One token id (int64) per row: argmax of z/temperature + Gumbel over the kept tokens, ties to the lowest id.

        Kept tokens: order by (z descending, id ascending); top-k keeps the first k; top-p then keeps the shortest
        prefix whose probability, renormalised after top-k, reaches p; min-p then drops those below min_p × the best.
        At least one is always kept.
        """
        ...

    def copy_blocks_(self, source: Tensor, target: Tensor, pairs: Sequence[tuple[int, int]]) -> None:
        """Copy whole blocks source[i] → target[j] in order (copy-on-write, swap)."""
        ...

    # ---- what a model's parts are made of. `BaseOps` answers these without gradients, `AutogradOps` with them.

    @property
    def columns_per_shard(self) -> bool:
        """Whether `column_kernel` gives virtual shards that share rows of a weight columns of their own.

        Gradients need that: each shard's is taken alone.
        """
        ...

    def matrix(self, rows: int, columns: int, dtype: torch.dtype) -> Weight:
        """A weight without values yet."""
        ...

    def store(self, rows: int, columns: int, dtype: torch.dtype) -> Weight:
        """A weight without values yet, for a model that only serves: as products read it fastest."""
        ...

    def layers(self, form: LayerForm, weights: Sequence[LayerWeights]) -> Layers | None:
        """A model's blocks over a paged cache as one call; None where the op set has none. Only without gradients."""
        ...

    def column_kernel(self, weight_NK: Weight, bias_N: Tensor | None, outputs: OutputShards) -> Kernel:
        """The kernel slot of a linear split by its outputs, which lie in virtual shards as `outputs` says."""
        ...

    def row_kernel(self, weight_NK: Weight, bias_N: Tensor | None, bounds: tuple[int, ...]) -> Kernel:
        """The kernel slot of a linear split by its inputs; `bounds` as in `linear`."""
        ...

    def add_bias(self, y_TN: Tensor, bias_N: Tensor) -> Tensor:
        """y + bias, where y has been summed over ranks."""
        ...

    def causal_attention(
        self,
        q_THd: Tensor,
        k_TGd: Tensor,
        v_TGd: Tensor,
        meta: AttentionMeta,
        block_size: int,
        cache_dtype: torch.dtype,
        scale: float,
        window: int = 0,
    ) -> Tensor:
        """`attention` of whole packed sequences (rows = context in `meta`): [T, H, d] fp32.

        k and v go through a paged cache of `cache_dtype` that lives for this call. Its rounding has gradient one.
        """
        ...

    def log_probability(self, logits_RV: Tensor, targets_R: Tensor, part: VocabPart) -> Tensor:
        """log p(target) [R] fp32 of logits over this rank's part of the vocabulary, of which −mean is a step's loss."""
        ...

    def head_loss(
        self, x_RD: Tensor, weight_VD: Tensor, targets_R: Tensor, weight_R: Tensor, part: VocabPart
    ) -> tuple[Tensor, Tensor]:
        """(Σ weight · log p(target) in fp64, log p(target) [R] fp32 without gradient), the head's product fused in.

        Logits exist a few hundred rows at a time.
        """
        ...
