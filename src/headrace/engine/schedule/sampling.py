"""`SamplingParams`: what a request asks of the sampler. Frozen, and validated once."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from headrace.engine.schedule.constraint import Constraint
from headrace.errors import RequestError

__all__ = ["SamplingParams"]

MAX_LOGPROBS = 20
MAX_BEAMS = 64
MAX_BAD_WORDS = 256
MOST = 2**31 - 1
"""The largest count that a parameter may have."""


def _check(ok: bool, param: str, template: str, *values: object) -> None:
    if not ok:
        raise RequestError.about(param, template, *values)


def _integer(name: str, value: object, low: int, high: int | None = None, place: str = "") -> None:
    ok = isinstance(value, int) and not isinstance(value, bool) and value >= low and (high is None or value <= high)
    bound = f"at least {low}" if high is None else f"from {low} to {high}"
    _check(ok, name, f"{{{name}}}{{}}={{}} must be an integer {{}}", place, repr(value), bound)


def _number(
    name: str, value: object, low: float, high: float = math.inf, *, open_low: bool = False, place: str = ""
) -> None:
    ok = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    ok = ok and low <= float(value) <= high and not (open_low and value == low)  # type: ignore[arg-type]
    bound = f"{'more than' if open_low else 'at least'} {low:g}" + (
        "" if math.isinf(high) else f" and at most {high:g}"
    )
    _check(ok, name, f"{{{name}}}{{}}={{}} must be a finite number, {{}}", place, repr(value), bound)


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """Sampling parameters, by vLLM's names.

    The order is: penalties, logit_bias and bans on the logits; division by `temperature` (0 is greedy); `top_k`,
    `top_p`, `min_p`; then argmax(log p + Gumbel noise) with noise keyed by (seed, choice, position, token id), so
    the same seed gives the same tokens whatever else runs; None or -1 is a random one. `max_tokens=None` goes to
    the end of the context.

    The text has no special tokens but those of `shown_special_ids`, or all with `skip_special_tokens=False`.

    `logprobs` and `prompt_logprobs` ask for the chosen token (0) and that many best ones beside it, of the *raw*
    distribution, before penalties and temperature. `prompt_logprobs` recomputes the prompt from position 0.

    `constraint` is a language that the whole output is in, and `bad_words` are texts that it does not contain; tokens
    that leave it are never sampled. Where they leave one text only, its tokens are not sampled at all and have
    probability 1: `jump_forward=False` samples them too, which may choose another spelling. What is sampled comes from
    the model's distribution renormalised over what is allowed behind its prefix, which is not the model's distribution
    given that the whole text is valid.

    `prediction` are tokens that the output may be like, such as those of a text to be edited: what they say is drafted,
    which changes the speed and never a token.

    With `beam_width` > 0 the request is a beam search: `n` best beams come back, ranked by
    Σ logprob / length ** length_penalty; the sampling fields above do not apply.
    """

    n: int = 1
    max_tokens: int | None = 16
    min_tokens: int = 0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    allowed_token_ids: tuple[int, ...] | None = None
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    skip_special_tokens: bool = True
    shown_special_ids: tuple[int, ...] = ()
    beam_width: int = 0
    length_penalty: float = 1.0
    constraint: Constraint | None = None
    bad_words: tuple[str, ...] = ()
    jump_forward: bool = True
    prediction: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if isinstance(self.stop, str):
            object.__setattr__(self, "stop", (self.stop,))
        for name in ("stop", "stop_token_ids", "bad_words", "shown_special_ids", "prediction"):
            object.__setattr__(self, name, tuple(getattr(self, name) or ()))
        if self.top_k == -1:
            object.__setattr__(self, "top_k", 0)
        if self.seed == -1:
            object.__setattr__(self, "seed", None)
        object.__setattr__(self, "logit_bias", dict(self.logit_bias or {}))
        self._check_lengths()
        self._check_distribution()
        self._check_tokens()
        self._check_text()

    def _check_lengths(self) -> None:
        _integer("n", self.n, 1, 256)
        _integer("min_tokens", self.min_tokens, 0, MOST)
        if self.max_tokens is not None:
            _integer("max_tokens", self.max_tokens, 1, MOST)
            _check(
                self.min_tokens <= self.max_tokens,
                "min_tokens",
                "{min_tokens}={} is more than {max_tokens}={}",
                self.min_tokens,
                self.max_tokens,
            )
        _integer("beam_width", self.beam_width, 0)
        _check(
            self.beam_width <= MAX_BEAMS,
            "beam_width",
            "{beam_width}={} is more than the {} beams that a search can have",
            self.beam_width,
            MAX_BEAMS,
        )
        _check(
            not self.beam_width or self.n <= self.beam_width,
            "n",
            "{n}={} is more than {beam_width}={}: a search returns at most its beams",
            self.n,
            self.beam_width,
        )
        _number("length_penalty", self.length_penalty, -10.0, 10.0)

    def _check_distribution(self) -> None:
        _number("temperature", self.temperature, 0.0, 100.0)
        _integer("top_k", self.top_k, 0, MOST)
        _number("top_p", self.top_p, 0.0, 1.0, open_low=True)
        _number("min_p", self.min_p, 0.0, 1.0)
        _number("repetition_penalty", self.repetition_penalty, 0.0, open_low=True)
        _number("presence_penalty", self.presence_penalty, -2.0, 2.0)
        _number("frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        if self.seed is not None:
            _integer("seed", self.seed, -(2**63), 2**64 - 1)

    def _check_tokens(self) -> None:
        for token, bias in self.logit_bias.items():
            _integer("logit_bias", token, 0, place=" key")
            _number("logit_bias", bias, -100.0, 100.0, place=f"[{token}]")
        for name in ("stop_token_ids", "shown_special_ids", "prediction"):
            ids = getattr(self, name)
            if not all(type(token) is int and token >= 0 for token in ids):  # a prediction may be long
                for i, token in enumerate(ids):
                    _integer(name, token, 0, place=f"[{i}]")
        if self.allowed_token_ids is not None:
            object.__setattr__(self, "allowed_token_ids", tuple(self.allowed_token_ids))
            _check(
                len(self.allowed_token_ids) > 0,
                "allowed_token_ids",
                "{allowed_token_ids} is empty: nothing could be sampled",
            )
            for i, token in enumerate(self.allowed_token_ids):
                _integer("allowed_token_ids", token, 0, place=f"[{i}]")
        for name in ("logprobs", "prompt_logprobs"):
            if getattr(self, name) is not None:
                _integer(name, getattr(self, name), 0, MAX_LOGPROBS)

    def _check_text(self) -> None:
        for name in ("stop", "bad_words"):
            for i, text in enumerate(getattr(self, name)):
                ok = isinstance(text, str) and text != ""
                _check(ok, name, f"{{{name}}}[{{}}]={{}} must be a non-empty string", i, repr(text))
        count = len(self.bad_words)
        _check(count <= MAX_BAD_WORDS, "bad_words", "{bad_words} has {} texts: at most {}", count, MAX_BAD_WORDS)
        ok = self.constraint is None or isinstance(self.constraint, Constraint)
        _check(ok, "constraint", "{constraint} must be a Constraint, not {}", type(self.constraint).__name__)
        name = "bad_words" if self.constraint is None else "constraint"
        _check(
            not (self.masked and self.beam_width),
            name,
            f"{{{name}}} cannot be honoured by a beam search: leave one of them out",
        )

        _check(
            not (self.prediction and self.beam_width),
            "prediction",
            "{prediction} does not go with a beam search, which drafts nothing: leave one of them out",
        )

    @property
    def masked(self) -> bool:
        """Whether a `TokenMask` says which tokens may come next."""
        return self.constraint is not None or bool(self.bad_words)

    @property
    def follows_output(self) -> bool:
        """Whether the next token's distribution depends on tokens already produced, other than through the model.

        Such a request is never planned ahead of its results.
        """
        return (
            self.repetition_penalty != 1.0
            or self.presence_penalty != 0.0
            or self.frequency_penalty != 0.0
            or self.beam_width > 0
            or self.masked
        )
