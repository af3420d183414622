"""The memory that a recipe needs on each device, computed without allocating it: `headrace plan`.

The layout is the trainer's: its own model, built on torch's meta device as each rank would hold it. What backward
keeps follows from the autograd functions (`headrace.kernels.autograd`), and `RankModel.kept` names every tensor saved.
Memory is computed at the moments of a step at which it may be greatest.

    T tokens of a micro-batch   t those in a rank's residual stream   D hidden   d head_dim
    H query heads   G kv heads   I intermediate   V vocabulary (H, G, I, V: this rank's)   S this rank's virtual shards
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from types import SimpleNamespace
from typing import Any, cast

import torch

from headrace.errors import ConfigError
from headrace.kernels.autograd import AutogradOps
from headrace.kernels.autograd.entropy import CHUNK
from headrace.kernels.ops import Ops
from headrace.model.transformer import Transformer
from headrace.parallel.group import RankGroup
from headrace.train.config import RECOMPUTE, Recipe
from headrace.zero.gradients import IN_FLIGHT

__all__ = ["DEGREES", "KINDS", "MOMENTS", "STATES", "MemoryPlan", "Planner", "RankModel"]

DEGREES = (1, 2, 4, 8, 16)
"""Degrees of tensor parallelism: the powers of two that can divide `model.virtual_shards`."""
STATES = ("weights", "fp32 masters", "optimizer moments", "gradients")
"""Memory that stays from step to step."""
KINDS = (
    *STATES,
    "gathered weights",
    "gradient buckets",
    "accumulated gradients",
    "activations",
    "recomputed",
    "attention's KV",
    "logits",
    "other buffers",
)
MOMENTS = ("forward", "loss", "backward begins", "backward ends", "micro-steps add")
"""The moments of a step: the last block's forward; the head, which computes its gradients in forward; the last block's
backward and the first one's; and the sum of gradients over micro-steps."""
BLOCK_SIZE = 16
"""Block size of `DenseContext`'s cache."""
FP32 = 4
BATCH_INDICES, TOKEN_INDICES = 36, 64
"""Bytes of integers for every token: of the whole batch, and of the current micro-batch."""

Account = Mapping[str, int]
"""Bytes by `KINDS`."""


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """The memory of a layout's fullest rank."""

    tensor: int
    copies: int
    parts: int
    """Micro-batches of a step, of all copies together."""
    rows: int
    """Rows of a micro-batch."""
    recompute: str
    zero: int
    """ZeRO's stage."""
    moments: Mapping[str, Account] = field(repr=False)
    """By `MOMENTS`."""
    kept: Mapping[str, int] = field(repr=False)
    """Bytes of activations kept for backward, by name."""

    @property
    def total(self) -> int:
        """Bytes at the fullest moment."""
        return max(map(_sum, self.moments.values()))

    @property
    def fullest(self) -> str:
        """The moment with the most bytes."""
        return max(self.moments, key=lambda name: _sum(self.moments[name]))


class Planner:
    """Memory plans of one recipe, for any layout."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self._parts: dict[int, list[RankModel]] = {}

    def plan(
        self,
        tensor: int,
        copies: int = 1,
        micro_batches: int | None = None,
        recompute: str | None = None,
        zero: int | None = None,
    ) -> MemoryPlan:
        """The plan of a layout; None takes the recipe's value. Raises `ConfigError` for an impossible layout."""
        train = self.recipe.train
        parts = self._micro_batches(tensor, copies, train.micro_batches if micro_batches is None else micro_batches)
        recompute = train.recompute if recompute is None else recompute
        zero = self.recipe.parallel.zero if zero is None else zero
        return max(
            (part.plan(copies, parts, recompute, zero) for part in self.ranks(tensor)), key=lambda plan: plan.total
        )

    def over(self, tensor: int, devices: int) -> dict[str, MemoryPlan]:
        """{kind of recomputation: plan} of `devices` in groups of `tensor`. Raises like `plan`."""
        if devices < tensor:
            raise ConfigError(f"{devices} devices are fewer than {tensor}")
        if devices % tensor:
            raise ConfigError(f"{devices} devices are no multiple of {tensor}")
        copies = devices // tensor
        if copies & (copies - 1):
            raise ConfigError(f"{copies} copies of the model are not a power of two")
        return {what: self.plan(tensor, copies, recompute=what) for what in RECOMPUTE}

    def greatest_micro_batch(self, tensor: int, copies: int, memory: int) -> MemoryPlan | None:
        """The plan with the fewest micro-batches that fits into `memory` bytes, or None."""
        batch = self.recipe.train.batch_size
        for parts in range(copies, batch + 1, copies):
            plan = self.plan(tensor, copies, parts)
            if plan.total <= memory:
                return plan
        return None

    def ranks(self, tensor: int) -> list[RankModel]:
        """The model on each of `tensor` ranks, which differ where widths do not divide evenly."""
        if tensor not in self._parts:
            self._parts[tensor] = [RankModel(self.recipe, tensor, rank) for rank in range(tensor)]
        return self._parts[tensor]

    def _micro_batches(self, tensor: int, copies: int, asked: int) -> int:
        """The number of parts into which the trainer cuts a batch."""
        batch, parts = self.recipe.train.batch_size, max(asked, copies)
        if parts % copies:
            raise ConfigError(f"train.micro_batches={asked} is no multiple of {copies} copies of the model")
        if parts > batch:
            raise ConfigError(f"train.batch_size={batch} rows are too few for {copies} copies of the model")
        return parts


class RankModel:
    """One rank's part of a recipe's model, as shapes without memory."""

    def __init__(self, recipe: Recipe, tensor: int, rank: int) -> None:
        """Raises `ConfigError` where `tensor` ranks cannot share the model."""
        config = recipe.model
        group = RankGroup.of_size(tensor, rank)
        group.sequence = recipe.parallel.sequence
        group.require_shards(config.shards)
        self.recipe, self.tensor = recipe, tensor
        self.shards = config.shards // tensor
        # Building the model reads only the ops' device.
        nothing = cast(Ops, SimpleNamespace(device=torch.device("meta")))
        self.model = Transformer(config, AutogradOps(nothing, self.shards), group=group)
        block: Any = self.model.blocks[0]
        self.heads, self.kv_heads = map(int, block.attention.qkv.split[:2])
        self.inner = block.mlp.gate_up.weight.shape[0] // 2
        self.vocabulary = self.model.lm_head.stop - self.model.lm_head.start
        self.weight_bytes = _width(config.dtype)

    @cached_property
    def parameters(self) -> dict[bool, int]:
        """{True: elements in matrices, of `weight_bytes` each; False: elements in vectors, which are fp32}."""
        counts = {
            matrix: sum(p.numel() for p in self.model.parameters() if (p.ndim == 2) is matrix)
            for matrix in (True, False)
        }
        return counts

    def state(self, copies: int = 1, zero: int = 0) -> dict[str, int]:
        """Bytes that stay from step to step, with `copies` at ZeRO's stage `zero` (ZeRO §5, figure 1)."""
        matrices, vectors = self.parameters[True], self.parameters[False]
        whole = self.weight_bytes * matrices + FP32 * vectors

        def shared(size: int, since: int) -> int:
            return -(-size // copies) if zero >= since else size

        narrow = FP32 * matrices if self.weight_bytes < FP32 else 0
        state = {
            "weights": shared(self.weight_bytes * matrices, 3) + FP32 * vectors,
            "fp32 masters": shared(narrow, 1),
            "optimizer moments": shared(2 * FP32 * (matrices + vectors), 1),
            "gradients": shared(whole, 2),
        }
        if self.recipe.parallel.offload_optimizer:
            state |= {"fp32 masters": 0, "optimizer moments": 0}
        return state

    def tokens(self, rows: int) -> int:
        """T of `rows` full rows, padded to a multiple of the virtual shards."""
        count = rows * self.recipe.train.seq_length
        return count + -count % self.recipe.model.shards

    def kept(self, rows: int, recompute: str) -> dict[str, int]:
        """{name: bytes kept for backward} of `rows` full rows, all layers together.

        Dropout keeps nothing: its mask is a hash of numbers in the batch.
        """
        T, t, D = self.tokens(rows), self._stream(rows), self.recipe.model.hidden_size
        layers = self.recipe.model.num_layers
        kept = {name: layers * n for name, n in self._kept_by_block(rows, recompute).items()}
        if kept.get("residual before a block"):
            kept["residual before a block"] -= FP32 * t * D  # the first block has none
        if self.tensor > 1:
            kept["the table's rows (at most)"] = (FP32 * D + 8) * T  # and their indices; the number depends on the data
        return kept | {"stream before the last norm": FP32 * t * D, "positions, ids and rows that count": 20 * T}

    def plan(self, copies: int, parts: int, recompute: str, zero: int = 0) -> MemoryPlan:
        """The plan of this rank for a batch in `parts` micro-batches over `copies` of the model."""
        rows = -(-self.recipe.train.batch_size // parts)
        kept = self.kept(rows, recompute)
        moments = {
            name: {kind: account.get(kind, 0) for kind in KINDS}
            for name, account in self._moments(rows, recompute, sum(kept.values()), copies, parts, zero)
        }
        return MemoryPlan(self.tensor, copies, parts, rows, recompute, zero, moments, kept)

    # ---- kept for backward

    def _stream(self, rows: int) -> int:
        """t"""
        return self.tokens(rows) // (self.tensor if self.recipe.parallel.sequence else 1)

    def _attention_saves(self, T: int) -> dict[str, int]:
        dim = self.recipe.model.head_dim
        return {
            "q, k, v (v is a view of them)": FP32 * T * (self.heads + 2 * self.kv_heads) * dim,
            "q and k, rotated": FP32 * T * (self.heads + self.kv_heads) * dim,
            "attention's output": FP32 * T * self.heads * dim,
            "log-sum-exp of attention": FP32 * T * self.heads,
        }

    def _mlp_saves(self, T: int) -> dict[str, int]:
        return {"gate and up": 2 * FP32 * T * self.inner, "silu(gate) · up": FP32 * T * self.inner}

    def _kept_by_block(self, rows: int, recompute: str) -> dict[str, int]:
        T, t, D = self.tokens(rows), self._stream(rows), self.recipe.model.hidden_size
        if recompute == "full":
            parallel = self.recipe.parallel
            if parallel.offload_activations or parallel.partition_activations:  # the sum of the two, or a part of it
                here = 0 if parallel.offload_activations else FP32 * -(-t * D // self.tensor)
                return {"a block's input": here, "residual before a block": 0}
            return {"a block's input": FP32 * t * D, "residual before a block": FP32 * t * D}
        attention = (
            {"attention's input": FP32 * t * D}
            if recompute == "selective"
            else {"attention's input": FP32 * T * D, **self._attention_saves(T)}
        )
        return {
            "stream before attention": FP32 * t * D,
            **attention,
            "stream before the MLP": FP32 * t * D,
            "the MLP's input": FP32 * T * D,
            **self._mlp_saves(T),
        }

    def _recomputed(self, rows: int, recompute: str) -> int:
        """Bytes recomputed while one block's backward runs."""
        if recompute == "full":
            return sum(self._kept_by_block(rows, "none").values())
        if recompute == "none":
            return 0
        T = self.tokens(rows)
        gathered = FP32 * T * self.recipe.model.hidden_size if self._stream(rows) < T else 0
        return sum(self._attention_saves(T).values()) + gathered

    # ---- the moments of a step

    def _moments(
        self, rows: int, recompute: str, kept: int, copies: int, parts: int, zero: int
    ) -> Iterator[tuple[str, Account]]:
        """(name, bytes by kind) of each of `MOMENTS`."""
        state, T, D = self.state(copies, zero), self.tokens(rows), self.recipe.model.hidden_size
        whole, rounds = self.state()["gradients"], parts // copies
        part = -(-whole // copies) if zero else whole
        waiting = max(count.bit_count() for count in range(rounds)) * part
        always = state | self._exchange(copies, zero) | {"accumulated gradients": waiting, "activations": kept}
        rest = self._rest(rows)
        messages = 2 * FP32 * T * D if self.tensor > 1 else 0
        yield "forward", always | {"attention's KV": self._cache(rows), "other buffers": rest + messages + FP32 * T * D}
        logits = FP32 * min(CHUNK, T) * self.vocabulary
        yield "loss", always | {"logits": logits, "other buffers": rest + self._head_work(T)}
        head = FP32 * D * (self.vocabulary + 2 * T)
        work = {"recomputed": self._recomputed(rows, recompute)}
        block = rest + messages + self._block_work(rows)
        yield "backward begins", always | work | {"other buffers": block + head}
        first = sum(self._kept_by_block(rows, recompute).values())
        # A parameter's gradient exists beside its bucket until it is copied into it.
        table = (FP32 + 2 * self.weight_bytes) * self.vocabulary * D
        yield "backward ends", always | work | {"activations": first, "other buffers": max(block, rest + table)}
        if rounds > 1:
            held = max(count.bit_count() + 1 for count in range(rounds - 1)) * part
            yield "micro-steps add", always | {"accumulated gradients": held, "activations": 0, "other buffers": rest}

    def _exchange(self, copies: int, zero: int) -> dict[str, int]:
        """Buffers of the collectives between copies: half a received bucket, buckets, gathered units."""
        if copies == 1:
            return {}
        bucket = min(self.recipe.parallel.bucket, self.parameters[True]) * self.weight_bytes
        buffers = (IN_FLIGHT + 2) * bucket if zero >= 2 else 0
        gathered = 0
        if zero == 3:
            block = sum(p.numel() for p in self.model.blocks[0].parameters() if p.ndim == 2)
            gathered = (2 * block + self.vocabulary * self.recipe.model.hidden_size) * self.weight_bytes
        return {"gathered weights": gathered, "gradient buckets": buffers + bucket // 2}

    def _rest(self, rows: int) -> int:
        """The batch, and the rotary tables forward and back."""
        model, train = self.recipe.model, self.recipe.train
        tables = 2 * FP32 * model.max_position_embeddings * model.head_dim
        return tables + BATCH_INDICES * train.batch_size * train.seq_length + TOKEN_INDICES * self.tokens(rows)

    def _cache(self, rows: int) -> int:
        """The temporary blocks of keys and values in `DenseContext`, of one layer at a time."""
        train = self.recipe.train
        blocks = 1 + rows * -(-train.seq_length // BLOCK_SIZE)
        return blocks * BLOCK_SIZE * 2 * self.kv_heads * self.recipe.model.head_dim * _width(train.kv_cache_dtype)

    def _head_work(self, T: int) -> int:
        """Rows and their gradient, the weight's gradient, and a chunk's rows and gradient."""
        D, r, V = self.recipe.model.hidden_size, min(CHUNK, T), self.vocabulary
        return FP32 * (2 * T * D + V * D + 2 * r * D)

    def _block_work(self, rows: int) -> int:
        """The greatest temporary memory of a block's backward."""
        T, D = self.tokens(rows), self.recipe.model.hidden_size
        dim = self.recipe.model.head_dim
        q, kv, inner = self.heads * dim, self.kv_heads * dim, self.inner
        stored = self.weight_bytes / FP32 if self.weight_bytes < FP32 else 0
        qkv = self.model.blocks[0].attention.qkv.weight.shape[0]

        def column(outputs: int, rows_of_weight: int) -> float:
            """The gradient twice, the input's; the weight's by column, by row and rounded."""
            return 2 * T * outputs + T * D + outputs * D + rows_of_weight * D * (1 + stored)

        def row(inputs: int) -> float:
            """Gradient in and out, the weight's and that rounded."""
            return T * D + T * inputs + D * inputs * (1 + stored)

        narrow_cache = 3 * T * kv if self.recipe.train.kv_cache_dtype != "float32" else 0
        attention = 2 * T * q + T * (q + 2 * kv) + narrow_cache
        heads = 3 * T * (q + 2 * kv)  # the gradient of the rotation, and the concatenation of q, k and v
        stream = 2 * self._stream(rows) * D
        return int(
            FP32
            * (
                stream
                + max(
                    column(2 * inner, 2 * inner),
                    column(q + 2 * kv, qkv),
                    row(inner),
                    row(q),
                    3 * T * inner,
                    attention,
                    heads,
                )
            )
        )


def _width(dtype: str) -> int:
    width: int = getattr(torch, dtype).itemsize
    return width


def _sum(account: Account) -> int:
    return sum(account.values())
