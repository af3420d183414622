"""`headrace reproduce`: a paper's results beside headrace's."""

from __future__ import annotations

import argparse
from typing import Any

__all__ = ["add"]

PAPERS = ("megatron", "orca", "paged", "sarathi", "sglang", "speculative", "zero")


def add(commands: Any) -> None:
    """Register the command."""
    parser = commands.add_parser(
        "reproduce",
        help="measure a paper's results here, and print both",
        description="Print a paper's results beside headrace's, which are measured now, on this machine.",
    )
    parser.add_argument("paper", choices=PAPERS)
    parser.add_argument("--quick", action="store_true", help="smaller inputs, to try it")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Measure and print."""
    from importlib import import_module

    from headrace.reproduce.table import show

    show(import_module(f"headrace.reproduce.{arguments.paper}").table(quick=arguments.quick))
