"""`Frontend`: prompts in, outputs out. What `LLM` and `AsyncLLM` share; whoever steps it owns it."""

from __future__ import annotations

import itertools
import secrets
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from headrace.engine.assemble import assemble, fingerprint
from headrace.engine.engine import Engine
from headrace.engine.options import EngineOptions
from headrace.engine.outputs import RequestOutput
from headrace.engine.processor import Group
from headrace.engine.request import Request, RequestUpdate
from headrace.engine.sampling import SamplingParams
from headrace.errors import RequestError
from headrace.kernels.ops import Ops, load_ops
from headrace.model.huggingface import load_model, resolve
from headrace.model.transformer import Transformer
from headrace.text.tokenizer import Tokenizer

__all__ = ["Frontend", "Prompt"]

Prompt = str | Sequence[int] | Mapping[str, Any]
"""Text, token ids, or {"prompt": text} or {"prompt_token_ids": ids}."""
Progress = Callable[[int, int, str], None]


class Frontend:
    """One engine with its tokenizer. Prompts are checked here; a request is a `Group` of one or more choices."""

    def __init__(self, model: Transformer, tokenizer: Tokenizer, ops: Ops, options: EngineOptions) -> None:
        tokenizer.check_vocabulary(model.config.vocab_size)
        self.model_config = model.config
        self.tokenizer = tokenizer
        self.engine: Engine = assemble(model, ops, options)
        self.fingerprint = fingerprint(ops, model.config, options.cache_config())
        self._ids = itertools.count(1)
        self._groups: dict[str, Group] = {}
        self._by_request: dict[int, Group] = {}

    @classmethod
    def from_folder(cls, path_or_id: str | Path, options: EngineOptions, progress: Progress | None = None) -> Frontend:
        """Load a checkpoint in Hugging Face layout, by folder or hub id."""
        folder = resolve(path_or_id)
        tokenizer = Tokenizer.from_folder(folder)
        ops = load_ops(options.kernel_set, **({"threads": options.threads or None} if options.kernel_set == "cpu" else {}))
        model = load_model(folder, ops, options.dtype)
        tokenizer.check_vocabulary(model.config.vocab_size)
        if hasattr(ops, "warm_up"):
            ops.warm_up(progress)
        return cls(model, tokenizer, ops, options)

    def add(self, prompt: Prompt, params: SamplingParams, name: str | None = None, priority: int = 0,
            namespace: tuple[object, ...] = ()) -> str:
        """Queue a prompt; returns its name. Raises `RequestError` where it can never be served."""
        text, ids = self._read(prompt)
        self._check(ids, params)
        seed = secrets.randbits(63) if params.seed is None else params.seed
        first = next(self._ids)
        return self._enter(Request(first, ids, params, seed=seed, priority=priority, namespace=namespace), text, name)

    def _enter(self, request: Request, text: str | None, name: str | None) -> str:
        name = name or f"request-{request.request_id}"
        if name in self._groups:
            raise RequestError(f"there is a request called {name!r} already")
        group = Group(name, text, request.prompt_token_ids, request.params, self.tokenizer, request.request_id)
        siblings = [request.sibling(next(self._ids), i) for i in range(1, len(group.choices))]
        for member in (request, *siblings):
            self.engine.scheduler.add(member)
        self._groups[name] = group
        self._by_request |= dict.fromkeys(group.choices, group)
        return name

    def step(self) -> list[Group]:
        """One step of the engine; returns the groups that it brought something to."""
        touched: dict[str, Group] = {}
        for update in self.engine.step():
            group = self._by_request.get(update.request_id)
            if group is not None:
                self._take(group, update)
                touched[group.name] = group
        return list(touched.values())

    def _take(self, group: Group, update: RequestUpdate) -> None:
        keep = group.take(update)
        if keep is not None:
            self.engine.scheduler.finish(update.request_id, "stop", group.choices[update.request_id].output.stop_reason,
                                         keep_tokens=keep)
        if group.output.finished:
            self._forget(group)

    def abort(self, name: str) -> RequestOutput | None:
        """Stop a request and free its blocks; what it had so far comes back, or None if it is not running."""
        group = self._groups.get(name)
        if group is None:
            return None
        for request_id in group.choices:
            self.engine.scheduler.abort(request_id)
        group.end("abort")
        self._forget(group)
        return group.output

    def _forget(self, group: Group) -> None:
        self._groups.pop(group.name, None)
        for request_id in group.choices:
            self._by_request.pop(request_id, None)

    @property
    def has_work(self) -> bool:
        """Whether any request is unfinished."""
        return self.engine.has_work

    def _read(self, prompt: Prompt) -> tuple[str | None, list[int]]:
        if isinstance(prompt, Mapping):
            if not prompt.keys() & {"prompt", "prompt_token_ids"}:
                raise RequestError("a prompt given as a mapping needs prompt or prompt_token_ids")
            prompt = prompt.get("prompt_token_ids") or prompt["prompt"]
        if isinstance(prompt, str):
            return prompt, self.tokenizer.encode(prompt)
        try:
            return None, [int(token) for token in prompt]
        except (TypeError, ValueError):
            raise RequestError(f"a prompt is text or token ids, not {type(prompt).__name__}") from None

    def _check(self, ids: Sequence[int], params: SamplingParams) -> None:
        vocabulary = self.model_config.vocab_size
        named = {"prompt": ids, "stop_token_ids": params.stop_token_ids, "logit_bias": params.logit_bias,
                 "allowed_token_ids": params.allowed_token_ids or ()}
        for field, tokens in named.items():
            for token in tokens:
                if not 0 <= token < vocabulary:
                    raise RequestError(f"{field} has token id {token}, and the vocabulary ends at {vocabulary - 1}")
