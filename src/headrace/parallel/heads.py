"""How attention's heads lie on ranks and virtual shards.

A virtual shard is a run of query heads with the kv heads they read. Where several shards read one kv head, every rank
that needs it holds a copy; gradients are taken by shard all the same, so in training each shard has a *virtual* kv
head of its own, and their gradients are added in one tree whatever the degree.
"""

from __future__ import annotations

import math
from dataclasses import replace

from headrace.config import ModelConfig
from headrace.errors import ConfigError
from headrace.kernels.shards import OutputShards
from headrace.parallel.group import RankGroup

__all__ = ["HeadLayout"]


class HeadLayout:
    """The heads of this rank: `heads` query heads and `kv_heads` kv heads, or `virtual_kv_heads` in training."""

    def __init__(self, config: ModelConfig, group: RankGroup) -> None:
        """Raises `ConfigError` where the heads cannot be divided so."""
        n, heads, kv_heads, shards = group.size, config.num_heads, config.num_kv_heads, config.shards
        group.require_shards(shards)
        if kv_heads % n and n % kv_heads:
            raise ConfigError(f"tensor parallelism of {n} neither divides nor is a multiple of num_kv_heads={kv_heads}")
        self.dim = config.head_dim
        self.heads = heads // n
        self.kv_heads = max(1, kv_heads // n)
        self._shard_heads = heads // shards
        self._per_kv = heads // kv_heads
        self._unit = math.gcd(self._shard_heads, self._per_kv)
        self._shards = shards
        self.virtual_kv_heads = self.heads // self._unit
        self.q_bounds = tuple(i * self._shard_heads * self.dim for i in range(shards + 1))
        pieces = math.gcd(shards, kv_heads)
        self.kv_bounds = tuple(i * kv_heads // pieces * self.dim for i in range(pieces + 1))

    def output_shards(self, group: RankGroup) -> OutputShards:
        """How this rank's virtual shards lie in the fused product, a virtual kv head for each run of its readers."""
        own = group.own(self._shards)
        first_q, first_kv = self.q_bounds[own.start], self.kv_bounds[group.own(len(self.kv_bounds) - 1).start]
        queries, keys = [], []
        for shard in own:
            queries.append([(self.q_bounds[shard] - first_q, self.q_bounds[shard + 1] - first_q)])
            first = shard * self._shard_heads
            read = [q // self._per_kv for q in range(first, first + self._shard_heads, self._unit)]
            keys.append([(head * self.dim - first_kv, (head + 1) * self.dim - first_kv) for head in read])
        widths = [self.heads * self.dim, self.kv_heads * self.dim, self.kv_heads * self.dim]
        shards = OutputShards.of([queries, keys, keys], widths)
        replicas = group.size // math.gcd(group.size, len(self.kv_bounds) - 1)
        if replicas == 1:
            return shards
        return replace(
            shards, shared_from=widths[0], sum_shared=lambda g: group.all_reduce(g, "kv_gradient", width=replicas)
        )
