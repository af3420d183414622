"""`EngineOptions`: every option of an engine, flat. The command line's flags are generated from it."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from headrace.config import CacheConfig, one_of, require
from headrace.engine.schedule.batching import BATCHING
from headrace.engine.schedule.config import JUMPS, PREEMPTION, RESERVE, SchedulerConfig
from headrace.engine.schedule.policies import POLICIES
from headrace.errors import ConfigError
from headrace.speculate.base import LONGEST
from headrace.typed import check, read_value

__all__ = ["EngineOptions", "parse_bytes"]

DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16", "half": "float16"}
RANK_TIMEOUT = 120.0
VERIFIERS = ("coupled", "rejection")
UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "ki": 2**10, "mi": 2**20, "gi": 2**30}


def option(default: Any, text: str, why: str, choices: Collection[str] = (), **extra: Any) -> Any:
    """A dataclass field with its help text for the command line and the reason for its default."""
    return field(default=default, metadata={"help": text, "why": why, "choices": choices, **extra})


def parse_bytes(value: str | int, name: str = "") -> int:
    """Bytes from 1073741824, "512MiB", "1.5G" …; 0 lets the engine choose. An error begins with `name`."""
    # A fraction needs a unit: 1.5 bytes are none.
    match = re.fullmatch(r"\s*(\d+(?:\.\d+(?=\s*[kmg]))?)\s*([kmg]i?)?b?\s*", str(value), re.IGNORECASE)
    size = math.nan if match is None else float(match[1]) * UNITS[(match[2] or "").lower()]
    if not size < 2**63:
        given = f"{name}={value!r}" if name else repr(value)
        raise ConfigError(f"{given} is not an amount of memory: write it as 512MiB, 2GiB or a number of bytes")
    return int(size)


@dataclass(frozen=True, kw_only=True)
class EngineOptions:
    """Options of one engine; the same names are keywords of `LLM` and, with dashes, flags of the commands."""

    device: str = option("cpu", "where the model runs", "every machine has one", ("cpu", "cuda"))
    kernels: str = option(
        "auto", "kernel set", "Numba on the CPU, torch's reference on a GPU", ("auto", "cpu", "reference", "cuda")
    )
    dtype: str = option(
        "auto",
        "what weights are converted to",
        "as the checkpoint has them",
        ("auto", "float32", "bfloat16", "float16"),
    )
    generation_config: str = option(
        "auto",
        "auto: take sampling defaults from the model's generation_config.json; none: do not",
        "as its authors chose them",
        ("auto", "none"),
    )
    threads: int = option(0, "CPU threads, of all ranks together", "all of them")
    tensor_parallel_size: int = option(
        1, "processes that share the model: 1, 2, 4, 8 or 16", "on one machine, threads are as fast"
    )
    rank_timeout: float = option(
        RANK_TIMEOUT,
        "seconds within which each of these processes must start, load its shard and compute its part of a step",
        "their work is equal, so a late one hangs",
    )
    max_model_len: int = option(0, "longest sequence in tokens", "the model's own")
    block_size: int = option(16, "tokens in a KV cache block", "less waste than 32, and no slower")
    kv_cache_memory: int = option(0, "bytes of KV cache, as 2GiB", "chosen from free memory", parse=parse_bytes)
    kv_cache_dtype: str = option(
        "auto",
        "keys and values are rounded to this before any read",
        "fp32, which rounds nothing",
        ("auto", "fp32", "bf16", "fp16"),
    )
    num_kv_blocks: int = option(0, "blocks of KV cache, instead of bytes", "as kv_cache_memory says")
    swap_memory: int = option(
        0,
        "bytes of host memory for swapped blocks",
        "as much as the cache under --preemption swap",
        parse=parse_bytes,
    )
    prefix_caching: bool = option(True, "share the KV cache of common prefixes", "the results have the same bits")
    scheduling_policy: str = option("fcfs", "which request runs next", "no request can starve", POLICIES)
    batching: str = option("sarathi", "how a step is filled", "long prompts do not delay the others", BATCHING)
    reserve: str = option(
        "none", "KV reserved on admission, as earlier systems did", "blocks are taken as they fill", RESERVE
    )
    preemption: str = option(
        "recompute", "what happens to a request that loses its blocks", "most of its prefix is still cached", PREEMPTION
    )
    max_num_batched_tokens: int | str = option(
        512,
        "tokens computed in a step, or auto with --slo-tbt",
        "matrix products are near full speed from there",
        parse=str,
    )
    slo_tbt: float = option(
        0.0, "worst time between tokens in ms, from which auto chooses the tokens of a step", "no bound"
    )
    max_num_seqs: int = option(64, "requests that run at once", "on a CPU, decoding gains little beyond")
    jump_forward: str = option(
        "together",
        "how forced tokens of a constrained output are computed: in one step, or one a step",
        "fewer steps, the same tokens",
        JUMPS,
    )
    speculate: str = option(
        "off",
        "who drafts tokens that one step verifies together: off, ngram, suffix or draft:PATH, a small model of the "
        "same tokenizer",
        "what pays depends on the work",
    )
    gamma: str = option(
        "auto", "drafts of a request in a step: auto, or a number from 1 to 16", "as many as pay by what is measured"
    )
    verifier: str = option(
        "coupled",
        "coupled: the same tokens as without drafts; rejection: the same distribution",
        "a seed names its tokens",
        VERIFIERS,
    )
    lenience: float = option(1.0, "accept drafts of up to p/lenience under --verifier rejection", "exact")
    queue_depth: int = option(1, "steps planned ahead of results", "on a CPU, more gains nothing")

    def __post_init__(self) -> None:
        for item in fields(self):
            self._check_choice(item.name, item.metadata)
        check(self)
        cores = os.cpu_count() or 1
        require(0 <= self.threads <= cores, f"threads={self.threads} must be from 0 to this machine's {cores}")
        require(
            self.tensor_parallel_size in (1, 2, 4, 8, 16),
            f"tensor_parallel_size={self.tensor_parallel_size} must be 1, 2, 4, 8 or 16",
        )
        require(
            0.0 < self.rank_timeout <= 86400.0,
            f"rank_timeout={self.rank_timeout} must be a time in seconds, at most a day",
        )
        for name in ("max_model_len", "num_kv_blocks"):
            require(getattr(self, name) >= 0, f"{name}={getattr(self, name)} must not be negative")
        require(0.0 <= self.slo_tbt < math.inf, f"slo_tbt={self.slo_tbt} must be a time in ms")
        if self.max_num_batched_tokens == "auto":
            require(
                self.slo_tbt > 0.0, "max_num_batched_tokens=auto needs slo_tbt, the worst time between tokens in ms"
            )
        else:
            require(
                str(self.max_num_batched_tokens).isdecimal(),
                f"max_num_batched_tokens={self.max_num_batched_tokens!r} is neither a positive number nor auto",
            )
        self._check_together()
        self.cache_config()
        self.scheduler_config()

    def _check_together(self) -> None:
        """Refuse an option that would have no effect."""
        kernels = {"cpu": ("auto", "cpu", "reference"), "cuda": ("auto", "cuda", "reference")}[self.device]
        require(self.kernels in kernels, f"kernels={self.kernels} does not run on device={self.device}")
        auto = self.max_num_batched_tokens == "auto"
        require(auto or not self.slo_tbt, f"slo_tbt={self.slo_tbt} acts with max_num_batched_tokens=auto only")
        require(
            self.tensor_parallel_size > 1 or self.rank_timeout == RANK_TIMEOUT,
            f"rank_timeout={self.rank_timeout} acts with a tensor_parallel_size of more than 1 only",
        )
        require(self.preemption == "swap" or not self.swap_memory, "swap_memory acts with preemption=swap only")
        require(not (self.num_kv_blocks and self.kv_cache_memory), "give num_kv_blocks or kv_cache_memory, not both")
        self._check_speculation()
        require(
            self.queue_depth <= 2,
            f"queue_depth={self.queue_depth} must be 1 or 2: the runner keeps the tokens of one step back",
        )

    def _check_speculation(self) -> None:
        kind, _, path = self.speculate.partition(":")
        require(
            self.speculate in ("off", "ngram", "suffix") or (kind == "draft" and path != ""),
            f"speculate={self.speculate!r} must be off, ngram, suffix or draft:PATH",
        )
        require(
            self.gamma == "auto" or (self.gamma.isdecimal() and 1 <= int(self.gamma) <= LONGEST),
            f"gamma={self.gamma!r} must be auto or a number from 1 to {LONGEST}",
        )
        require(0.0 < self.lenience <= 1.0, f"lenience={self.lenience} must be above 0 and at most 1, which is exact")
        on = self.speculate != "off"
        require(on or self.gamma == "auto", f"gamma={self.gamma} acts with speculate only: say who drafts")
        require(on or self.verifier == "coupled", f"verifier={self.verifier} acts with speculate only: say who drafts")
        require(
            self.lenience == 1.0 or self.verifier == "rejection",
            f"lenience={self.lenience} acts with verifier=rejection only: coupled gives the target's own tokens",
        )

    def _check_choice(self, name: str, metadata: Mapping[str, Any]) -> None:
        """Parse an amount of memory; compare a choice with those there are."""
        value = getattr(self, name)
        if metadata.get("parse") is parse_bytes:
            object.__setattr__(self, name, parse_bytes(value, name))
        if metadata["choices"]:
            names = {long: short for short, long in DTYPES.items()} if name == "kv_cache_dtype" else {}
            read_value(str, value, name)
            one_of(name, names.get(value, value), metadata["choices"])

    def ops_options(self, rank: int) -> dict[str, Any]:
        """Arguments of `load_ops` for a rank: its share of the threads, or its GPU."""
        size = self.tensor_parallel_size
        if self.kernel_set == "cpu":
            all_threads = self.threads or os.cpu_count() or 1
            return {"threads": max(1, all_threads // size) if size > 1 else self.threads or None}
        return {"device": f"{self.device}:{rank}" if self.device == "cuda" and size > 1 else self.device}

    @property
    def kernel_set(self) -> str:
        """The implementation of the op set that `kernels` and `device` name."""
        return self.kernels if self.kernels != "auto" else self.device

    def cache_config(self) -> CacheConfig:
        """The options of the paged cache."""
        dtype = "fp32" if self.kv_cache_dtype == "auto" else self.kv_cache_dtype
        return CacheConfig(
            self.block_size,
            self.kv_cache_memory,
            self.num_kv_blocks,
            self.swap_memory,
            DTYPES.get(dtype, dtype),
            self.prefix_caching,
        )

    def scheduler_config(self, budget: int = 512) -> SchedulerConfig:
        """The options of the scheduler. `budget` is the number of tokens under auto."""
        tokens = budget if self.max_num_batched_tokens == "auto" else int(self.max_num_batched_tokens)
        return SchedulerConfig(
            self.scheduling_policy,
            self.batching,
            self.reserve,
            self.preemption,
            tokens,
            self.max_num_seqs,
            self.queue_depth,
            jump_forward=self.jump_forward,
        )


def free_memory() -> int:
    """Bytes that may be allocated without swapping, by /proc/meminfo and the control group."""
    free = 2**63
    for line in Path("/proc/meminfo").read_text().splitlines() if Path("/proc/meminfo").exists() else ():
        if line.startswith("MemAvailable:"):
            free = int(line.split()[1]) * 1024
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    if limit.exists() and used.exists() and limit.read_text().strip().isdecimal():
        free = min(free, int(limit.read_text()) - int(used.read_text()))
    return free if free < 2**63 else 4 * 2**30
