"""`assemble`: an engine around a model, with the size of its KV cache and its tokens a step."""

from __future__ import annotations

import hashlib
import statistics
import time
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version

import torch

from headrace.attention.store import LAYOUT_VERSION, KVStore
from headrace.config import CacheConfig, ModelConfig
from headrace.engine.engine import Engine
from headrace.engine.run.ranks import Ranks
from headrace.engine.run.runner import Runner
from headrace.engine.run.shard import ModelShard, kv_block_bytes, kv_store
from headrace.engine.schedule.mask import MaskFactory, no_masks
from headrace.engine.schedule.plan import Plan, Slice
from headrace.engine.schedule.sampling import SamplingParams
from headrace.engine.schedule.scheduler import Scheduler
from headrace.engine.schedule.speculator import Speculator
from headrace.errors import ConfigError
from headrace.kernels.ops import Ops
from headrace.llm.options import EngineOptions, free_memory
from headrace.llm.speculation import speculating
from headrace.model.transformer import Transformer

__all__ = ["assemble", "count_blocks", "fingerprint", "profile_budget"]

MEMORY_SHARE = 0.4
"""Of free memory, for the KV cache, where the user gives no size."""
TILE = 16


def fingerprint(ops: Ops, config: ModelConfig, options: EngineOptions) -> str:
    """Engines of equal fingerprint and weights give equal tokens, to the bit."""
    try:
        grammars = version("llguidance")  # it spells forced tokens
    except PackageNotFoundError:
        grammars = "none"
    parts = [
        ops.fingerprint(),
        f"V={config.shards}",
        f"kv={options.cache_config().dtype}",
        f"layout={LAYOUT_VERSION}",
        f"grammars={grammars}",
    ]
    if options.verifier != "coupled":  # its tokens depend on where drafts begin
        parts.append(f"verifier={options.verifier} lenience={options.lenience} speculate={options.speculate}")
    return "hr_" + hashlib.sha256("|".join(parts).encode()).hexdigest()[:16]


def max_length(config: ModelConfig, options: EngineOptions) -> int:
    """The longest sequence in tokens; `ConfigError` if the option exceeds the model's positions."""
    if options.max_model_len > config.max_position_embeddings:
        raise ConfigError(
            f"max_model_len={options.max_model_len} is more than the model's {config.max_position_embeddings} positions"
        )
    return options.max_model_len or config.max_position_embeddings


def count_blocks(
    model: Transformer, cache: CacheConfig, max_len: int, max_seqs: int, draft: Transformer | None = None
) -> int:
    """Blocks of the pool, including the null block. Memory is counted over all ranks, and a draft model's with it.

    Raises `ConfigError` if memory holds no block besides the null block.
    """
    if cache.num_blocks:
        return cache.num_blocks
    dtype = getattr(torch, cache.dtype)
    block_bytes = model.group.size * kv_block_bytes(model, cache.block_size, dtype)
    if draft is not None:
        block_bytes += kv_block_bytes(draft, cache.block_size, dtype)
    free = free_memory()
    if cache.memory_bytes > free:
        raise ConfigError(
            f"kv_cache_memory={cache.memory_bytes / 2**30:.2f} GiB is more than the "
            f"{free / 2**30:.2f} GiB that are free"
        )
    wanted = max_seqs * -(-max_len // cache.block_size) + 1
    have = cache.memory_bytes or min(int(free * MEMORY_SHARE), wanted * block_bytes)
    count = have // block_bytes
    if count < 2:
        raise ConfigError(
            f"{have} bytes of KV cache do not hold two blocks (one of them null) of {block_bytes} bytes: "
            "give more with kv_cache_memory, or a smaller block_size"
        )
    return count


def host_slots(cache: CacheConfig, options: EngineOptions, store: KVStore) -> int:
    """Blocks that fit in host memory under swapping."""
    if options.preemption != "swap":
        return 0
    return cache.swap_bytes // store.block_bytes if cache.swap_bytes else store.num_blocks - 1


def assemble(
    model: Transformer,
    ops: Ops,
    options: EngineOptions,
    ranks: Ranks | None = None,
    masks: MaskFactory = no_masks,
    draft: Transformer | None = None,
    speculator: Speculator | None = None,
) -> Engine[Runner]:
    """An engine around a loaded model. `ranks` are the processes that hold its other shards.

    `masks` builds the masks of constrained requests. `draft` is the draft model that `options` name. `speculator`
    replaces the one that they describe.
    """
    ranks = Ranks() if ranks is None else ranks
    config, cache = model.config, options.cache_config()
    length = max_length(config, options)
    blocks = count_blocks(model, cache, length, options.max_num_seqs, draft)
    store = kv_store(model, blocks, cache.block_size, getattr(torch, cache.dtype), ops)
    slots = host_slots(cache, options, store)
    ranks.initialize_cache(num_blocks=blocks, block_size=cache.block_size, cache_dtype=cache.dtype, host_slots=slots)
    parts = speculating(options, draft, ops, blocks)
    runner = Runner(ModelShard(model, ops, store, slots), ranks, parts.sampler)
    budget = profile_budget(runner, length, options.slo_tbt) if options.max_num_batched_tokens == "auto" else 0
    parts.profile(runner, options.max_num_seqs)
    scheduler = Scheduler(
        options.scheduler_config(budget),
        replace(cache, num_blocks=blocks),
        length,
        config.eos_token_ids,
        slots,
        masks=masks,
        speculator=speculator or parts.speculation,
    )
    return Engine(scheduler, runner, options.queue_depth)


def profile_budget(runner: Runner, max_len: int, slo_ms: float, repeats: int = 3) -> int:
    """The most tokens a step may compute within `slo_ms` (Sarathi-Serve §4.3), a multiple of 16.

    Measures the worst case: a prompt chunk at the end of the longest context that the pool and the model allow.
    """
    size = runner.store.block_size
    longest = min(max_len, (runner.store.num_blocks - 1) * size)

    def milliseconds(tokens: int) -> float:
        start = max(0, longest - tokens)
        table = [1 + i for i in range(-(-(start + tokens) // size))]
        plan = Plan(0, [Slice(0, start, [0] * tokens, table, [], SamplingParams(), 0, 0)])
        times = []
        for _ in range(repeats):
            began = time.perf_counter()
            runner.result(runner.submit(plan))
            times.append((time.perf_counter() - began) * 1e3)
        return statistics.median(times)

    low, high = 0, max(1, min(longest, 4096) // TILE)
    milliseconds(TILE)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if milliseconds(middle * TILE) <= slo_ms else (low, middle - 1)
    if low == 0:
        raise ConfigError(
            f"slo_tbt={slo_ms} ms cannot be met: {TILE} tokens behind {longest} others take "
            f"{milliseconds(TILE):.1f} ms on this machine"
        )
    return low * TILE
