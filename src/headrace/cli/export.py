"""`headrace export`: a snapshot of a run as a Hugging Face folder."""

from __future__ import annotations

import argparse
from typing import Any

from headrace.cli.progress import kernels, warn
from headrace.typed import expanded

__all__ = ["add"]


def add(commands: Any) -> None:
    """Register the command."""
    parser = commands.add_parser(
        "export",
        help="write a training snapshot as a Hugging Face folder",
        description="Write a snapshot's model as a Hugging Face folder, and check that it computes the same logits.",
    )
    parser.add_argument(
        "snapshot", type=expanded, help="a step-… folder; or a run's --out, for its newest readable snapshot"
    )
    parser.add_argument("out", type=expanded, metavar="OUT", help="a new folder")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Export, and print a command that uses the folder."""
    from headrace.train.paths import require_empty, require_snapshots

    require_snapshots(arguments.snapshot)
    require_empty(arguments.out)
    from headrace.train.export import export_snapshot

    snapshot = export_snapshot(arguments.snapshot, arguments.out, kernels("cpu"), warn)
    print(f"{snapshot.folder}, step {snapshot.step} → {arguments.out}: the same logits, bit for bit")
    print(f"headrace generate {arguments.out} --prompt …")
