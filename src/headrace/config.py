"""Flat, frozen configuration dataclasses. Each checks its values and names the field at fault."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass
from typing import Annotated

from headrace.errors import ConfigError
from headrace.typed import Amount, Bounds, Natural, OneOf, PositiveInteger, PositiveNumber, check

__all__ = ["CacheConfig", "ModelConfig", "RopeScaling"]

MOST_LAYERS = 1 << 16
"""Of a model: each takes time to build before the first error about its tensors."""
DTYPES = ("float32", "bfloat16", "float16")


def require(ok: bool, message: str) -> None:
    """Raise `ConfigError(message)` unless `ok`."""
    if not ok:
        raise ConfigError(message)


def one_of(name: str, value: str, allowed: Collection[str]) -> None:
    """Raise `ConfigError` unless `value` is one of `allowed`."""
    require(value in allowed, f"{name}={value!r} is not one of {', '.join(allowed)}")


@dataclass(frozen=True, slots=True)
class RopeScaling:
    """Rotary position scaling with tables that depend on the position alone.

    `kind` is "linear", "llama3" or "yarn". Kinds whose tables change with the sequence length (dynamic NTK,
    longrope) would make a token depend on more than its prefix, and are refused at load.
    """

    kind: Annotated[str, OneOf(("linear", "llama3", "yarn"))]
    factor: Annotated[float, Bounds(1)]
    original_max_position_embeddings: Natural = 0
    low_freq_factor: PositiveNumber = 1.0
    high_freq_factor: PositiveNumber = 4.0
    beta_fast: PositiveNumber = 32.0
    beta_slow: PositiveNumber = 1.0
    attention_factor: PositiveNumber | None = None
    mscale: Amount = 0.0
    mscale_all_dim: Amount = 0.0
    truncate: bool = True

    def __post_init__(self) -> None:
        check(self)
        require(
            self.kind == "linear" or self.original_max_position_embeddings > 0,
            f"kind={self.kind!r} needs original_max_position_embeddings, the positions that the model was trained with",
        )
        require(
            self.low_freq_factor < self.high_freq_factor,
            f"low_freq_factor={self.low_freq_factor} must be less than high_freq_factor={self.high_freq_factor}",
        )


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """Shape and family flags of one dense decoder (Llama, Mistral, Qwen2, Qwen3 and their likes).

    `virtual_shards` is V: row-parallel products and the vocabulary are summed in V parts and a balanced tree at
    every tensor-parallel degree, so V belongs to the fingerprint. Where `sliding_layers[i]` is true, layer i sees
    only the last `sliding_window` positions; empty means every layer, if a window is set. `dropout` is the
    probability with which training drops an element of what is added to the residual stream; inference ignores it.
    """

    architecture: str
    vocab_size: PositiveInteger
    hidden_size: PositiveInteger
    intermediate_size: PositiveInteger
    num_layers: Annotated[int, Bounds(1, MOST_LAYERS)]
    num_heads: PositiveInteger
    num_kv_heads: PositiveInteger
    head_dim: PositiveInteger
    max_position_embeddings: PositiveInteger
    rms_norm_eps: PositiveNumber = 1e-6
    rope_theta: Annotated[float, Bounds(1, open_low=True)] = 10000.0
    rope_scaling: RopeScaling | None = None
    tie_word_embeddings: bool = False
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    sliding_window: Natural = 0
    sliding_layers: tuple[bool, ...] = ()
    bos_token_id: Natural | None = None
    eos_token_ids: tuple[Natural, ...] = ()
    dtype: Annotated[str, OneOf(DTYPES)] = "float32"
    virtual_shards: Annotated[int, OneOf((1, 2, 4, 8, 16))] = 4
    dropout: Annotated[float, Bounds(0, 1, open_high=True)] = 0.0

    def __post_init__(self) -> None:
        check(self)
        require(
            self.num_heads % self.num_kv_heads == 0,
            f"num_heads={self.num_heads} is not a multiple of num_kv_heads={self.num_kv_heads}",
        )
        require(self.head_dim % 2 == 0, f"head_dim={self.head_dim} must be even for rotary positions")
        require(
            len(self.sliding_layers) in (0, self.num_layers),
            f"sliding_layers has {len(self.sliding_layers)} entries for {self.num_layers} layers",
        )

    @property
    def shards(self) -> int:
        """V as used: the greatest common divisor of `virtual_shards` and the head count."""
        return math.gcd(self.virtual_shards, self.num_heads)

    def window(self, layer: int) -> int:
        """Positions that `layer` attends to, the current one included; 0 for all of them."""
        if self.sliding_layers and not self.sliding_layers[layer]:
            return 0
        return self.sliding_window


@dataclass(frozen=True, slots=True)
class CacheConfig:
    """The paged KV cache. `memory_bytes` 0 lets the engine choose; `num_blocks` overrides it (tests)."""

    block_size: int = 16
    memory_bytes: Natural = 0
    num_blocks: Natural = 0
    swap_bytes: Natural = 0
    dtype: Annotated[str, OneOf(DTYPES)] = "float32"
    prefix_caching: bool = True

    def __post_init__(self) -> None:
        check(self)
        require(
            self.block_size in (1, 2, 4, 8, 16, 32, 64, 128, 256),
            f"block_size={self.block_size} must be a power of two from 1 to 256 (splits are 256 tokens)",
        )
