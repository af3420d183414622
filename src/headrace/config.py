"""Flat, frozen configuration dataclasses. Each checks its values and names the field at fault."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass

from headrace.errors import ConfigError

__all__ = ["CacheConfig", "ModelConfig", "RopeScaling"]

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

    kind: str
    factor: float
    original_max_position_embeddings: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    mscale: float = 0.0
    mscale_all_dim: float = 0.0
    truncate: bool = True

    def __post_init__(self) -> None:
        one_of("rope scaling", self.kind, ("linear", "llama3", "yarn"))
        require(self.factor >= 1.0, f"rope scaling factor={self.factor} must be at least 1")


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """Shape and family flags of one dense decoder (Llama, Mistral, Qwen2, Qwen3 and their likes).

    `virtual_shards` is V: row-parallel products and the vocabulary are summed in V parts and a balanced tree at
    every tensor-parallel degree, so V belongs to the fingerprint. Where `sliding_layers[i]` is true, layer i sees
    only the last `sliding_window` positions; empty means every layer, if a window is set. `dropout` is the
    probability with which training drops an element of what is added to the residual stream; inference ignores it.
    """

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    tie_word_embeddings: bool = False
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    sliding_window: int = 0
    sliding_layers: tuple[bool, ...] = ()
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    dtype: str = "float32"
    virtual_shards: int = 4
    dropout: float = 0.0

    def __post_init__(self) -> None:
        for name in (
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_layers",
            "num_heads",
            "num_kv_heads",
            "head_dim",
            "max_position_embeddings",
        ):
            value = getattr(self, name)
            require(isinstance(value, int) and value > 0, f"{name}={value!r} must be a positive integer")
        for name in ("rms_norm_eps", "rope_theta"):
            value = getattr(self, name)
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            require(number and 0.0 < value < math.inf, f"{name}={value!r} must be a positive number")
        require(
            self.num_heads % self.num_kv_heads == 0,
            f"num_heads={self.num_heads} is not a multiple of num_kv_heads={self.num_kv_heads}",
        )
        require(self.head_dim % 2 == 0, f"head_dim={self.head_dim} must be even for rotary positions")
        one_of("dtype", self.dtype, DTYPES)
        rate = self.dropout
        require(
            isinstance(rate, (int, float)) and not isinstance(rate, bool) and 0 <= rate < 1,
            f"dropout={rate!r} must be a number, at least 0 and less than 1",
        )
        require(
            self.virtual_shards in (1, 2, 4, 8, 16), f"virtual_shards={self.virtual_shards} must be a power of two ≤ 16"
        )
        require(self.sliding_window >= 0, f"sliding_window={self.sliding_window} must not be negative")
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
    memory_bytes: int = 0
    num_blocks: int = 0
    swap_bytes: int = 0
    dtype: str = "float32"
    prefix_caching: bool = True

    def __post_init__(self) -> None:
        require(
            self.block_size in (1, 2, 4, 8, 16, 32, 64, 128, 256),
            f"block_size={self.block_size} must be a power of two from 1 to 256 (splits are 256 tokens)",
        )
        one_of("kv_cache_dtype", self.dtype, DTYPES)
        for name in ("memory_bytes", "num_blocks", "swap_bytes"):
            require(getattr(self, name) >= 0, f"{name} must not be negative")
