"""The one table of request fields: every field that clients of OpenAI, vLLM and SGLang send, and what becomes of it.

A field is *honoured*, *refused* by name (unless its value asks for nothing, as `"tools": []`), or *ignored* where
OpenAI's own client sends it for OpenAI's own book-keeping. A field that is not in the table is refused too. The request
models, the OpenAPI document and `docs/server.md` are made from this table.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BeforeValidator
from pydantic import Field as Constraint
from pydantic_core import PydanticCustomError

__all__ = [
    "CHAT",
    "COMPLETIONS",
    "DETOKENIZE",
    "EMBEDDINGS",
    "TABLE",
    "TOKENIZE",
    "UPDATE",
    "Field",
    "fields_of",
    "markdown",
]

COMPLETIONS, CHAT, EMBEDDINGS = "/v1/completions", "/v1/chat/completions", "/v1/embeddings"
TOKENIZE, DETOKENIZE, UPDATE = "/tokenize", "/detokenize", "/update_weights"
BOTH = (COMPLETIONS, CHAT)
PROMPTS = (COMPLETIONS, CHAT, EMBEDDINGS)

Fate = Literal["honoured", "refused", "ignored"]
T = TypeVar("T")
MOST_BIASES = 1024
Count = Annotated[int, Constraint(ge=0, le=2**31 - 1)]
Positive = Annotated[int, Constraint(ge=1, le=2**31 - 1)]
Id = Annotated[int, Constraint(ge=0, le=2**31 - 1)]
Version = Annotated[int, Constraint(ge=0, le=2**53 - 1)]
WholeOrMinusOne = Annotated[int, Constraint(ge=-1, le=2**31 - 1)]
Text = Annotated[str, Constraint(min_length=1)]
StopText = Annotated[str, Constraint(min_length=1, max_length=1024)]
Name = Annotated[str, Constraint(min_length=1, max_length=256)]
# A list is read to its first mistake: millions of them would take minutes, and gigabytes to tell.
Some = Annotated[T, Constraint(min_length=1, fail_fast=True)]
Ids = Some[list[Id]]
PromptValue = str | Ids | Some[list[str]] | Some[list[Ids]]
MessagesValue = Some[list[dict[str, Any]]]


def _few(value: Any) -> Any:
    """Counted before any is read."""
    if isinstance(value, dict) and len(value) > MOST_BIASES:
        raise PydanticCustomError("too_long", f"at most {MOST_BIASES} tokens can have a bias, not {len(value)}")
    return value


StopTexts = Annotated[list[StopText], Constraint(max_length=64, fail_fast=True)]
AllowedIds = Annotated[list[Id], Constraint(min_length=1, max_length=2**18, fail_fast=True)]
StopIds = Annotated[list[Id], Constraint(max_length=1024, fail_fast=True)]
Biases = Annotated[dict[str, float], Constraint(max_length=MOST_BIASES), BeforeValidator(_few)]


@dataclass(frozen=True, kw_only=True)
class Field:
    """One row. `kind` is the JSON type that is accepted; null always means that the field was not sent."""

    name: str
    says: str
    """What it does, or why it is refused or ignored."""
    kind: Any = Any
    on: tuple[str, ...] = BOTH
    fate: Fate = "honoured"
    nothing: tuple[Any, ...] = ()
    """Values of a refused field that ask for nothing."""
    sampling: str | None = None
    """The `SamplingParams` field that it sets as it is."""
    required: bool = False


def row(
    name: str, kind: Any, says: str, on: tuple[str, ...] = BOTH, *, sets: str | None = None, required: bool = False
) -> Field:
    """A field that is honoured."""
    return Field(name=name, says=says, kind=kind, on=on, sampling=sets, required=required)


def no(name: str, says: str, *nothing: Any, on: tuple[str, ...] = BOTH) -> Field:
    """A field that is refused, unless its value is one of `nothing`."""
    return Field(name=name, says=says, on=on, fate="refused", nothing=nothing)


def books(name: str, says: str, on: tuple[str, ...] = BOTH) -> Field:
    """A field that is ignored: OpenAI's book-keeping."""
    return Field(name=name, says=says, on=on, fate="ignored")


LATER = "constrained decoding is not there yet"
BEAMS = "a beam search of this many beams"

TABLE: tuple[Field, ...] = (
    # What is asked, and of whom.
    row("model", str, "the served model's name; another one is a 404", (*PROMPTS, TOKENIZE, DETOKENIZE)),
    row("prompt", PromptValue, "text, token ids, or a list of either", (COMPLETIONS,), required=True),
    row("messages", MessagesValue, "the conversation; content is text or a list of text parts", (CHAT,), required=True),
    row("input", PromptValue, "text, token ids, or a list of either", (EMBEDDINGS,), required=True),
    row("n", Annotated[int, Constraint(ge=1, le=256)], "choices for each prompt, which share its blocks"),
    row("max_tokens", Count, "tokens to generate; 16 by default, and in a chat to the end of the context"),
    row("max_completion_tokens", Positive, "the same as max_tokens, by its newer name", (CHAT,)),
    row("min_tokens", Count, "tokens before an end token or a stop string may end it", sets="min_tokens"),
    row("stream", bool, "server-sent events, a chunk at a time"),
    row(
        "stream_options",
        dict[str, Any],
        "include_usage: a last chunk with usage and no choices; "
        "continuous_usage_stats: usage in every chunk. Needs stream",
    ),
    # How tokens are chosen.
    row("temperature", float, "0 is greedy", sets="temperature"),
    row("top_p", float, "sample among the best tokens that make up this probability", sets="top_p"),
    row("top_k", WholeOrMinusOne, "sample among the k best; 0 or -1 is all", sets="top_k"),
    row("min_p", float, "drop tokens below this share of the best one's probability", sets="min_p"),
    row("seed", int, "the same seed gives the same tokens, whatever else runs", sets="seed"),
    row(
        "frequency_penalty",
        float,
        "subtracted from a logit for each time that its token stands in the output",
        sets="frequency_penalty",
    ),
    row("presence_penalty", float, "subtracted from the logits of tokens in the output", sets="presence_penalty"),
    row("repetition_penalty", float, "divides the logits of tokens seen before", sets="repetition_penalty"),
    row("logit_bias", Biases, "token id to a number from -100 to 100, added to its logit; at most 1024"),
    row("allowed_token_ids", AllowedIds, "only these can be generated; at most 262144", sets="allowed_token_ids"),
    row("use_beam_search", bool, f"{BEAMS} as n says; the sampling fields do not apply"),
    row(
        "length_penalty",
        float,
        "beams rank by log-probability / length to this power. Needs use_beam_search",
        sets="length_penalty",
    ),
    # Where it ends.
    row("stop", StopText | StopTexts, "strings that end it; at most 64"),
    row("stop_token_ids", StopIds, "tokens that end it; at most 1024", sets="stop_token_ids"),
    row("include_stop_str_in_output", bool, "keep the stop string", sets="include_stop_str_in_output"),
    row("ignore_eos", bool, "do not end at the model's end token", sets="ignore_eos"),
    # How a prompt is made.
    row(
        "add_special_tokens",
        bool,
        "the tokenizer's own start and end tokens; true for a prompt, false for a chat",
        (*BOTH, EMBEDDINGS, TOKENIZE),
    ),
    row(
        "truncate_prompt_tokens",
        WholeOrMinusOne,
        "keep the last so many tokens of a prompt; -1 is as many as the context holds",
        PROMPTS,
    ),
    row("add_generation_prompt", bool, "end the prompt where the assistant begins; true by default", (CHAT, TOKENIZE)),
    row("continue_final_message", bool, "go on with the last message instead of beginning a new one", (CHAT, TOKENIZE)),
    row(
        "chat_template",
        Text,
        "a Jinja template in place of the model's; it runs sandboxed in a process of its own",
        (CHAT, TOKENIZE),
    ),
    row(
        "chat_template_kwargs",
        dict[str, Any],
        "variables for the template; one that it does not use is refused",
        (CHAT, TOKENIZE),
    ),
    row("reasoning_effort", str, "the template's variable of that name; refused where it does not use it", (CHAT,)),
    # What comes back.
    row(
        "logprobs",
        Count,
        "log-probabilities of the tokens and of so many best ones, of the raw distribution",
        (COMPLETIONS,),
    ),
    row("logprobs", bool, "log-probabilities of the tokens, of the raw distribution", (CHAT,)),
    row("top_logprobs", Count, "so many best ones beside each. Needs logprobs", (CHAT,)),
    row(
        "prompt_logprobs",
        Count,
        "of the prompt's tokens, and of so many best ones. Not with stream",
        sets="prompt_logprobs",
    ),
    row("echo", bool, "the prompt's text first; with logprobs, its log-probabilities too", (COMPLETIONS,)),
    row("echo", bool, "the last message's content first. Needs continue_final_message", (CHAT,)),
    row("skip_special_tokens", bool, "leave special tokens out of the text", sets="skip_special_tokens"),
    row("return_token_ids", bool, "prompt_token_ids, and token_ids in each choice"),
    row("explain", bool, "why it took its time: queue, cached tokens, chunks, preemptions, batch sizes, resumes"),
    row("encoding_format", Literal["float", "base64"], "numbers, or base64 of little-endian fp32", (EMBEDDINGS,)),
    row("prompt", str, "the text", (TOKENIZE,)),
    row("messages", MessagesValue, "a conversation, rendered by the chat template", (TOKENIZE,)),
    row("return_token_strs", bool, "the tokens' texts as well", (TOKENIZE,)),
    row("tokens", Annotated[list[Id], Constraint(fail_fast=True)], "token ids", (DETOKENIZE,), required=True),
    # Other weights.
    row(
        "path",
        Text,
        "a checkpoint folder on the server's machine; every version has its own, which is kept until the next is in",
        (UPDATE,),
        required=True,
    ),
    row("version", Version, "what answers call these weights; one more than before by default", (UPDATE,)),
    # Who it is, and who goes first.
    row("request_id", Name, "becomes part of the answer's id"),
    row(
        "priority",
        Annotated[int, Constraint(ge=-(2**31), le=2**31 - 1)],
        "smaller goes first. Needs --scheduling-policy priority",
    ),
    row("cache_salt", Name, "share cached prefixes only with requests of the same salt"),
    # What cannot be honoured.
    no("response_format", f"only text: {LATER}", {"type": "text"}, on=(CHAT,)),
    no("tools", f"tool calls: {LATER}", [], on=(CHAT,)),
    no("tool_choice", f"tool calls: {LATER}", "none", "auto", on=(CHAT,)),
    no("parallel_tool_calls", f"tool calls: {LATER}", on=(CHAT,)),
    no("functions", f"tool calls: {LATER}", [], on=(CHAT,)),
    no("function_call", f"tool calls: {LATER}", "none", "auto", on=(CHAT,)),
    no("structured_outputs", LATER, {}),
    no("bad_words", "words cannot be banned: logit_bias and allowed_token_ids act on tokens", []),
    no("session_id", "requests are not tied to sessions: there is one instance, and its cache is shared by prefix"),
    no("kv_transfer_params", "the cache of another instance cannot be read", {}),
    no("best_of", "every choice that is computed is returned: ask for n", 1, on=(COMPLETIONS,)),
    no("suffix", "text cannot be filled in before a suffix", "", on=(COMPLETIONS,)),
    no("dimensions", "an embedding has the model's own width", on=(EMBEDDINGS,)),
    no("modalities", "text only", ["text"], on=(CHAT,)),
    no("audio", "text only", on=(CHAT,)),
    no("prediction", "predicted outputs are not used", on=(CHAT,)),
    no("web_search_options", "nothing is searched", on=(CHAT,)),
    no("verbosity", "models served here have no such setting", "medium", on=(CHAT,)),
    # What OpenAI's client sends for OpenAI.
    books("user", "names an end user to OpenAI", PROMPTS),
    books("safety_identifier", "names an end user to OpenAI", (CHAT,)),
    books("metadata", "labels in OpenAI's dashboard", (CHAT,)),
    books("store", "keeps the answer in OpenAI's dashboard; nothing is kept here", (CHAT,)),
    books("service_tier", "OpenAI's prices", (CHAT,)),
    books("prompt_cache_key", "steers OpenAI's cache; here prefixes are shared without it", (CHAT,)),
    books("prompt_cache_retention", "steers OpenAI's cache; here prefixes are shared without it", (CHAT,)),
)


def fields_of(endpoint: str) -> Mapping[str, Field]:
    """The rows of one endpoint, by name."""
    return {field.name: field for field in TABLE if endpoint in field.on}


def markdown() -> str:
    """The table as `docs/server.md` has it."""
    rows = ["| field | of | |", "|---|---|---|"]
    for field in sorted(TABLE, key=lambda f: (("honoured", "refused", "ignored").index(f.fate), f.name, f.on)):
        where = ", ".join(endpoint.removeprefix("/v1/") for endpoint in field.on)
        fate = "" if field.fate == "honoured" else f"**{field.fate}**: "
        nothing = f" ({', '.join(f'`{json.dumps(n)}`' for n in field.nothing)} may be sent)" if field.nothing else ""
        rows.append(f"| `{field.name}` | {where} | {fate}{field.says}{nothing} |")
    return "\n".join(rows) + "\n"
