"""The linears of a transformer block, each owning its weights, its split and its place in a checkpoint.

Megatron-LM's pairing (section 3): a column-parallel linear splits its outputs, a row-parallel one its inputs,
and sums. The sum has one shape at every tensor-parallel degree: V virtual shards, each summed alone, then a
balanced tree (`bounds` of `Ops.linear`). At degree 1, the only degree so far, the whole tree is local.

What computes a linear is its *kernel slot*, `kernel(x) -> y`; quantization replaces it after loading.

    T tokens   K inputs   N outputs   V vocabulary   D hidden
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from headrace.kernels.ops import Ops, vocab_bounds

__all__ = ["ColumnParallelLinear", "LMHead", "LinearKernel", "RowParallelLinear", "VocabParallelEmbedding"]


@dataclass(slots=True)
class LinearKernel:
    """The default kernel slot: `Ops.linear` on the weight as it is stored."""

    ops: Ops
    weight_NK: Tensor
    bias_N: Tensor | None
    bounds: tuple[int, ...] | None

    def __call__(self, x_TK: Tensor) -> Tensor:
        """x @ weight.T + bias, [T, N] fp32."""
        return self.ops.linear(x_TK, self.weight_NK, self.bias_N, self.bounds)


class _ParallelLinear(nn.Module):
    """Weight [N, K] in the model's dtype, uninitialised; bias [N] in fp32; and the kernel slot."""

    weight: nn.Parameter
    bias: nn.Parameter | None

    def __init__(self, ops: Ops, inputs: int, outputs: int, bias: bool, dtype: torch.dtype,
                 bounds: tuple[int, ...] | None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(outputs, inputs, dtype=dtype, device=ops.device))
        self.bias = nn.Parameter(torch.zeros(outputs, device=ops.device)) if bias else None
        self.kernel: Callable[[Tensor], Tensor] = LinearKernel(ops, self.weight, self.bias, bounds)

    def __call__(self, x_TK: Tensor) -> Tensor:
        """[T, K] → [T, N]. Straight to the kernel slot: module hooks would cost more than the call."""
        return self.kernel(x_TK)

    def init_(self, generator: torch.Generator, std: float) -> None:
        """Normal weights with standard deviation `std`; zero bias."""
        _normal_(self.weight, generator, std)
        if self.bias is not None:
            self.bias.detach().zero_()


class ColumnParallelLinear(_ParallelLinear):
    """Outputs split over ranks. Linears on one input (q, k and v) are fused, one *part* after another.

    `parts` are (checkpoint name, outputs): a rank will hold its share of every part.
    """

    def __init__(self, ops: Ops, inputs: int, parts: Sequence[tuple[str, int]], *, bias: bool,
                 dtype: torch.dtype) -> None:
        super().__init__(ops, inputs, sum(width for _, width in parts), bias, dtype, bounds=None)
        self.parts = tuple(parts)

    def tensors(self, prefix: str) -> Iterator[tuple[str, Tensor]]:
        """(checkpoint name, view of its rows) of every part's weight and bias, to be read or filled."""
        start = 0
        for name, width in self.parts:
            yield f"{prefix}{name}.weight", self.weight.detach()[start : start + width]
            if self.bias is not None:
                yield f"{prefix}{name}.bias", self.bias.detach()[start : start + width]
            start += width


class RowParallelLinear(_ParallelLinear):
    """Inputs split over ranks at the virtual shards' offsets, `bounds`; the bias comes after their sum."""

    def __init__(self, ops: Ops, name: str, bounds: tuple[int, ...], outputs: int, *, bias: bool,
                 dtype: torch.dtype) -> None:
        super().__init__(ops, bounds[-1], outputs, bias, dtype, bounds)
        self.name = name

    def tensors(self, prefix: str) -> Iterator[tuple[str, Tensor]]:
        """(checkpoint name, view) of the weight and the bias, to be read or filled."""
        yield f"{prefix}{self.name}.weight", self.weight.detach()
        if self.bias is not None:
            yield f"{prefix}{self.name}.bias", self.bias.detach()


class VocabParallelEmbedding(nn.Module):
    """The token table [V, D], split over ranks by vocabulary at `vocab_bounds`."""

    def __init__(self, ops: Ops, vocab_size: int, width: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.ops = ops
        self.weight = nn.Parameter(torch.empty(vocab_size, width, dtype=dtype, device=ops.device))

    def __call__(self, ids_T: Tensor) -> Tensor:
        """Token ids [T] → [T, D] fp32."""
        return self.ops.embedding(ids_T, self.weight)

    def init_(self, generator: torch.Generator, std: float) -> None:
        """Normal weights with standard deviation `std`."""
        _normal_(self.weight, generator, std)

    def tensors(self, prefix: str) -> Iterator[tuple[str, Tensor]]:
        """(checkpoint name, view) of the table, to be read or filled."""
        yield f"{prefix}.weight", self.weight.detach()


class LMHead(nn.Module):
    """Hidden rows → logits over the unpadded vocabulary; `bounds` are the shards of its log-sum-exp.

    `tied` is the embedding whose table it reads; without one it owns a table.
    """

    def __init__(self, ops: Ops, vocab_size: int, width: int, shards: int, dtype: torch.dtype,
                 tied: VocabParallelEmbedding | None = None) -> None:
        super().__init__()
        weight = tied.weight if tied is not None else nn.Parameter(
            torch.empty(vocab_size, width, dtype=dtype, device=ops.device))
        self.weight = weight
        self.tied = tied is not None
        self.bounds = vocab_bounds(vocab_size, shards)
        self.kernel: Callable[[Tensor], Tensor] = LinearKernel(ops, weight, None, None)

    def __call__(self, x_RD: Tensor) -> Tensor:
        """[R, D] → logits [R, V] fp32."""
        return self.kernel(x_RD)

    def init_(self, generator: torch.Generator, std: float) -> None:
        """Normal weights with standard deviation `std`; a tied table is the embedding's to initialise."""
        if not self.tied:
            _normal_(self.weight, generator, std)

    def tensors(self, prefix: str) -> Iterator[tuple[str, Tensor]]:
        """(checkpoint name, view) of the table, or nothing where it is the embedding's."""
        if not self.tied:
            yield f"{prefix}.weight", self.weight.detach()


def _normal_(weight: Tensor, generator: torch.Generator, std: float) -> None:
    # Drawn in fp32 on the host, so that a seed means the same weights on every device.
    weight.detach().copy_(torch.empty(weight.shape).normal_(0.0, std, generator=generator))
