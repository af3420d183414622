"""Which format a model's chat template teaches it, by the markers in the template's text."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType

from headrace.dialects.base import THINK, UNTHINK, Dialect, Tool, ToolChoice
from headrace.dialects.hermes import HERMES
from headrace.dialects.llama import LLAMA3
from headrace.dialects.mistral import MISTRAL
from headrace.dialects.plain import PLAIN
from headrace.errors import ConfigError, RequestError

__all__ = [
    "DIALECTS",
    "answer_dialect",
    "choose_dialect",
    "dialect_named",
    "opens_reasoning",
    "template_reasons",
]

DIALECTS: Mapping[str, Dialect] = MappingProxyType({d.name: d for d in (HERMES, LLAMA3, MISTRAL, PLAIN)})
OTHERS = ("<function=", "<arg_key>", "<tool_sep>", "[ARGS]", "[CALL_ID]")
"""Markers of formats that share one with these: of Qwen3-Coder, GLM, Hunyuan and newer models of Mistral."""
ONE_CALL = "only supports single tool-calls"


def choose_dialect(template_source: str) -> Dialect | None:
    """The format of the calls that a template renders; None where it renders none, or in another format.

    It has one call at most where the template refuses messages with more, as that of Llama 3.1 does.
    """
    found = _rendered(template_source)
    return replace(found, between=None) if found is not None and ONE_CALL in template_source else found


def dialect_named(name: str) -> Dialect:
    """The format of a name. Raises `ConfigError` for an unknown one."""
    if name not in DIALECTS:
        raise ConfigError(f"tool_format={name} is not one of {', '.join(DIALECTS)}")
    return DIALECTS[name]


def answer_dialect(
    template_source: str, tools: tuple[Tool, ...], choice: ToolChoice, tool_format: str | None = None
) -> Dialect | None:
    """The format of an answer's calls; None where it has none. `tool_format` overrides what the template says.

    Where the template has no format, a call that the request demands is JSON alone. Raises `RequestError` where the
    model may only choose to call tools.
    """
    if choice.mode == "none" or not tools:
        return None
    if tool_format is not None:
        return dialect_named(tool_format)
    found = choose_dialect(template_source)
    if found is not None or choice.mode == "required":
        return found or PLAIN
    raise RequestError.about(
        "tools",
        "{tools}: the model's chat template writes tool calls in no format that is known here: send {tool_choice} "
        "with required or with a tool's name, and describe the {tools} in a message",
    )


def template_reasons(template_source: str) -> bool:
    """Whether a template knows `<think>` blocks, as those of models that reason do."""
    return THINK in template_source or UNTHINK in template_source


def opens_reasoning(prompt_text: str) -> bool:
    """Whether a rendered prompt ends in the beginning of a `<think>` block."""
    return prompt_text.rstrip().endswith(THINK)


def _rendered(template_source: str) -> Dialect | None:
    if any(marker in template_source for marker in OTHERS):
        return None
    if "<tool_call>" in template_source and "arguments" in template_source:
        return HERMES
    if "[TOOL_CALLS]" in template_source:
        return MISTRAL
    # Not every template of Llama 3 names the python tag.
    headed = "<|start_header_id|>" in template_source
    return LLAMA3 if headed and '{"name": ' in template_source and '"parameters": ' in template_source else None
