"""`headrace generate`: continue prompts."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from typing import Any

from headrace.cli.options import add_engine_options, engine_options
from headrace.cli.progress import load
from headrace.cli.sampling import add_sampling_options, sampling_params
from headrace.errors import RequestError
from headrace.typed import expanded

__all__ = ["add"]


def add(commands: Any) -> None:
    """Register the command."""
    parser = commands.add_parser(
        "generate",
        help="continue one prompt or many",
        description="Continue prompts with a Llama, Mistral, Qwen2 or Qwen3 checkpoint.",
    )
    parser.add_argument("model", help="a checkpoint folder in Hugging Face layout, or a hub id")
    parser.add_argument("--prompt", action="append", metavar="TEXT", help="may be given again; - reads standard input")
    parser.add_argument("--prompts", type=expanded, metavar="FILE", help="a prompt a line")
    parser.add_argument("--json", action="store_true", help="print one JSON object a prompt")
    add_sampling_options(parser)
    add_engine_options(parser)
    parser.set_defaults(run=run)


def _prompts(arguments: argparse.Namespace) -> list[str]:
    prompts = [sys.stdin.read() if p == "-" else p for p in arguments.prompt or ()]
    if arguments.prompts is not None:
        if not arguments.prompts.is_file():
            raise RequestError(f"--prompts {arguments.prompts}: there is no such file")
        prompts += [line for line in arguments.prompts.read_text().splitlines() if line]
    if not prompts:
        raise RequestError("no prompt: give --prompt TEXT or --prompts FILE")
    return prompts


def run(arguments: argparse.Namespace) -> None:
    """One prompt streams; several run at once and are printed in order."""
    prompts = _prompts(arguments)
    sampling_params(arguments, {})
    llm = load(arguments.model, engine_options(arguments))
    params = sampling_params(arguments, llm.default_sampling_params())
    if len(prompts) == 1 and params.n == 1 and not params.beam_width and not arguments.json:
        shown = 0
        sys.stdout.write(prompts[0])
        for output in llm.stream(prompts[0], params):
            text = output.outputs[0].text
            sys.stdout.write(text[shown:])
            sys.stdout.flush()
            shown = len(text)
        sys.stdout.write("\n")
        return
    for output in llm.generate(prompts, params):
        if arguments.json:
            print(json.dumps(asdict(output)))
            continue
        for choice in output.outputs:
            print(f"{output.prompt}{choice.text}")
