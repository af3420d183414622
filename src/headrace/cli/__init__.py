"""The commands: `headrace --help`. Each is a module with `add(commands)`, which registers it, and `run`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from headrace.cli import bench, chat, data, demo, export, generate, plan, reproduce, serve, train
from headrace.errors import HeadraceError

__all__ = ["main"]

BAD_INPUT = 2
INTERRUPTED = 130


class _Parser(argparse.ArgumentParser):
    """Prints one line for a bad flag, without the usage."""

    def error(self, message: str) -> None:  # type: ignore[override]
        self.exit(BAD_INPUT, f"{self.prog}: {message} (see {self.prog} --help)\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code: 0, 2 for bad input, 130 for Ctrl-C."""
    parser = _Parser(prog="headrace", description="Trains and serves language models, with the same bits everywhere.")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND", parser_class=_Parser)
    for module in (demo, serve, generate, chat, data, train, export, plan, bench, reproduce):
        module.add(commands)
    arguments = parser.parse_args(argv)
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
