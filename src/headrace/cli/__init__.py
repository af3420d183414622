"""The commands: `headrace --help`. Each is a module with `add(commands)`, which registers it, and `run`."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from headrace import __version__
from headrace.cli import bench, chat, data, demo, export, generate, plan, reproduce, serve, train
from headrace.cli.parser import BAD_INPUT, Parser
from headrace.errors import HeadraceError

__all__ = ["build_parser", "main"]

INTERRUPTED = 130


def build_parser() -> Parser:
    """The parser of all commands. What it parses has `run`, which takes the parsed arguments."""
    parser = Parser(prog="headrace", description="Trains and serves language models, with the same bits everywhere.")
    parser.add_argument("--version", action="version", version=f"headrace {__version__}")
    commands = parser.add_commands("commands", "COMMAND")
    for module in (demo, serve, generate, chat, data, train, export, plan, bench, reproduce):
        module.add(commands)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code: 0, 1 for failed requests, 2 for bad input, 130 for Ctrl-C."""
    arguments = build_parser().parse_args(argv)
    try:
        return arguments.run(arguments) or 0
    except HeadraceError as error:
        print(f"headrace: {error}", file=sys.stderr)
        return BAD_INPUT
    except KeyboardInterrupt:
        print("\nheadrace: interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        sys.stderr.close()
        return 0
