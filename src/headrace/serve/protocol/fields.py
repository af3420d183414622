"""The one table of request fields: every field that clients of OpenAI, vLLM and SGLang send, and its handling.

A field is *honoured*, *refused* by name (unless its value has no effect, as `"tools": []`), or *ignored* where
OpenAI's own client sends it for OpenAI's book-keeping. A field that is not in the table is refused too. The request
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

Handling = Literal["honoured", "refused", "ignored"]
T = TypeVar("T")
MOST_BIASES = 1024
Count = Annotated[int, Constraint(ge=0, le=2**31 - 1)]
Positive = Annotated[int, Constraint(ge=1, le=2**31 - 1)]
Id = Annotated[int, Constraint(ge=0, le=2**31 - 1)]
Seed = Annotated[int, Constraint(ge=-(2**63), le=2**63 - 1)]
Version = Annotated[int, Constraint(ge=0, le=2**53 - 1)]
WholeOrMinusOne = Annotated[int, Constraint(ge=-1, le=2**31 - 1)]
Text = Annotated[str, Constraint(min_length=1)]
StopText = Annotated[str, Constraint(min_length=1, max_length=1024)]
Name = Annotated[str, Constraint(min_length=1, max_length=256)]
# Stop at a list's first error: reporting millions of them would take minutes and gigabytes.
Some = Annotated[T, Constraint(min_length=1, fail_fast=True)]
Ids = Some[list[Id]]
PromptValue = str | Ids | Some[list[str]] | Some[list[Ids]]
MessagesValue = Some[list[dict[str, Any]]]


def _few(value: Any) -> Any:
    """Check the number before any is parsed."""
    if isinstance(value, dict) and len(value) > MOST_BIASES:
        raise PydanticCustomError("too_long", f"at most {MOST_BIASES} tokens can have a bias, not {len(value)}")
    return value


StopTexts = Annotated[list[StopText], Constraint(max_length=64, fail_fast=True)]
BadWords = Annotated[list[StopText], Constraint(max_length=256, fail_fast=True)]
AllowedIds = Annotated[list[Id], Constraint(min_length=1, max_length=2**18, fail_fast=True)]
StopIds = Annotated[list[Id], Constraint(max_length=1024, fail_fast=True)]
Biases = Annotated[dict[str, float], Constraint(max_length=MOST_BIASES), BeforeValidator(_few)]


@dataclass(frozen=True, kw_only=True)
class Field:
    """One row. `kind` is the JSON type that is accepted; null always means that the field was not sent."""

    name: str
    description: str
    """Its effect, or why it is refused or ignored."""
    kind: Any = Any
    on: tuple[str, ...] = BOTH
    handling: Handling = "honoured"
    neutral: tuple[Any, ...] = ()
    """Values of a refused field that have no effect, and may be sent."""
    sampling: str | None = None
    """The `SamplingParams` field that takes its value unchanged."""
    required: bool = False
    same_as: str | None = None
    """Another field. This refused one may be sent with the same value, which has no effect."""


def honoured(
    name: str,
    kind: Any,
    description: str,
    on: tuple[str, ...] = BOTH,
    *,
    sets: str | None = None,
    required: bool = False,
) -> Field:
    """A field that is honoured."""
    return Field(name=name, description=description, kind=kind, on=on, sampling=sets, required=required)


def refused(
    name: str, description: str, *neutral: Any, on: tuple[str, ...] = BOTH, same_as: str | None = None
) -> Field:
    """A field that is refused, unless its value is one of `neutral` or that of the field `same_as`."""
    return Field(name=name, description=description, on=on, handling="refused", neutral=neutral, same_as=same_as)


def ignored(name: str, description: str, on: tuple[str, ...] = BOTH) -> Field:
    """A field that is ignored: OpenAI's book-keeping."""
    return Field(name=name, description=description, on=on, handling="ignored")


NEWER = "tools and tool_choice are the newer names"
STRUCTURED = "structured_outputs takes it"
TEXT_ONLY = "text only"
NO_EXPERTS = "models served here have no experts"
BEAMS = "a beam search of this many beams"

TABLE: tuple[Field, ...] = (
    # The prompt and the length.
    honoured("model", str, "the served model's name; another one is a 404", (*PROMPTS, TOKENIZE, DETOKENIZE)),
    honoured("prompt", PromptValue, "text, token ids, or a list of either", (COMPLETIONS,), required=True),
    honoured(
        "messages", MessagesValue, "the conversation; content is text or a list of text parts", (CHAT,), required=True
    ),
    honoured("input", PromptValue, "text, token ids, or a list of either", (EMBEDDINGS,), required=True),
    honoured("n", Annotated[int, Constraint(ge=1, le=256)], "choices for each prompt, which share its blocks"),
    honoured("max_tokens", Count, "tokens to generate; 16 by default, and in a chat to the end of the context"),
    honoured("max_completion_tokens", Positive, "the same as max_tokens, by its newer name", (CHAT,)),
    honoured("min_tokens", Count, "tokens before an end token or a stop string may end it", sets="min_tokens"),
    honoured("stream", bool, "server-sent events, a chunk at a time"),
    honoured(
        "stream_options",
        dict[str, Any],
        "include_usage: a last chunk with usage and no choices; "
        "continuous_usage_stats: usage in every chunk, unless include_usage is false. True needs stream",
    ),
    # Sampling.
    honoured("temperature", float, "0 is greedy", sets="temperature"),
    honoured(
        "top_p", float, "sample among the best tokens that make up this probability; 0 is the best one", sets="top_p"
    ),
    honoured("top_k", WholeOrMinusOne, "sample among the k best; 0 or -1 is all", sets="top_k"),
    honoured("min_p", float, "drop tokens below this share of the best one's probability", sets="min_p"),
    honoured("seed", Seed, "the same seed gives the same tokens, whatever else runs; -1 is a random one", sets="seed"),
    honoured(
        "frequency_penalty",
        float,
        "subtracted from a logit for each time that its token stands in the output",
        sets="frequency_penalty",
    ),
    honoured("presence_penalty", float, "subtracted from the logits of tokens in the output", sets="presence_penalty"),
    honoured("repetition_penalty", float, "divides the logits of tokens seen before", sets="repetition_penalty"),
    honoured("logit_bias", Biases, "token id to a number from -100 to 100, added to its logit; at most 1024"),
    honoured("allowed_token_ids", AllowedIds, "only these can be generated; at most 262144", sets="allowed_token_ids"),
    honoured("use_beam_search", bool, f"{BEAMS} as n says; the sampling fields do not apply"),
    honoured(
        "length_penalty",
        float,
        "beams rank by log-probability / length to this power. Needs use_beam_search",
        sets="length_penalty",
    ),
    # Constraints and tools.
    honoured(
        "response_format",
        dict[str, Any],
        "OpenAI's: json_schema or json_object; text is no constraint. In a chat, of the answer beside tool calls",
    ),
    honoured(
        "structured_outputs",
        dict[str, Any],
        "vLLM's: one of json (a schema), json_object, regex, choice, grammar (Lark or GBNF). whitespace_pattern and "
        "disable_any_whitespace: false let JSON have other space than after its commas and colons",
    ),
    honoured("bad_words", BadWords, "texts that the output does not contain, however tokenized", sets="bad_words"),
    honoured(
        "jump_forward",
        bool,
        "take tokens that a constraint leaves no choice about without sampling; true by default",
        sets="jump_forward",
    ),
    honoured("tools", list[dict[str, Any]], "functions that the answer may call", (CHAT, TOKENIZE)),
    honoured(
        "tool_choice",
        Literal["none", "auto", "required"] | dict[str, Any],
        "whether it calls some: none, auto (the default with tools), required, or the one that is named",
        (CHAT,),
    ),
    honoured("parallel_tool_calls", bool, "false: at most one call; true by default", (CHAT,)),
    honoured("include_reasoning", bool, "false leaves the text of a think block out of the answer", (CHAT,)),
    honoured(
        "prediction",
        dict[str, Any],
        'text that the answer may be like, as {"type": "content", "content": text or text parts}. Where it is right, '
        "the answer comes sooner; it changes no token under --verifier coupled, the default",
        (CHAT,),
    ),
    # Stopping.
    honoured("stop", StopText | StopTexts, "strings that end it, special tokens too, shown or not; at most 64"),
    honoured("stop_token_ids", StopIds, "tokens that end it; at most 1024", sets="stop_token_ids"),
    honoured("include_stop_str_in_output", bool, "keep the stop string", sets="include_stop_str_in_output"),
    honoured("ignore_eos", bool, "do not end at the model's end token", sets="ignore_eos"),
    # Making the prompt.
    honoured(
        "add_special_tokens",
        bool,
        "the tokenizer's own start and end tokens; true for a prompt, false for a chat",
        (*BOTH, EMBEDDINGS, TOKENIZE),
    ),
    honoured(
        "truncate_prompt_tokens",
        WholeOrMinusOne,
        "keep the last so many tokens of a prompt; -1 is as many as the context holds",
        PROMPTS,
    ),
    honoured(
        "truncation_side",
        Literal["left", "right"],
        "where truncate_prompt_tokens cuts: left, the start, by default; right keeps the first tokens",
        PROMPTS,
    ),
    honoured(
        "add_generation_prompt", bool, "end the prompt where the assistant begins; true by default", (CHAT, TOKENIZE)
    ),
    honoured(
        "continue_final_message", bool, "go on with the last message instead of beginning a new one", (CHAT, TOKENIZE)
    ),
    honoured(
        "chat_template",
        Text,
        "a Jinja template in place of the model's; it runs sandboxed in a process of its own",
        (CHAT, TOKENIZE),
    ),
    honoured(
        "chat_template_kwargs",
        dict[str, Any],
        "variables for the template; one that it does not use is refused, unless it switches off thinking",
        (CHAT, TOKENIZE),
    ),
    honoured(
        "reasoning_effort",
        str,
        "the template's variable of that name; refused where it does not use it. none switches off thinking",
        (CHAT,),
    ),
    # What comes back.
    honoured(
        "logprobs",
        Count,
        "log-probabilities of the tokens and of so many best ones, of the raw distribution",
        (COMPLETIONS,),
    ),
    honoured("logprobs", bool, "log-probabilities of the tokens, of the raw distribution", (CHAT,)),
    honoured("top_logprobs", Count, "so many best ones beside each. Needs logprobs, unless it is 0", (CHAT,)),
    honoured(
        "prompt_logprobs",
        Count,
        "of the prompt's tokens, and of so many best ones. Not with stream",
        sets="prompt_logprobs",
    ),
    honoured("echo", bool, "the prompt's text first; with logprobs, its log-probabilities too", (COMPLETIONS,)),
    honoured("echo", bool, "the last message's content first. Needs continue_final_message", (CHAT,)),
    honoured("skip_special_tokens", bool, "leave special tokens out of the text", sets="skip_special_tokens"),
    honoured("return_token_ids", bool, "prompt_token_ids, and token_ids in each choice"),
    honoured(
        "return_tokens_as_token_ids",
        bool,
        'write tokens as "token_id:5" beside their log-probabilities. Needs logprobs',
    ),
    honoured(
        "explain", bool, "why it took its time: queue, cached tokens, chunks, preemptions, drafts, batch sizes, resumes"
    ),
    honoured("normalize", bool, "scale the vector to length 1; true by default", (EMBEDDINGS,)),
    honoured("use_activation", bool, "the same as normalize, by vLLM's newer name", (EMBEDDINGS,)),
    honoured("encoding_format", Literal["float", "base64"], "numbers, or base64 of little-endian fp32", (EMBEDDINGS,)),
    honoured("prompt", str, "the text", (TOKENIZE,)),
    honoured("messages", MessagesValue, "a conversation, rendered by the chat template", (TOKENIZE,)),
    honoured("return_token_strs", bool, "the tokens as the vocabulary writes them, as well", (TOKENIZE,)),
    honoured("tokens", Annotated[list[Id], Constraint(fail_fast=True)], "token ids", (DETOKENIZE,), required=True),
    # Weights.
    honoured(
        "path",
        Text,
        "a checkpoint folder on the server's machine; every version has its own, which is kept until the next is in",
        (UPDATE,),
        required=True,
    ),
    honoured("version", Version, "what answers call these weights; one more than before by default", (UPDATE,)),
    # Identity and priority.
    honoured("request_id", Name, "becomes part of the answer's id"),
    honoured(
        "priority",
        Annotated[int, Constraint(ge=-(2**31), le=2**31 - 1)],
        "smaller goes first. Needs --scheduling-policy priority",
    ),
    honoured("cache_salt", Name, "share cached prefixes only with requests of the same salt"),
    # Refused.
    refused("functions", NEWER, [], on=(CHAT,)),
    refused("function_call", NEWER, "none", "auto", on=(CHAT,)),
    refused("json_schema", f"{STRUCTURED} as json"),
    refused("regex", f"{STRUCTURED}"),
    refused("ebnf", f"{STRUCTURED} as grammar"),
    refused("stop_regex", "stop takes plain strings", "", []),
    refused("no_stop_trim", "include_stop_str_in_output does that", False),
    refused("logits_processors", "no code is run on logits: logit_bias and allowed_token_ids act on tokens", []),
    refused("custom_logit_processor", "no code is run on logits: logit_bias and allowed_token_ids act on tokens"),
    refused("custom_params", "there is no custom_logit_processor to take them", {}),
    refused("vllm_xargs", "there are no extensions to take them", {}),
    refused("watermarking", "text is not marked", False),
    refused("spaces_between_special_tokens", "special tokens are written as the tokenizer does", True),
    refused("logprob_token_ids", "log-probabilities are of the best tokens: ask for logprobs"),
    refused("return_prompt_token_ids", "return_token_ids gives the prompt's too", False),
    refused("return_token_offsets", "places of tokens in the text are not computed", False),
    refused("return_prompt_text", "echo gives a prompt's text", False),
    refused("return_hidden_states", "/v1/embeddings gives the mean of the last ones", False),
    refused("return_meta_info", "explain gives a request's times", False),
    refused("return_cached_tokens_details", "usage has the number of cached tokens", False),
    refused("return_routed_experts", NO_EXPERTS, False),
    refused("routed_experts_start_len", NO_EXPERTS, 0),
    refused("routed_experts_prompt_start", NO_EXPERTS, 0),
    refused("stream_interval", "a chunk is sent as soon as it is there", 1),
    refused("repetition_detection", "repetitions do not end an output: see repetition_penalty"),
    refused("thinking_token_budget", "reasoning ends where the model ends it", -1),
    refused("separate_reasoning", "reasoning is always separated: include_reasoning leaves it out", True, on=(CHAT,)),
    refused("stream_reasoning", "reasoning is streamed as it comes: include_reasoning leaves it out", True, on=(CHAT,)),
    refused("documents", "documents are not passed to chat templates: put them into messages", [], on=(CHAT,)),
    refused("prompt_embeds", "prompts are text or token ids", on=(COMPLETIONS,)),
    refused("input_ids", "send token ids to /v1/completions", on=(CHAT,)),
    refused("lora_path", "there are no adapters"),
    refused(
        "session_id", "requests are not tied to sessions: there is one instance, and its cache is shared by prefix"
    ),
    refused("session_params", "requests are not tied to sessions", {}),
    refused("rid", "request_id names a request"),
    refused("custom_labels", "metrics have no labels of requests", {}),
    refused("kv_transfer_params", "the cache of another instance cannot be read", {}),
    refused("ec_transfer_params", "the cache of another instance cannot be read", {}),
    refused("best_of", "every choice that is computed is returned: ask for n", 1, same_as="n"),
    refused("suffix", "text cannot be filled in before a suffix", "", on=(COMPLETIONS,)),
    refused("dimensions", "an embedding has the model's own width", on=(EMBEDDINGS,)),
    refused("priority", "embeddings are computed in the order that they come", 0, on=(EMBEDDINGS,)),
    refused("embed_dtype", "embeddings are float32", "float32", on=(EMBEDDINGS,)),
    refused("endianness", "base64 is of little-endian numbers", "little", "native", on=(EMBEDDINGS,)),
    refused("skip_special_tokens", "the text has its special tokens", False, on=(DETOKENIZE,)),
    refused("modalities", TEXT_ONLY, ["text"], on=(CHAT,)),
    refused("audio", TEXT_ONLY, on=(CHAT,)),
    refused("mm_processor_kwargs", TEXT_ONLY, {}, on=(*PROMPTS, TOKENIZE)),
    refused("media_io_kwargs", TEXT_ONLY, {}, on=(CHAT, TOKENIZE)),
    refused("images_config", TEXT_ONLY, {}),
    refused("use_audio_in_video", TEXT_ONLY, False, on=(CHAT,)),
    refused("return_mm_kwargs", TEXT_ONLY, True),
    refused("web_search_options", "nothing is searched", on=(CHAT,)),
    refused("verbosity", "models served here have no such setting", "medium", on=(CHAT,)),
    # Ignored.
    ignored("user", "names an end user to OpenAI", PROMPTS),
    ignored("safety_identifier", "names an end user to OpenAI", (CHAT,)),
    ignored("metadata", "labels in OpenAI's dashboard", (CHAT,)),
    ignored("store", "keeps the answer in OpenAI's dashboard; nothing is kept here", (CHAT,)),
    ignored("service_tier", "OpenAI's prices", (CHAT,)),
    ignored("prompt_cache_key", "steers OpenAI's cache; here prefixes are shared without it", (CHAT,)),
    ignored("prompt_cache_retention", "steers OpenAI's cache; here prefixes are shared without it", (CHAT,)),
)


def fields_of(endpoint: str) -> Mapping[str, Field]:
    """The rows of one endpoint, by name."""
    return {field.name: field for field in TABLE if endpoint in field.on}


def markdown() -> str:
    """The table as `docs/server.md` has it."""
    rows = ["| field | of | |", "|---|---|---|"]
    for field in sorted(TABLE, key=lambda f: (("honoured", "refused", "ignored").index(f.handling), f.name, f.on)):
        where = ", ".join(endpoint.removeprefix("/v1/") for endpoint in field.on)
        handling = "" if field.handling == "honoured" else f"**{field.handling}**: "
        values = [f"`{json.dumps(n)}`" for n in field.neutral] + [f"that of `{field.same_as}`"] * bool(field.same_as)
        neutral = f" ({', '.join(values)} may be sent)" if values else ""
        rows.append(f"| `{field.name}` | {where} | {handling}{field.description}{neutral} |")
    return "\n".join(rows) + "\n"
