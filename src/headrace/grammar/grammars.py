"""`Grammars`: compiles constraints for one model, and keeps the compiled ones of late."""

from __future__ import annotations

import os
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Collection
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
from llguidance import LLMatcher, LLTokenizer

from headrace.engine.run.words import set_ids
from headrace.engine.schedule.constraint import Constraint
from headrace.engine.schedule.sampling import SamplingParams
from headrace.errors import RequestError
from headrace.grammar.mask import GrammarMask
from headrace.grammar.text import bad_words_text, compile_error, grammar_text, refuse_empty
from headrace.grammar.vocabulary import grammar_tokenizer
from headrace.text.line_process import NICE
from headrace.text.tokenizer import Tokenizer

__all__ = ["Grammars"]

MOST = 128
"""Compiled grammars that are kept: those used last."""


class Grammars:
    """The `MaskFactory` of one engine. Any thread may call it.

    A grammar is compiled once, on the caller's thread, or on a thread of its own by `prepare`.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int) -> None:
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._vocabulary: LLTokenizer | None = None
        self._compiled: OrderedDict[Constraint | tuple[str, ...], LLMatcher] = OrderedDict()
        self._lock, self._reading = threading.Lock(), threading.Lock()
        self._thread = ThreadPoolExecutor(1, "grammars", initializer=_give_way)
        self.hits = self.misses = 0
        """Grammars of requests that were compiled already, and that were compiled."""
        self.seconds = 0.0
        """Spent compiling, since the start."""

    def warm_up(self) -> None:
        """Read the vocabulary now: the first grammar need not wait for it."""
        self._words()

    def prepare(self, params: SamplingParams) -> Future[None]:
        """Compile what a request needs. The result raises `RequestError` where it cannot be."""
        return self._thread.submit(self._prepare, params)

    def ready(self, params: SamplingParams) -> bool:
        """Whether `mask` would compile nothing. Asked once a request, it counts the hits."""
        with self._lock:
            found = [key in self._compiled for key in _keys(params)]
            self.hits += sum(found)
            return all(found)

    def mask(self, params: SamplingParams, stop_ids: Collection[int]) -> GrammarMask:
        """A new output's mask; see `MaskFactory`. Raises `RequestError` where a grammar cannot be compiled."""
        constraint, words = params.constraint, params.bad_words
        return GrammarMask(
            None if constraint is None else self._of_constraint(constraint).deep_copy(),
            self._of_words(words).deep_copy() if words else None,
            self._tokenizer.special_ids,
            self._eos_id,
            tuple(stop_ids),
            self._allowed(params),
            params.min_tokens,
        )

    def _prepare(self, params: SamplingParams) -> None:
        """Compile alone: other fields of the request are checked when it is added."""
        if params.constraint is not None:
            self._of_constraint(params.constraint)
        if params.bad_words:
            self._of_words(params.bad_words)

    def _of_constraint(self, constraint: Constraint) -> LLMatcher:
        return self._matcher(constraint, lambda: grammar_text(constraint))

    def _of_words(self, words: tuple[str, ...]) -> LLMatcher:
        return self._matcher(words, lambda: bad_words_text(words))

    def _matcher(self, key: Constraint | tuple[str, ...], text: Callable[[], str]) -> LLMatcher:
        """The compiled grammar, at its beginning: to be copied."""
        with self._lock:
            found = self._compiled.get(key)
            if found is not None:
                self._compiled.move_to_end(key)
                return found
        field = "constraint" if isinstance(key, Constraint) else "bad_words"
        began = time.perf_counter()
        matcher = LLMatcher(self._words(), text(), log_level=0)
        if matcher.is_error():
            raise compile_error(matcher.get_error()) if field == "constraint" else _bad_words_error(matcher)
        if isinstance(key, Constraint):
            refuse_empty(matcher)
            if key.prefix and not matcher.consume_tokens(self._words().tokenize_str(key.prefix)):
                raise RequestError.about("constraint", "{constraint}: the text that is to go on does not satisfy it")
        with self._lock:
            self.misses += 1
            self.seconds += time.perf_counter() - began
            self._compiled[key] = matcher
            while len(self._compiled) > MOST:
                self._compiled.popitem(last=False)
        return matcher

    def _words(self) -> LLTokenizer:
        with self._reading:  # a lock of its own: `ready` does not wait for the vocabulary
            if self._vocabulary is None:
                self._vocabulary = grammar_tokenizer(self._tokenizer, self._vocab_size)
            return self._vocabulary

    @property
    def _eos_id(self) -> int:
        eos = self._tokenizer.eos_token_id
        assert eos is not None  # `grammar_tokenizer` refuses a tokenizer without one
        return eos

    def _allowed(self, params: SamplingParams) -> np.ndarray | None:
        if params.allowed_token_ids is None:
            return None
        words_W = np.zeros(-(-self._vocab_size // 32), np.uint32)
        set_ids(words_W, params.allowed_token_ids)
        return words_W


def _give_way() -> None:
    """Make this thread alone nicer."""
    thread = threading.get_native_id()
    os.setpriority(os.PRIO_PROCESS, thread, os.getpriority(os.PRIO_PROCESS, thread) + NICE)


def _keys(params: SamplingParams) -> list[Constraint | tuple[str, ...]]:
    keys: list[Constraint | tuple[str, ...]] = [params.bad_words] if params.bad_words else []
    return keys if params.constraint is None else [*keys, params.constraint]


def _bad_words_error(matcher: LLMatcher) -> RequestError:
    return RequestError.about("bad_words", "{bad_words} are too much for one grammar: {}", matcher.get_error())
