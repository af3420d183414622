"""The linears of a transformer block, each owning its weights, its split and its place in a checkpoint.

Megatron-LM's pairing (section 3): a column-parallel linear splits its outputs, a row-parallel one its inputs,
and sums. The sum has one shape at every tensor-parallel degree: V virtual shards, each summed alone, then a
balanced tree (`bounds` of `Ops.linear`), whose lower levels lie inside a rank and whose upper ones are the group's.

What computes a linear is its *kernel slot*, `kernel(x) -> y`; quantization replaces it after loading. What writes into
the residual stream also has a slot for its output, `after(y) -> y`, the identity unless dropout replaces it.

    T tokens   K inputs   N outputs   V vocabulary   D hidden
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn

from headrace.kernels.base import LinearKernel
from headrace.kernels.ops import Kernel, Ops
from headrace.kernels.panels import Panels, Weight, rows_of
from headrace.kernels.shards import OutputShards, vocab_bounds
from headrace.kernels.vocab import VocabPart
from headrace.parallel.group import RankGroup
from headrace.parallel.heads import HeadLayout
from headrace.parallel.operators import f, f_rows, g, g_rows, shared
from headrace.parallel.pieces import Piece, Streams

__all__ = [
    "ColumnParallelLinear",
    "LMHead",
    "QKVParallelLinear",
    "RowParallelLinear",
    "VocabParallelEmbedding",
]


class _ParallelLinear(nn.Module):
    """Weight [N, K] in the model's dtype, uninitialised; bias [N] in fp32; and the kernel slot."""

    weight: nn.Parameter | Panels
    bias: nn.Parameter | None
    kernel: Kernel

    def __init__(self, ops: Ops, inputs: int, outputs: int, bias: bool, dtype: torch.dtype, group: RankGroup) -> None:
        super().__init__()
        self.group = group
        self.weight = _parameter(ops.matrix(outputs, inputs, dtype))
        self.bias = nn.Parameter(torch.zeros(outputs, device=ops.device)) if bias else None

    def __call__(self, x_TK: Tensor) -> Tensor:
        """[T, K] → [T, N]. Straight to the kernel slot: module hooks would cost more than the call."""
        return self.kernel(x_TK)

    @property
    def plain(self) -> bool:
        """Whether this is the product of its weight and bias on rows that every rank has, with slots as they were."""
        return not self.group.sequence and isinstance(self.kernel, LinearKernel)

    def tensors(self, prefix: str) -> Iterator[tuple[str, Piece]]:
        """(checkpoint name, this rank's piece) of every weight and bias, to be read or filled."""
        raise NotImplementedError

    def init_(self, streams: Streams, std: float) -> None:
        """Normal weights with standard deviation `std`; zero bias."""
        for _, piece in self.tensors(""):
            if piece.tensor.ndim == 2:
                streams.normal_(piece, std)
            else:
                piece.tensor.zero_()


class ColumnParallelLinear(_ParallelLinear):
    """Outputs split over ranks. Linears on one input (gate and up) are fused, one *part* after another.

    A part is (checkpoint name, offsets of its virtual shards, and its end). The input is whole on every rank.
    """

    def __init__(
        self,
        ops: Ops,
        inputs: int,
        parts: Sequence[tuple[str, tuple[int, ...]]],
        *,
        bias: bool,
        dtype: torch.dtype,
        group: RankGroup,
        purpose: str,
        outputs: OutputShards | None = None,
    ) -> None:
        """`outputs`: how the virtual shards lie, if they are not the parts' pieces."""
        spans = [_span(bounds, group) for _, bounds in parts]
        super().__init__(ops, inputs, sum(stop - start for start, stop in spans), bias, dtype, group)
        self.parts = tuple(parts)
        self.purpose = purpose
        outputs = outputs or OutputShards.of([_own_shards(bounds, group) for _, bounds in parts])
        self.kernel = ops.column_kernel(self.weight, self.bias, outputs)

    def __call__(self, x_TK: Tensor) -> Tensor:
        """[T, K] → [T, N], N being this rank's outputs."""
        return self.kernel(_enter(x_TK, self.group, self.purpose))

    def tensors(self, prefix: str) -> Iterator[tuple[str, Piece]]:
        """(checkpoint name, this rank's rows) of every part's weight and bias."""
        at = 0
        for name, bounds in self.parts:
            start, stop = _span(bounds, self.group)
            rows = slice(at, at + stop - start)
            yield f"{prefix}{name}.weight", Piece.of_weight(self.weight, 0, bounds, self.group, rows)
            if self.bias is not None:
                yield f"{prefix}{name}.bias", Piece.split(self.bias.detach()[rows], 0, bounds, self.group)
            at = rows.stop


class QKVParallelLinear(ColumnParallelLinear):
    """Queries, keys and values in one product, as heads. Ranks that share a kv head each hold its rows."""

    def __init__(
        self,
        ops: Ops,
        inputs: int,
        heads: HeadLayout,
        *,
        bias: bool,
        dtype: torch.dtype,
        group: RankGroup,
        purpose: str,
    ) -> None:
        parts = (("q_proj", heads.q_bounds), ("k_proj", heads.kv_bounds), ("v_proj", heads.kv_bounds))
        super().__init__(
            ops, inputs, parts, bias=bias, dtype=dtype, group=group, purpose=purpose, outputs=heads.output_shards(group)
        )
        kv_heads = heads.virtual_kv_heads if ops.columns_per_shard else heads.kv_heads
        self.split = (heads.heads, kv_heads, kv_heads)
        self.shape = (-1, sum(self.split), heads.dim)

    def heads(self, x_TD: Tensor) -> tuple[Tensor, ...]:
        """[T, D] → q [T, H, d], k and v [T, G, d] of this rank's heads, views of one product."""
        return self(x_TD).view(self.shape).split_with_sizes(self.split, 1)


class RowParallelLinear(_ParallelLinear):
    """Inputs split over ranks at the virtual shards' offsets, `bounds`; the bias comes after their sum."""

    def __init__(
        self,
        ops: Ops,
        name: str,
        bounds: tuple[int, ...],
        outputs: int,
        *,
        bias: bool,
        dtype: torch.dtype,
        group: RankGroup,
        purpose: str,
    ) -> None:
        start, stop = _span(bounds, group)
        super().__init__(ops, stop - start, outputs, bias, dtype, group)
        self.ops = ops
        self.name = name
        self.bounds = bounds
        self.purpose = purpose
        self.after: Callable[[Tensor], Tensor] = _as_it_is
        self.own_bounds = (0, *(b - start for _, b in _pairs(bounds, group)))
        self.kernel = ops.row_kernel(self.weight, self.bias if group.size == 1 else None, self.own_bounds)

    @property
    def plain(self) -> bool:
        return super().plain and self.after is _as_it_is

    def __call__(self, x_TK: Tensor) -> Tensor:
        """[T, K], K being this rank's inputs → [T, N], the same on every rank."""
        return self.after(self.over_ranks(self.kernel(x_TK)))

    def over_ranks(self, y_TN: Tensor) -> Tensor:
        """Sum y [T, N] over the ranks, then add the bias. With one rank the kernel has added it, and y is returned."""
        if self.group.size == 1:
            return y_TN
        y_TN = _leave(y_TN, self.group, self.purpose)
        if self.bias is None:
            return y_TN
        return self.ops.add_bias(y_TN, shared(self.bias, self.group, self.group.sequence, "bias"))

    def tensors(self, prefix: str) -> Iterator[tuple[str, Piece]]:
        """(checkpoint name, this rank's columns) of the weight, and the bias."""
        yield f"{prefix}{self.name}.weight", Piece.of_weight(self.weight, 1, self.bounds, self.group)
        if self.bias is not None:
            yield f"{prefix}{self.name}.bias", Piece.whole(self.bias.detach(), self.group)


class VocabParallelEmbedding(nn.Module):
    """The token table [V, D], split over ranks by vocabulary at `vocab_bounds`."""

    def __init__(
        self, ops: Ops, vocab_size: int, width: int, shards: int, dtype: torch.dtype, group: RankGroup
    ) -> None:
        super().__init__()
        self.ops = ops
        self.group = group
        self.after: Callable[[Tensor], Tensor] = _as_it_is
        self.bounds = vocab_bounds(vocab_size, shards)
        self.start, self.stop = _span(self.bounds, group)
        self.weight = _parameter(ops.matrix(self.stop - self.start, width, dtype))

    def forward(self, ids_T: Tensor) -> Tensor:
        """Token ids [T] → [T, D] fp32."""
        if self.group.size == 1:
            return self.after(self.ops.embedding(ids_T, self.weight))
        return self.after(_leave(self._own_rows(ids_T), self.group, "embedding"))

    def _own_rows(self, ids_T: Tensor) -> Tensor:
        """Rows of tokens that this rank has; −0 elsewhere, to which adding a row gives just that row."""
        here_T = (ids_T >= self.start) & (ids_T < self.stop)
        out_TD = torch.full((len(ids_T), self.weight.shape[1]), -0.0, device=ids_T.device)
        rows_R = here_T.nonzero().squeeze(1)
        return out_TD.index_copy(0, rows_R, self.ops.embedding(ids_T[rows_R] - self.start, self.weight))

    def init_(self, streams: Streams, std: float, out_std: float) -> None:
        """Normal weights with standard deviation `std`."""
        streams.normal_(self._piece(), std)

    def tensors(self, prefix: str) -> Iterator[tuple[str, Piece]]:
        """(checkpoint name, this rank's rows) of the table, to be read or filled."""
        yield f"{prefix}.weight", self._piece()

    def _piece(self) -> Piece:
        return Piece.of_weight(self.weight, 0, self.bounds, self.group)


class LMHead(nn.Module):
    """Hidden rows → logits of this rank's part of the unpadded vocabulary, cut at `bounds` for its log-sum-exp.

    `tied` is the embedding whose table it reads; without one it owns a table.
    """

    def __init__(
        self,
        ops: Ops,
        vocab_size: int,
        width: int,
        shards: int,
        dtype: torch.dtype,
        group: RankGroup,
        tied: VocabParallelEmbedding | None = None,
    ) -> None:
        super().__init__()
        self.group = group
        self.bounds = vocab_bounds(vocab_size, shards)
        self.start, self.stop = _span(self.bounds, group)
        self.weight = _parameter(ops.matrix(self.stop - self.start, width, dtype)) if tied is None else tied.weight
        self.tied = tied is not None
        local = (0, *(b - self.start for _, b in _pairs(self.bounds, group)))
        self.part = VocabPart(self.start, local, group)
        self.ops = ops
        self.kernel = ops.column_kernel(self.weight, None, OutputShards.of([_own_shards(self.bounds, group)]))

    def forward(self, x_RD: Tensor) -> Tensor:
        """[R, D] → logits [R, V] fp32, V being this rank's part."""
        return self.kernel(x_RD)

    def enter(self, x_TD: Tensor) -> Tensor:
        """What stands before the product: all rows, whose gradients are summed over the ranks."""
        return _enter(x_TD, self.group, "head")

    def log_probabilities(self, x_RD: Tensor, targets_R: Tensor) -> Tensor:
        """log p(target) [R] fp32, differentiable: the bits that a server computes for them."""
        return self.ops.log_probability(self(x_RD), targets_R, self.part)

    def loss(self, x_RD: Tensor, targets_R: Tensor, weight_R: Tensor) -> tuple[Tensor, Tensor]:
        """(−Σ weight · log p(target) in fp64, log p(target) [R]); the logits never exist all at once."""
        return self.ops.head_loss(x_RD, rows_of(self.weight), targets_R, weight_R.neg(), self.part)

    def gather(self, logits_RV: Tensor) -> Tensor:
        """On rank 0 the logits of the whole vocabulary; elsewhere as they are."""
        widths = [_span(self.bounds, self.group, rank) for rank in range(self.group.size)]
        return self.group.gather_columns(logits_RV, [stop - start for start, stop in widths], "logits")

    def init_(self, streams: Streams, std: float, out_std: float) -> None:
        """Normal weights with standard deviation `std`; a tied table is the embedding's to initialise."""
        for _, piece in self.tensors(""):
            streams.normal_(piece, std)

    def tensors(self, prefix: str) -> Iterator[tuple[str, Piece]]:
        """(checkpoint name, this rank's rows) of the table, or nothing where it is the embedding's."""
        if not self.tied:
            yield f"{prefix}.weight", Piece.of_weight(self.weight, 0, self.bounds, self.group)


def _parameter(weight: Weight) -> nn.Parameter | Panels:
    return nn.Parameter(weight) if isinstance(weight, Tensor) else weight


def _as_it_is(y: Tensor) -> Tensor:
    return y


def _enter(x: Tensor, group: RankGroup, purpose: str) -> Tensor:
    if group.size == 1:
        return x
    return f_rows(x, group, purpose) if group.sequence else f(x, group, purpose)


def _leave(x: Tensor, group: RankGroup, purpose: str) -> Tensor:
    return g_rows(x, group, purpose) if group.sequence else g(x, group, purpose)


def _pairs(bounds: Sequence[int], group: RankGroup) -> list[tuple[int, int]]:
    """(start, stop) of each piece that this rank holds."""
    return [(bounds[i], bounds[i + 1]) for i in group.own(len(bounds) - 1)]


def _own_shards(bounds: Sequence[int], group: RankGroup) -> list[list[tuple[int, int]]]:
    """This rank's virtual shards, each the one piece that it has between `bounds`, counted from the rank's first."""
    pairs = _pairs(bounds, group)
    return [[(a - pairs[0][0], b - pairs[0][0])] for a, b in pairs]


def _span(bounds: Sequence[int], group: RankGroup, rank: int | None = None) -> tuple[int, int]:
    """Where a rank's pieces begin and end; this rank's without one."""
    own = group.own(len(bounds) - 1, rank)
    return bounds[own.start], bounds[own.stop]
