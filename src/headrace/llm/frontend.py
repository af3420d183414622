"""`Frontend`: prompts in, outputs out, on one thread. `LLM`, `AsyncLLM` and an instance each hold one."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from headrace.cache.key import CacheKey
from headrace.engine.engine import Engine
from headrace.engine.run.ranks import Ranks
from headrace.engine.run.runner import Runner
from headrace.engine.schedule.beam import BeamSearch
from headrace.engine.schedule.mask import TokenMask
from headrace.engine.schedule.request import Request, RequestUpdate
from headrace.engine.schedule.sampling import SamplingParams
from headrace.errors import HeadraceError, RequestError
from headrace.kernels.load import load_ops
from headrace.kernels.ops import Ops
from headrace.llm.assemble import assemble, fingerprint
from headrace.llm.options import EngineOptions
from headrace.llm.outputs import RequestOutput
from headrace.llm.processor import Group
from headrace.llm.records import ResumeRecord
from headrace.llm.speculation import draft_folder, load_draft
from headrace.model.folder import read_config, resolve
from headrace.model.huggingface import load_model
from headrace.model.layers import weight_dtype
from headrace.model.transformer import Transformer
from headrace.parallel.group import RankGroup
from headrace.parallel.heads import HeadLayout
from headrace.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from headrace.grammar.grammars import Grammars

__all__ = ["Frontend", "MaskStats", "Prompt", "WeightSource"]


@dataclass(frozen=True, slots=True)
class MaskStats:
    """Counters since the start. Seconds."""

    mask_seconds: float = 0.0
    """Filling the rows of masks, on a thread beside the model."""
    mask_wait_seconds: float = 0.0
    """Steps that waited for rows."""
    grammar_seconds: float = 0.0
    """Compiling grammars."""
    grammar_queries: int = 0
    """Grammars that were asked for."""
    grammar_hits: int = 0
    """Of these, compiled before."""


Prompt = str | Sequence[int] | Mapping[str, Any]
"""Text, token ids, {"prompt": text} or {"prompt_token_ids": ids}."""
WeightSource = str | Path | Transformer | Mapping[str, Tensor]
"""A checkpoint folder or hub id, a model, or tensors by checkpoint name."""


class Frontend:
    """One engine with its tokenizer. It tokenizes and checks prompts; a request is a `Group` of n choices."""

    def __init__(
        self,
        model: Transformer,
        tokenizer: Tokenizer,
        ops: Ops,
        options: EngineOptions,
        ranks: Ranks | None = None,
        draft: Path | None = None,
    ) -> None:
        """`draft` is what `draft_folder` gives, where it has been called; otherwise it is called here."""
        tokenizer.check_vocabulary(model.config.vocab_size)
        self.model_config = model.config
        self.tokenizer = tokenizer
        folder = draft or draft_folder(options, model.config, tokenizer)
        drafter = None if folder is None else load_draft(folder, options, ops)
        self.engine: Engine[Runner] = assemble(model, ops, options, ranks, self._mask, drafter)
        self.fingerprint = fingerprint(ops, model.config, options)
        self._ids = itertools.count(1)
        self._groups: dict[str, Group] = {}
        self._searches: dict[str, BeamSearch] = {}
        self._by_id: dict[int, Group] = {}
        """Group by the group id of its requests."""
        self.weights_version = 0
        """Incremented or set by `update_weights`."""
        self._settled: dict[str, Group] = {}
        """Groups with results of steps that finished between two calls of `step`."""

    @classmethod
    def from_folder(
        cls, path_or_id: str | Path, options: EngineOptions, progress: Callable[[int, int, str], None] | None = None
    ) -> Frontend:
        """Load a checkpoint in Hugging Face layout, by folder or hub id.

        `progress(done, total, kernel)` is called while kernels compile.
        """
        folder = resolve(path_or_id)
        config = read_config(folder)
        tokenizer = Tokenizer.from_folder(folder)
        # These raise before a process starts and before weights are loaded.
        tokenizer.check_vocabulary(config.vocab_size)
        HeadLayout(config, RankGroup.of_size(options.tensor_parallel_size))
        draft = draft_folder(options, config, tokenizer)
        each = [options.ops_options(rank) for rank in range(options.tensor_parallel_size)]
        ops = load_ops(options.kernel_set, **each[0])
        ranks = Ranks.start(
            len(each), folder, options.kernel_set, each, options.dtype, ops.device, options.rank_timeout
        )
        try:
            model = load_model(folder, ops, options.dtype, ranks.group, serving=True)
            cache = getattr(torch, options.cache_config().dtype)
            ops.warm_up(weight_dtype(model.config), cache, progress, one_call=model.layers() is not None)
            return cls(model, tokenizer, ops, options, ranks, draft)
        except BaseException:
            ranks.close()
            raise

    def update_weights(self, source: WeightSource, version: int | None = None) -> int:
        """Load other weights of the same shape into the running model; returns their version (None: the next one).

        `source` is a checkpoint folder or hub id, a model, or tensors by checkpoint name. Running requests compute
        their known tokens again under the new weights, and continue. Raises `CheckpointError`, with nothing changed,
        if a tensor is missing, unknown or of another shape.
        """
        folder = resolve(source) if isinstance(source, (str, Path)) else None
        try:
            self._settled |= self._take_all(self.engine.drain())
            self.engine.runner.load(source if folder is None else folder)  # type: ignore[arg-type]
        except HeadraceError:
            raise
        except BaseException as error:
            self.engine.fail(error)
            raise
        self.weights_version = self.weights_version + 1 if version is None else version
        self.engine.scheduler.change_weights(self.weights_version)
        return self.weights_version

    def close(self) -> None:
        """End the processes of the other ranks. With tensor parallelism, no step can run afterwards."""
        self.engine.runner.ranks.close()

    @cached_property
    def grammars(self) -> Grammars:
        """The compiled constraints. Raises `RequestError` where llguidance is not installed."""
        try:
            from headrace.grammar.grammars import Grammars
        except ModuleNotFoundError as error:
            if error.name != "llguidance":
                raise
            reason = "{constraint} needs the package llguidance, which is not installed: pip install llguidance"
            raise RequestError.about("constraint", reason) from None
        return Grammars(self.tokenizer, self.model_config.vocab_size)

    @property
    def mask_stats(self) -> MaskStats:
        """What masks and their grammars have cost so far."""
        masks = self.engine.runner.masks
        if "grammars" not in self.__dict__:  # no request has had one
            return MaskStats(masks.seconds, masks.waited)
        made = self.grammars
        return MaskStats(masks.seconds, masks.waited, made.seconds, made.hits + made.misses, made.hits)

    def prepare(self, params: SamplingParams) -> Future[None] | None:
        """Compile a request's grammars on a thread, so that `add` need not; None where nothing is to be compiled.

        Any thread may call it. The result raises `RequestError` where a grammar cannot be compiled.
        """
        if not params.masked or self.grammars.ready(params):
            return None
        return self.grammars.prepare(params)

    def _mask(self, params: SamplingParams, stop_ids: Collection[int]) -> TokenMask:
        return self.grammars.mask(params, stop_ids)

    def add(
        self,
        prompt: Prompt,
        params: SamplingParams,
        name: str | None = None,
        priority: int = 0,
        cache_key: CacheKey = CacheKey(),
    ) -> str:
        """Queue a prompt; returns its name. Raises `RequestError` if it can never be served."""
        text, ids = self._read(prompt)
        self._check(ids, params)
        numbers = [next(self._ids) for _ in range(params.n)]
        name = name or f"request-{numbers[0]}"
        record = ResumeRecord.begin(name, text, ids, params, priority, cache_key, self.fingerprint)
        first, *_ = record.requests(numbers, self.weights_version)
        siblings = [] if params.beam_width else [first.sibling(number, i) for i, number in enumerate(numbers) if i]
        return self._enter(Group(record, numbers, self.tokenizer), [first, *siblings])

    def resume(self, record: ResumeRecord) -> str:
        """Continue the request of a record; returns its name. A beam search, being deterministic, begins again."""
        if record.fingerprint != self.fingerprint:
            raise RequestError(
                f"the record is of an engine {record.fingerprint}, and this one is "
                f"{self.fingerprint}: its tokens could differ"
            )
        record = record.snapshot()
        for ids in (record.output.prompt_token_ids, *(choice.token_ids for choice in record.output.outputs)):
            self._check(ids, record.params)
        numbers = [next(self._ids) for _ in record.output.outputs]
        requests = record.requests(numbers, self.weights_version)
        if not requests:
            raise RequestError("the resume record is broken: all of its choices are finished")
        return self._enter(Group(record, numbers, self.tokenizer), requests)

    def resume_record(self, name: str) -> ResumeRecord:
        """A running request, for `resume` here or on another engine of this fingerprint; KeyError if there is none."""
        return self._groups[name].record.snapshot()

    def _enter(self, group: Group, requests: Sequence[Request]) -> str:
        """Give the requests to the scheduler: all of them, or none if one is refused."""
        if group.name in self._groups:
            raise RequestError(f"there is a request called {group.name!r} already", "request_id")
        scheduler = self.engine.scheduler
        if group.params.beam_width:
            self._searches[group.name] = BeamSearch(scheduler, requests[0], lambda: next(self._ids))
        else:
            try:
                for request in requests:
                    scheduler.add(request)
            except RequestError:
                for request in requests:
                    scheduler.abort(request.request_id)
                raise
        group.output.weights_version = self.weights_version
        self._groups[group.name] = group
        self._by_id |= {request.group_id: group for request in requests}
        return group.name

    def step(self) -> list[Group]:
        """One step of the engine; returns the groups that changed."""
        touched, self._settled = self._settled, {}
        return list((touched | self._take_all(self.engine.step())).values())

    def _take_all(self, updates: Sequence[RequestUpdate]) -> dict[str, Group]:
        touched: dict[str, Group] = {}
        for update in updates:
            group = self._by_id.get(update.group_id)
            if group is not None and group.name in self._groups:
                self._take(group, update)
                touched[group.name] = group
        return touched

    def _take(self, group: Group, update: RequestUpdate) -> None:
        search = self._searches.get(group.name)
        group.output.weights_version = self.weights_version
        if search is not None:
            group.take_scores(update)
            if search.take(update):
                group.take_hypotheses(search.hypotheses)
        else:
            group.output.num_cached_tokens = max(group.output.num_cached_tokens, update.num_cached_tokens)
            keep = group.take(update)
            if keep is not None and update.finish_reason is None:
                stop = group.choices[update.request_id].output.stop_reason
                self.engine.scheduler.finish(update.request_id, "stop", stop, keep_tokens=keep)
        if group.output.finished:
            self._forget(group)

    def abort(self, name: str) -> RequestOutput | None:
        """Stop a request and free its blocks; returns its output so far, or None if it is not running."""
        group = self._groups.get(name)
        if group is None:
            return None
        self._settled.pop(name, None)
        if name in self._searches:
            self._searches[name].abort()
        for request_id in group.choices:
            self.engine.scheduler.abort(request_id)
        group.end("abort")
        self._forget(group)
        return group.output

    def _forget(self, group: Group) -> None:
        del self._groups[group.name]
        self._searches.pop(group.name, None)
        for request_id in group.choices:
            self._by_id.pop(request_id, None)

    def group(self, name: str) -> Group:
        """An unfinished request; KeyError if there is none of this name."""
        return self._groups[name]

    @property
    def has_work(self) -> bool:
        """Whether any request is unfinished."""
        return bool(self._settled) or self.engine.has_work

    def _read(self, prompt: Prompt) -> tuple[str | None, list[int]]:
        if isinstance(prompt, Mapping):
            if not prompt.keys() & {"prompt", "prompt_token_ids"}:
                raise RequestError.about("prompt", "{prompt} is a mapping, which needs prompt or prompt_token_ids")
            prompt = prompt.get("prompt_token_ids") or prompt["prompt"]
        if isinstance(prompt, str):
            return prompt, self.tokenizer.encode(prompt)
        try:
            return None, [int(token) for token in prompt]
        except (TypeError, ValueError):
            kind = type(prompt).__name__
            raise RequestError.about("prompt", "{prompt} must be text or token ids, not {}", kind) from None

    def _check(self, ids: Sequence[int], params: SamplingParams) -> None:
        named = {
            "prompt": ids,
            "stop_token_ids": params.stop_token_ids,
            "logit_bias": params.logit_bias,
            "allowed_token_ids": params.allowed_token_ids or (),
            "prediction": params.prediction,
        }
        for field, tokens in named.items():
            self.check_ids(field, tokens)

    def check_ids(self, field: str, ids: Iterable[int]) -> None:
        """Raise `RequestError` for an id that the vocabulary does not have."""
        vocabulary = self.model_config.vocab_size
        for token in ids:
            if not 0 <= token < vocabulary:
                reason = f"{{{field}}} has token id {{}}, which is out of vocabulary: there are {{}} tokens, from 0"
                raise RequestError.about(field, reason, token, vocabulary)
