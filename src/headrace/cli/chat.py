"""`headrace chat`: talk to a checkpoint that has a chat template."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from headrace.cli.options import add_engine_options, engine_options
from headrace.cli.progress import load
from headrace.cli.sampling import add_sampling_options, sampling_params
from headrace.errors import RequestError

__all__ = ["add"]


def add(commands: Any) -> None:
    """Register the command."""
    parser = commands.add_parser(
        "chat", help="talk to a model", description="Talk to a checkpoint. Ctrl-D or /quit ends, /new begins again."
    )
    parser.add_argument("model", help="a checkpoint folder in Hugging Face layout, or a hub id")
    parser.add_argument("--system", metavar="TEXT", help="a system message")
    add_sampling_options(parser)
    add_engine_options(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Read a line, answer, and keep the conversation: what was said before comes from the prefix cache."""
    llm = load(arguments.model, engine_options(arguments))
    if not llm.tokenizer.has_chat_template:
        raise RequestError(f"{arguments.model} has no chat template: use headrace generate")
    params = sampling_params(arguments, llm.default_sampling_params(), max_tokens=None)
    opening = [{"role": "system", "content": arguments.system}] if arguments.system else []
    messages = list(opening)
    while (line := _read()) is not None:
        if line == "/new":
            messages = list(opening)
            continue
        messages.append({"role": "user", "content": line})
        try:
            messages.append({"role": "assistant", "content": _answer(llm, messages, params)})
        except RequestError as error:
            messages.pop()
            print(f"headrace: {error}. Say /new to begin again.", file=sys.stderr)


def _answer(llm: Any, messages: list[dict[str, str]], params: Any) -> str:
    text = ""
    for output in llm.stream(llm.chat_prompt(messages), params):
        sys.stdout.write(output.outputs[0].text[len(text) :])
        sys.stdout.flush()
        text = output.outputs[0].text
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
