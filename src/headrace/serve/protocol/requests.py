"""`GenerationRequest`: a request's fields, read and checked. Prompts are not read here: that takes a tokenizer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from headrace.cache.key import CacheKey
from headrace.dialects.base import AnswerShape
from headrace.engine.schedule.sampling import SamplingParams
from headrace.errors import renamed_fields
from headrace.serve.errors import RefusedError
from headrace.serve.protocol.bodies import Body
from headrace.serve.protocol.constraints import constraint_field, read_constraint
from headrace.serve.protocol.fields import CHAT, TABLE

__all__ = ["GenerationRequest", "read_generation_request"]

STREAM_OPTIONS = ("include_usage", "continuous_usage_stats")
MOST_SHOWN = 8
PADDING = "include_obfuscation"
"""A stream option of OpenAI's that may be false."""
SAMPLING = {field.name: field.sampling for field in TABLE if field.sampling is not None}


@dataclass(frozen=True, kw_only=True)
class GenerationRequest:
    """Everything but the prompts."""

    params: SamplingParams
    stream: bool = False
    include_usage: bool = False
    """A last chunk with the usage."""
    continuous_usage: bool = False
    """The usage in every chunk."""
    echo: bool = False
    only_echo: bool = False
    """Return the echo only: generate no token."""
    logprobs: int | None = None
    """Alternatives to show for each token; None: no log-probabilities."""
    prompt_tables: bool = False
    """Show `prompt_logprobs`, which an echo computes too."""
    token_ids: bool = False
    tokens_as_ids: bool = False
    """Write tokens as "token_id:5" beside their log-probabilities."""
    explain: bool = False
    predicted: bool = False
    """Whether the request has a prediction: then usage has accepted and rejected prediction tokens."""
    request_id: str | None = None
    priority: int = 0
    cache_key: CacheKey
    shape: AnswerShape | None = None
    """What an assistant's message may be, where it is more than content."""
    begun: str = ""
    """The text of the message before what is generated, where the answer does not repeat it."""
    include_reasoning: bool = True
    names: Mapping[str, str]
    """The request's names of fields that the engine calls otherwise."""


def read_generation_request(
    body: Body, endpoint: str, defaults: Mapping[str, Any], priorities: bool
) -> GenerationRequest:
    """A body that a `Reader` has checked. `defaults` are the model's own sampling parameters.

    `priorities` is whether the engine schedules by priority. Raises `RefusedError` with the field at fault.
    """
    _check_together(body, endpoint, priorities)
    options = body.get("stream_options", {})
    names = _names(body, endpoint)
    only_echo = bool(body.get("echo")) and body.get("max_tokens") == 0
    return GenerationRequest(
        params=_sampling_params(body, endpoint, defaults, only_echo, names),
        stream=body.get("stream", False),
        include_usage=options.get("include_usage") is True,
        continuous_usage=options.get("continuous_usage_stats") is True and options.get("include_usage") is not False,
        echo=body.get("echo", False),
        only_echo=only_echo,
        logprobs=_logprobs(body, endpoint),
        prompt_tables="prompt_logprobs" in body,
        token_ids=body.get("return_token_ids", False),
        tokens_as_ids=body.get("return_tokens_as_token_ids", False),
        explain=body.get("explain", False),
        predicted="prediction" in body,
        request_id=body.get("request_id"),
        priority=body.get("priority", 0),
        cache_key=CacheKey(salt=body.get("cache_salt")),
        include_reasoning=body.get("include_reasoning", True),
        names=names,
    )


def _names(body: Body, endpoint: str) -> Mapping[str, str]:
    """The engine's names of fields to those of this request."""
    names = {"beam_width": "n", "constraint": constraint_field(body)}
    if endpoint != CHAT:
        return names
    length = "max_completion_tokens" if "max_completion_tokens" in body else "max_tokens"
    return {**names, "logprobs": "top_logprobs", "max_tokens": length}


def _need(ok: bool, message: str, param: str) -> None:
    if not ok:
        raise RefusedError(message, param)


def _check_together(body: Body, endpoint: str, priorities: bool) -> None:
    """Refuse fields that would have no effect, or that contradict each other."""
    stream = body.get("stream", False)
    _check_stream_options(body.get("stream_options", {}), stream)
    _need(
        not (stream and "prompt_logprobs" in body),
        "prompt_logprobs cannot be streamed: leave out stream, or ask a completion for echo and logprobs",
        "prompt_logprobs",
    )
    beams = body.get("use_beam_search", False)
    _need(
        beams or body.get("length_penalty", 1.0) == 1.0, "length_penalty needs use_beam_search: true", "length_penalty"
    )
    _need(
        priorities or not body.get("priority"), "priority needs a server with --scheduling-policy priority", "priority"
    )
    _need(
        not body.get("return_tokens_as_token_ids") or _logprobs(body, endpoint) is not None,
        "return_tokens_as_token_ids needs logprobs",
        "return_tokens_as_token_ids",
    )
    if endpoint == CHAT:
        _need(
            not body.get("top_logprobs") or body.get("logprobs", False),
            "top_logprobs needs logprobs: true",
            "top_logprobs",
        )
        both = {body[name] for name in ("max_tokens", "max_completion_tokens") if name in body}
        _need(len(both) < 2, "max_tokens and max_completion_tokens differ: they are one setting", "max_tokens")


def _check_stream_options(options: Mapping[str, Any], stream: bool) -> None:
    for name, value in options.items():
        field = f"stream_options.{name[:60]}"
        _need(
            name in (*STREAM_OPTIONS, PADDING), f"{field} is not one of {', '.join(STREAM_OPTIONS)}", "stream_options"
        )
        _need(value is None or isinstance(value, bool), f"{field} must be true or false", "stream_options")
        _need(not value or name != PADDING, f"{field} cannot be honoured: chunks are not padded", "stream_options")
    _need(stream or not set(options.values()) - {False}, "stream_options needs stream: true", "stream_options")


def _logprobs(body: Body, endpoint: str) -> int | None:
    if endpoint == CHAT:
        return body.get("top_logprobs", 0) if body.get("logprobs", False) else None
    return body.get("logprobs")


def _sampling_params(
    body: Body, endpoint: str, defaults: Mapping[str, Any], only_echo: bool, names: Mapping[str, str]
) -> SamplingParams:
    """The model's defaults, overridden by OpenAI's for the endpoint, then by the request's."""
    given = {SAMPLING[name]: value for name, value in body.items() if name in SAMPLING}
    given["logit_bias"] = _biases(body.get("logit_bias", {}))
    given["n"] = body.get("n", 1)
    given["stop"] = body.get("stop", ())
    given["constraint"] = read_constraint(body)
    if body.get("use_beam_search", False):
        given["beam_width"] = given["n"]
    for name in ("max_completion_tokens", "max_tokens"):
        if name in body:
            given["max_tokens"] = body[name]
    if only_echo:
        given["max_tokens"] = 1
    logprobs = _logprobs(body, endpoint)
    if logprobs is not None:
        given["logprobs"] = logprobs
        if body.get("echo") and endpoint != CHAT:
            given["prompt_logprobs"] = max(logprobs, body.get("prompt_logprobs", 0))
    if given.get("top_p") == 0:  # the best token alone, as OpenAI takes it; the sampler has no empty share
        given |= {"top_p": 1.0, "top_k": 1}
    with renamed_fields(names):
        return SamplingParams(**{**defaults, **({"max_tokens": None} if endpoint == CHAT else {}), **given})


def _biases(sent: Mapping[str, float]) -> dict[int, float]:
    wrong = [key for key in sent if not (key.isascii() and key.isdecimal() and len(key) < 11)]
    shown = ", ".join(repr(key[:60]) for key in wrong[:MOST_SHOWN]) + ", …" * (len(wrong) > MOST_SHOWN)
    _need(
        not wrong,
        f"logit_bias: {shown} {'is not a token id' if len(wrong) == 1 else 'are not token ids'}",
        "logit_bias",
    )
    return {int(key): value for key, value in sent.items()}
