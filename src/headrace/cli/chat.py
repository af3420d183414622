"""`headrace chat`: talk to a checkpoint that has a chat template, or to a server."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import fields
from typing import Any

from headrace.cli.extras import require_extra
from headrace.cli.options import add_engine_options, engine_options
from headrace.cli.progress import load
from headrace.cli.sampling import add_sampling_options, given_sampling, sampling_params
from headrace.errors import ConfigError, RequestError
from headrace.llm.options import EngineOptions

__all__ = ["add"]

KEY_VARIABLES = ("HEADRACE_API_KEY", "OPENAI_API_KEY")
NOT_REMOTE = ("n", "beam_width")
"""Sampling flags that do not apply to a conversation with a server."""
Answer = Callable[[list[dict[str, str]]], Iterator[str]]
"""From messages to the pieces of a reply. Raises `RequestError`."""


def add(commands: Any) -> None:
    """Register the command."""
    parser = commands.add_parser(
        "chat",
        help="talk to a model",
        description="Talk to a checkpoint, or to a server. Ctrl-D or /quit ends, /new begins again.",
    )
    parser.add_argument(
        "model",
        nargs="?",
        help="a checkpoint folder in Hugging Face layout, or a hub id; with --url "
        "the served model's name (default: its first)",
    )
    parser.add_argument(
        "--url", help=f"talk to a server, as http://127.0.0.1:8000; a key is taken from {' or '.join(KEY_VARIABLES)}"
    )
    parser.add_argument("--system", metavar="TEXT", help="a system message")
    add_sampling_options(parser)
    add_engine_options(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Read a line, answer, repeat. Earlier turns come from the prefix cache."""
    if arguments.url is None and arguments.model is None:
        raise ConfigError("no model: name a checkpoint, or a server with --url")
    answer = _local(arguments) if arguments.url is None else _remote(arguments)
    opening = [{"role": "system", "content": arguments.system}] if arguments.system else []
    messages = list(opening)
    while (line := _read()) is not None:
        if line == "/new":
            messages = list(opening)
            continue
        messages.append({"role": "user", "content": line})
        try:
            messages.append({"role": "assistant", "content": _say(answer(messages))})
        except RequestError as error:
            messages.pop()
            print(f"headrace: {error}. Enter /new to begin again.", file=sys.stderr)


def _local(arguments: argparse.Namespace) -> Answer:
    """A model in this process."""
    sampling_params(arguments, {})
    llm = load(arguments.model, engine_options(arguments))
    if not llm.tokenizer.has_chat_template:
        raise RequestError(f"{arguments.model} has no chat template: use headrace generate")
    params = sampling_params(arguments, llm.default_sampling_params(), max_tokens=None)

    def answer(messages: list[dict[str, str]]) -> Iterator[str]:
        shown = 0
        for output in llm.stream(llm.chat_prompt(messages), params):
            text = output.outputs[0].text
            yield text[shown:]
            shown = len(text)

    return answer


def _remote(arguments: argparse.Namespace) -> Answer:
    """A model behind a server."""
    require_extra("chat --url", "serve")
    from headrace.cli.remote import Remote

    for item in fields(EngineOptions):
        if getattr(arguments, item.name) != item.default:
            flag = "--" + item.name.replace("_", "-")
            raise ConfigError(f"{flag} does not apply with --url: set it at headrace serve")
    sampling = given_sampling(arguments)
    for name in NOT_REMOTE:
        if name in sampling:
            raise ConfigError(f"--{name.replace('_', '-')} does not apply with --url: leave it out")
    key = next(filter(None, map(os.environ.get, KEY_VARIABLES)), None)
    remote = Remote(arguments.url, key)
    model = arguments.model or remote.first_model()
    return lambda messages: remote.chat(model, messages, sampling)


def _say(pieces: Iterator[str]) -> str:
    text = ""
    for piece in pieces:
        sys.stdout.write(piece)
        sys.stdout.flush()
        text += piece
    sys.stdout.write("\n")
    return text


def _read() -> str | None:
    while True:
        try:
            line = input("> " if sys.stdin.isatty() else "").strip()
        except EOFError:
            return None
        if line in ("/quit", "/exit"):
            return None
        if line:
            return line
