"""What a recipe needs of each device, in bytes, without allocating any: `headrace plan`.

The layout is the trainer's: its own model, built on torch's meta device as each rank would hold it. What backward
keeps follows from the autograd functions (`headrace.kernels.autograd`): `Part.kept` names every tensor that they save.
A step is accounted for at the moments where it is greatest.

    T tokens of a micro-batch   t those of them that a rank's stream between blocks has   D hidden   d head_dim
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
from headrace.kernels.training import TrainingOps
from headrace.kernels.vocab import CHUNK
from headrace.model.transformer import Transformer
from headrace.parallel.group import RankGroup
from headrace.train.config import RECOMPUTE, Recipe
from headrace.zero.gradients import IN_FLIGHT

__all__ = ["DEGREES", "KINDS", "MOMENTS", "STATES", "Part", "Plan", "Planner"]

DEGREES = (1, 2, 4, 8, 16)
"""Of tensor parallelism: the powers of two that can divide `model.virtual_shards`."""
STATES = ("weights", "fp32 masters", "optimizer moments", "gradients")
"""What stays from step to step."""
KINDS = (
    *STATES,
    "gathered weights",
    "gradients on their way",
    "gradients set aside",
    "activations",
    "recomputed",
    "attention's KV",
    "logits",
    "other buffers",
)
MOMENTS = ("forward", "loss", "backward begins", "backward ends", "micro-steps add")
"""At which a step's memory is looked at: the last block's forward; the head, which makes its gradients on the way; the
last block's backward and the first one's; and the sum of gradients over micro-steps."""
BLOCK_SIZE = 16
"""Of `DenseContext`'s cache."""
FP32 = 4
BATCH_INDICES, TOKEN_INDICES = 36, 64
"""Bytes of integers: for every token of a whole batch, and of the micro-batch at hand."""

Account = Mapping[str, int]
"""Bytes by `KINDS`."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What the fullest rank of a layout holds."""

    tensor: int
    copies: int
    parts: int
    """Micro-batches of a step, of all copies together."""
    rows: int
    """Of a micro-batch."""
    recompute: str
    zero: int
    """The stage at which copies share states."""
    moments: Mapping[str, Account] = field(repr=False)
    """By `MOMENTS`."""
    kept: Mapping[str, int] = field(repr=False)
    """The activations' bytes, by the name of what is kept."""

    @property
    def total(self) -> int:
        """The most bytes at any moment."""
        return max(map(_sum, self.moments.values()))

    @property
    def fullest(self) -> str:
        """The moment of that."""
        return max(self.moments, key=lambda name: _sum(self.moments[name]))


class Planner:
    """Plans of one recipe, for any layout."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self._parts: dict[int, list[Part]] = {}

    def plan(
        self,
        tensor: int,
        copies: int = 1,
        micro_batches: int | None = None,
        recompute: str | None = None,
        zero: int | None = None,
    ) -> Plan:
        """That layout's plan; what is None is the recipe's. Raises `ConfigError` for a layout that cannot be."""
        train = self.recipe.train
        parts = self._micro_batches(tensor, copies, train.micro_batches if micro_batches is None else micro_batches)
        recompute = train.recompute if recompute is None else recompute
        zero = self.recipe.parallel.zero if zero is None else zero
        return max(
            (part.plan(copies, parts, recompute, zero) for part in self.ranks(tensor)), key=lambda plan: plan.total
        )

    def over(self, tensor: int, devices: int) -> dict[str, Plan]:
        """`devices` as copies of `tensor` ranks: a plan for every kind of recomputation. Raises like `plan`."""
        if devices < tensor:
            raise ConfigError(f"{devices} devices are fewer than {tensor}")
        if devices % tensor:
            raise ConfigError(f"{devices} devices are no multiple of {tensor}")
        copies = devices // tensor
        if copies & (copies - 1):
            raise ConfigError(f"{copies} copies of the model are not a power of two")
        return {what: self.plan(tensor, copies, recompute=what) for what in RECOMPUTE}

    def greatest_micro_batch(self, tensor: int, copies: int, memory: int) -> Plan | None:
        """The plan with the fewest micro-batches that fits into `memory` bytes, or None."""
        batch = self.recipe.train.batch_size
        for parts in range(copies, batch + 1, copies):
            plan = self.plan(tensor, copies, parts)
            if plan.total <= memory:
                return plan
        return None

    def ranks(self, tensor: int) -> list[Part]:
        """What each of `tensor` ranks holds: they differ where widths do not divide evenly."""
        if tensor not in self._parts:
            self._parts[tensor] = [Part(self.recipe, tensor, rank) for rank in range(tensor)]
        return self._parts[tensor]

    def _micro_batches(self, tensor: int, copies: int, asked: int) -> int:
        """Into how many parts the trainer cuts a batch."""
        batch, parts = self.recipe.train.batch_size, max(asked, copies)
        if parts % copies:
            raise ConfigError(f"train.micro_batches={asked} is no multiple of {copies} copies of the model")
        if parts > batch:
            raise ConfigError(f"train.batch_size={batch} rows are too few for {copies} copies of the model")
        return parts


class Part:
    """One rank's part of a recipe's model, of which only shapes exist."""

    def __init__(self, recipe: Recipe, tensor: int, rank: int) -> None:
        """Raises `ConfigError` where `tensor` ranks cannot share the model."""
        config = recipe.model
        group = RankGroup.of_size(tensor, rank)
        group.sequence = recipe.parallel.sequence
        group.require_shards(config.shards)
        self.recipe, self.tensor = recipe, tensor
        self.shards = config.shards // tensor
        # Of the ops only the device is asked before anything is computed.
        nothing = cast(TrainingOps, SimpleNamespace(device=torch.device("meta")))
        self.model = Transformer(config, AutogradOps(nothing, self.shards), group=group)
        block: Any = self.model.blocks[0]
        self.heads, self.kv_heads, _ = block.attention.qkv.split
        self.inner = block.mlp.gate_up.weight.shape[0] // 2
        self.vocabulary = self.model.lm_head.stop - self.model.lm_head.start
        self.weight_bytes = _width(config.dtype)

    @cached_property
    def parameters(self) -> dict[bool, int]:
        """How many are in matrices (True), which are `weight_bytes` wide, and in vectors, which are fp32."""
        counts = {
            matrix: sum(p.numel() for p in self.model.parameters() if (p.ndim == 2) is matrix)
            for matrix in (True, False)
        }
        return counts

    def state(self, copies: int = 1, zero: int = 0) -> dict[str, int]:
        """What stays from step to step, of `copies` that share at stage `zero` (ZeRO §5, figure 1)."""
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
        """T: of `rows` full rows, padded so that the virtual shards can share them."""
        count = rows * self.recipe.train.seq_length
        return count + -count % self.recipe.model.shards

    def kept(self, rows: int, recompute: str) -> dict[str, int]:
        """Bytes that backward needs of `rows` full rows, by what they are; a name stands for it in all layers.

        Of dropout it needs nothing: what was dropped is a hash of numbers that the batch has.
        """
        T, t, D = self.tokens(rows), self._stream(rows), self.recipe.model.hidden_size
        layers = self.recipe.model.num_layers
        kept = {name: layers * n for name, n in self._kept_by_block(rows, recompute).items()}
        if kept.get("residual before a block"):
            kept["residual before a block"] -= FP32 * t * D  # the first block has none
        if self.tensor > 1:
            kept["the table's rows (at most)"] = (FP32 * D + 8) * T  # and where they go; how many, the data says
        return kept | {"stream before the last norm": FP32 * t * D, "positions, ids and rows that count": 20 * T}

    def plan(self, copies: int, parts: int, recompute: str, zero: int = 0) -> Plan:
        """Of a batch in `parts` micro-batches, shared by `copies` of the model."""
        rows = -(-self.recipe.train.batch_size // parts)
        kept = self.kept(rows, recompute)
        moments = {
            name: {kind: account.get(kind, 0) for kind in KINDS}
            for name, account in self._moments(rows, recompute, sum(kept.values()), copies, parts, zero)
        }
        return Plan(self.tensor, copies, parts, rows, recompute, zero, moments, kept)

    # ---- what is kept

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
        """Bytes that exist anew while one block's backward runs."""
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
        always = state | self._on_their_way(copies, zero) | {"gradients set aside": waiting, "activations": kept}
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
        # A parameter's gradient is there beside its place in a bucket until it is copied.
        table = (FP32 + 2 * self.weight_bytes) * self.vocabulary * D
        yield "backward ends", always | work | {"activations": first, "other buffers": max(block, rest + table)}
        if rounds > 1:
            held = max(count.bit_count() + 1 for count in range(rounds - 1)) * part
            yield "micro-steps add", always | {"gradients set aside": held, "activations": 0, "other buffers": rest}

    def _on_their_way(self, copies: int, zero: int) -> dict[str, int]:
        """What comes and goes between copies: half a bucket that is received; buckets; units that are gathered."""
        if copies == 1:
            return {}
        bucket = min(self.recipe.parallel.bucket, self.parameters[True]) * self.weight_bytes
        buffers = (IN_FLIGHT + 2) * bucket if zero >= 2 else 0
        gathered = 0
        if zero == 3:
            block = sum(p.numel() for p in self.model.blocks[0].parameters() if p.ndim == 2)
            gathered = (2 * block + self.vocabulary * self.recipe.model.hidden_size) * self.weight_bytes
        return {"gathered weights": gathered, "gradients on their way": buffers + bucket // 2}

    def _rest(self, rows: int) -> int:
        """The batch, and the rotary tables forward and back."""
        model, train = self.recipe.model, self.recipe.train
        tables = 2 * FP32 * model.max_position_embeddings * model.head_dim
        return tables + BATCH_INDICES * train.batch_size * train.seq_length + TOKEN_INDICES * self.tokens(rows)

    def _cache(self, rows: int) -> int:
        """The blocks that attention's keys and values pass through, one layer at a time."""
        train = self.recipe.train
        blocks = 1 + rows * -(-train.seq_length // BLOCK_SIZE)
        return blocks * BLOCK_SIZE * 2 * self.kv_heads * self.recipe.model.head_dim * _width(train.kv_cache_dtype)

    def _head_work(self, T: int) -> int:
        """Rows and their gradient, the weight's gradient, and a chunk's."""
        D, r, V = self.recipe.model.hidden_size, min(CHUNK, T), self.vocabulary
        return FP32 * (2 * T * D + V * D + 2 * r * D)

    def _block_work(self, rows: int) -> int:
        """The most that a block's backward takes beside what was kept."""
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
        heads = 3 * T * (q + 2 * kv)  # the rotation back, and three parts become one
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
