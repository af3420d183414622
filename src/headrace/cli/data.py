"""`headrace data`: build a folder of training data from files."""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

from headrace.cli.progress import status
from headrace.typed import expanded

__all__ = ["add"]

SHOW_SECONDS = 0.2
END = "<|endoftext|>"


def add(commands: Any) -> None:
    """Register the command."""
    parser = commands.add_parser("data", help="build a folder to train on from files", description="Training data.")
    kinds = parser.add_commands("what", "WHAT")
    build = kinds.add_parser(
        "build",
        help="tokenize files into a folder",
        description="Tokenize text, JSON lines, parquet files or a hub dataset into a folder of memory-mapped shards.",
    )
    build.add_argument(
        "inputs",
        nargs="+",
        metavar="INPUT",
        help="*.txt, *.jsonl (both also .gz or .zst), *.parquet, hub:owner/name[@split], or tinyworld",
    )
    build.add_argument("--out", type=expanded, required=True, metavar="DIR", help="the folder to write")
    build.add_argument("--force", action="store_true", help="replace an earlier build when the new one is complete")
    _add_tokenizer(build.add_argument_group("tokenizer"))
    _add_reading(build.add_argument_group("reading"))
    build.set_defaults(run=run_build)
    check = kinds.add_parser(
        "check",
        help="read every byte of a built folder and compare its hashes",
        description="Read every byte of a built folder and compare its hashes.",
    )
    check.add_argument("folder", type=expanded, metavar="DIR")
    check.set_defaults(run=run_check)


def _add_tokenizer(group: Any) -> None:
    group.add_argument(
        "--vocab-size",
        type=int,
        default=8192,
        metavar="N",
        help="tokens of the byte-level BPE tokenizer that is learnt from the inputs (default: 8192)",
    )
    group.add_argument(
        "--tokenizer", type=expanded, metavar="FOLDER", help="use the tokenizer of this model or data folder instead"
    )


def _add_reading(group: Any) -> None:
    group.add_argument(
        "--text-field", default="text", metavar="NAME", help="the field of a record with its text (default: text)"
    )
    group.add_argument(
        "--chat", action="store_true", help="records are conversations: only the assistant's tokens count in the loss"
    )
    group.add_argument(
        "--messages-field",
        default="messages",
        metavar="NAME",
        help="with --chat, the field of a record with its messages (default: messages)",
    )
    group.add_argument(
        "--split-on",
        default=END,
        metavar="TEXT",
        help=f"the separator of documents in a text file; '' for none (default: {END})",
    )
    group.add_argument(
        "--validation",
        type=float,
        default=0.01,
        metavar="SHARE",
        help="share of the documents to hold out, at least one; 0 for none (default: 0.01)",
    )
    group.add_argument("--seed", type=int, default=0, metavar="N", help="selects the held-out documents (default: 0)")
    group.add_argument(
        "--documents",
        type=int,
        default=20_000,
        metavar="N",
        help="how many texts of tinyworld to write (default: 20000)",
    )


def run_build(arguments: argparse.Namespace) -> None:
    """Build the folder and print its description."""
    from headrace.train.corpus.build import BuildConfig, build

    config = BuildConfig(
        tuple(arguments.inputs),
        arguments.out,
        arguments.vocab_size,
        arguments.tokenizer,
        arguments.text_field,
        arguments.messages_field,
        arguments.chat,
        arguments.validation,
        arguments.split_on,
        arguments.seed,
        arguments.documents,
        arguments.force,
    )
    with status("reading …") as line:
        built = build(config, _shown(line))
    if built.skipped:
        print(f"skipped {built.skipped} without {'a turn of the assistant' if config.chat else 'text'}")
    if built.ended_within:
        print(
            f"{built.ended_within} documents have an end token before their end, which attention crosses: "
            "check that --split-on is their separator"
        )
    _describe(config.out, built.index)
    print(
        f"headrace train RECIPE --out … --set data.source={config.out} --set data.vocab_size={built.index.vocab_size}"
    )


def run_check(arguments: argparse.Namespace) -> None:
    """Check every file's hash and print the folder's description."""
    from headrace.train.corpus.folder import check_folder

    with status("reading …"):
        index = check_folder(arguments.folder)
    _describe(arguments.folder, index)


def _describe(folder: Path, index: Any) -> None:
    counted = f", {index.counted:,} of which count" if index.masked else ""
    print(
        f"{folder}: {index.documents:,} documents ({index.validation:,} held out), {index.tokens:,} tokens{counted}, "
        f"vocabulary {index.vocab_size:,}, {len(index.shards)} shards"
    )


def _shown(line: Any) -> Any:
    """A `progress` callback that updates a status line at most every `SHOW_SECONDS`."""
    shown = 0.0

    def progress(what: str, documents: int, tokens: int) -> None:
        nonlocal shown
        if time.monotonic() - shown > SHOW_SECONDS:
            shown = time.monotonic()
            line.update(f"{documents:,} documents, {tokens:,} {what}" if documents else f"{tokens:,} {what}")

    return progress
