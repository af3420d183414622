"""Who drafts in an engine, and who verifies: from its options to the parts of `speculate/`."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from headrace.config import ModelConfig
from headrace.engine.run.ranks import Ranks
from headrace.engine.run.runner import RowSampler, Runner
from headrace.engine.run.shard import ModelShard, kv_store
from headrace.engine.schedule.plan import SAMPLE, Plan, Slice
from headrace.engine.schedule.sampling import SamplingParams
from headrace.errors import ConfigError
from headrace.kernels.ops import Ops
from headrace.llm.options import EngineOptions
from headrace.model.folder import read_config, resolve
from headrace.model.huggingface import load_model
from headrace.model.layers import weight_dtype
from headrace.model.transformer import Transformer
from headrace.speculate.base import Proposer
from headrace.speculate.draft import DraftModel
from headrace.speculate.forced import ForcedProposer
from headrace.speculate.gamma import AutoGamma, FixedGamma
from headrace.speculate.ngram import NgramProposer
from headrace.speculate.prediction import PredictionProposer
from headrace.speculate.sampling import DraftSampler, RejectionSampler
from headrace.speculate.speculation import Speculation
from headrace.speculate.suffix import SuffixProposer

if TYPE_CHECKING:
    from headrace.text.tokenizer import Tokenizer

__all__ = ["Speculating", "draft_folder", "draft_model", "load_draft", "speculating"]

ROWS = (1, 2, 3, 4, 5, 6, 8, 12, 16, 24, 32, 48, 64, 128)
PROFILES = 3


@dataclass(frozen=True, slots=True)
class Speculating:
    """What an engine needs to speculate."""

    speculation: Speculation
    sampler: RowSampler | None
    """Of the target's runner; None is the ordinary one."""
    gamma: AutoGamma | None
    """The policy that wants to know what steps and passes cost before the first one."""
    drafter: Runner | None
    """The draft model's runner."""

    def profile(self, runner: Runner, most: int) -> None:
        """Measure what the target's `runner` and the draft model's take for up to `most` rows, where that is wanted."""
        if self.gamma is not None:
            profile_rows(runner, most, self.gamma.seed)
            if self.drafter is not None:
                profile_rows(self.drafter, most, self.gamma.seed_pass)


def draft_folder(options: EngineOptions, config: ModelConfig, tokenizer: Tokenizer) -> Path | None:
    """The folder of the draft model that the options name; None where they name none. It reads no weights.

    `config` and `tokenizer` are the target's. Raises `ConfigError` where that model cannot draft for the target, and
    `CheckpointError` where its folder cannot be read.
    """
    kind, _, path = options.speculate.partition(":")
    if kind != "draft":
        return None
    folder = resolve(path)
    own = read_config(folder)
    if own.vocab_size != config.vocab_size or not same_tokenizer(folder, tokenizer):
        raise ConfigError(f"speculate={options.speculate}: its tokenizer is another: a draft needs the model's own")
    if block_weights(own) > block_weights(config):
        raise ConfigError(f"speculate={options.speculate}: it is larger than the model that it drafts for")
    return folder


def load_draft(folder: Path, options: EngineOptions, ops: Ops) -> Transformer:
    """The draft model in the folder that `draft_folder` gives, whole on this rank, with its kernels compiled."""
    draft = load_model(folder, ops, options.dtype, serving=True)
    cache = getattr(torch, options.cache_config().dtype)
    ops.warm_up(weight_dtype(draft.config), cache, one_call=draft.layers() is not None)
    return draft


def block_weights(config: ModelConfig) -> int:
    """Weights of the matrices of all blocks."""
    attention = 2 * (config.num_heads + config.num_kv_heads) * config.head_dim
    return config.num_layers * config.hidden_size * (attention + 3 * config.intermediate_size)


def same_tokenizer(folder: Path, tokenizer: Tokenizer) -> bool:
    """Whether the folder's tokenizer gives every token the same id."""
    from headrace.text.tokenizer import Tokenizer

    return Tokenizer.from_folder(folder).vocabulary() == tokenizer.vocabulary()


def speculating(options: EngineOptions, draft: Transformer | None, ops: Ops, num_blocks: int) -> Speculating:
    """Proposers, the draft model and the verifier as the options say. A request's `prediction` always counts."""
    kind = options.speculate.partition(":")[0]
    proposers: list[Proposer] = [PredictionProposer()]
    if kind != "off":
        proposers.append(ForcedProposer())
    if kind == "ngram":
        proposers.append(NgramProposer())
    if kind == "suffix":
        proposers.append(SuffixProposer())
    gamma = AutoGamma(time.perf_counter) if options.gamma == "auto" else FixedGamma(int(options.gamma))
    drawn = None if options.verifier == "coupled" else DraftSampler(ops)
    sampler = None if drawn is None else RejectionSampler(ops, drawn, options.lenience)
    model = None if draft is None else draft_model(draft, ops, options, num_blocks, drawn)
    learning = gamma if kind != "off" and isinstance(gamma, AutoGamma) else None
    return Speculating(Speculation(proposers, gamma, model), sampler, learning, None if model is None else model.runner)


def profile_rows(runner: Runner, most: int, seed: Callable[[int, float], object]) -> None:
    """Tell `seed` the seconds of steps of few rows, so that the policy need not begin with a guess.

    Their request ids are nobody's: a sampler may keep what it drew for a request.
    """
    for rows in ROWS:
        if rows > most:
            break
        times = []
        for step in range(PROFILES):
            slices = [Slice(-1 - i, 0, [0], [1], [SAMPLE], SamplingParams(), 0, 0) for i in range(rows)]
            began = time.perf_counter()
            runner.result(runner.submit(Plan(step, slices)))
            times.append(time.perf_counter() - began)
        seed(rows, min(times))


def draft_model(
    model: Transformer, ops: Ops, options: EngineOptions, num_blocks: int, sampler: RowSampler | None = None
) -> DraftModel:
    """A model as a proposer of drafts, with a KV store of as many blocks as the target's."""
    cache = options.cache_config()
    store = kv_store(model, num_blocks, cache.block_size, getattr(torch, cache.dtype), ops)
    runner = Runner(ModelShard(model, ops, store), Ranks(), sampler)
    longest = model.config.max_position_embeddings
    return DraftModel(runner, longest, options.scheduler_config().max_num_batched_tokens)
