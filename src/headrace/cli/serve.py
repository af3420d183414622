"""`headrace serve`: an OpenAI-compatible server."""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import os
from dataclasses import fields
from typing import Any

from headrace.cli.extras import require_extra
from headrace.cli.options import add_engine_options, engine_options
from headrace.cli.progress import compiling, status
from headrace.llm.options import EngineOptions

__all__ = ["add"]

KEY_VARIABLE = "HEADRACE_API_KEY"


def add(commands: Any) -> None:
    """Register the command."""
    parser = commands.add_parser(
        "serve",
        help="serve a model over HTTP, as OpenAI's API",
        description="Serve a Llama, Mistral, Qwen2 or Qwen3 checkpoint: /v1/chat/completions, /v1/completions, "
        "/v1/embeddings and more, with a playground at /. SIGTERM lets running requests finish; a second one does not.",
    )
    parser.add_argument("model", help="a checkpoint folder in Hugging Face layout, or a hub id")
    _add_server(parser.add_argument_group("server"))
    _add_access(parser.add_argument_group("access"))
    _add_pages(parser.add_argument_group("web pages of other origins"))
    _add_limits(parser.add_argument_group("limits"))
    add_engine_options(parser)
    parser.set_defaults(run=run)


def _add_server(group: Any) -> None:
    group.add_argument(
        "--host",
        default="127.0.0.1",
        metavar="NAME",
        help="address to listen on (default: 127.0.0.1, which only this machine can reach)",
    )
    group.add_argument(
        "--port",
        type=int,
        default=8000,
        metavar="N",
        help="port; 0 takes a free one (default: 8000, as clients of such servers expect)",
    )
    group.add_argument(
        "--served-model-name",
        nargs="+",
        default=(),
        metavar="NAME",
        help="names that requests may use; answers carry the first (default: MODEL as given)",
    )
    group.add_argument(
        "--tool-format",
        metavar="NAME",
        help="format of tool calls: hermes, llama3, mistral or json (default: as the chat template writes them)",
    )
    group.add_argument(
        "--restart",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="start another engine when one dies, and continue the requests (default: yes, as their tokens "
        "stay the same)",
    )
    group.add_argument(
        "--drain-timeout",
        type=float,
        default=10.0,
        metavar="S",
        help="seconds that running requests have after SIGTERM (default: 10, a third of what Kubernetes allows)",
    )


def _add_access(group: Any) -> None:
    group.add_argument(
        "--api-key",
        nargs="+",
        default=(),
        metavar="KEY",
        help=f"keys; requests must carry one of them; better set {KEY_VARIABLE}, which process lists do not show "
        "(default: none, as only this machine can reach the server)",
    )
    group.add_argument(
        "--allow-remote",
        action="store_true",
        help="listen beyond this machine without a key (default: refused, as every machine could use it)",
    )
    group.add_argument(
        "--allow-weight-updates",
        action="store_true",
        help="serve /update_weights, which reads checkpoint folders on this machine (default: refused, "
        "as every client could change the model)",
    )


def _add_pages(group: Any) -> None:
    """CORS, by vLLM's flags."""
    for name, default, text in (
        (
            "origins",
            (),
            "origins whose pages may use the server from a browser, such as https://example.com, or * for all; "
            "preflights need no key (default: none, as any page that its user visits could use it)",
        ),
        ("methods", ("*",), "methods they may use (default: *, as each endpoint takes only its own)"),
        ("headers", ("*",), "request headers they may send (default: *, as clients add their own)"),
    ):
        group.add_argument(
            f"--allowed-{name}", action=_Several, nargs="+", default=default, metavar=name.upper()[:-1], help=text
        )
    group.add_argument(
        "--allow-credentials",
        action="store_true",
        help="let those pages send cookies, for a proxy in front that asks for them (default: no, as keys need none)",
    )


class _Several(argparse.Action):
    """One or more words, or one JSON array of them as vLLM's flags take it."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        if len(values) == 1 and values[0].startswith("["):
            try:
                values = json.loads(values[0])
            except ValueError as error:
                raise argparse.ArgumentError(self, f"{values[0]!r} is not a JSON array: {error}") from None
        if not all(isinstance(value, str) and value for value in values):
            raise argparse.ArgumentError(self, "give words, or a JSON array of strings")
        setattr(namespace, self.dest, tuple(values))


def _add_limits(group: Any) -> None:
    group.add_argument(
        "--max-logprobs",
        type=int,
        default=20,
        metavar="N",
        help="log-probabilities that a request may ask for, per token (default: 20, as OpenAI has it)",
    )
    group.add_argument(
        "--max-body-mib",
        type=float,
        default=8.0,
        metavar="N",
        help="largest request in MiB (default: 8, some two million tokens of text)",
    )
    group.add_argument(
        "--max-queue",
        type=int,
        default=1024,
        metavar="N",
        help="sequences that may wait beyond --max-num-seqs; further ones get 429 (default: 1024, minutes of work)",
    )


def run(arguments: argparse.Namespace) -> None:
    """Serve until a signal ends the server."""
    from headrace.model.folder import check_folder
    from headrace.serve.settings import ServeSettings

    options = engine_options(arguments)
    EngineOptions(**options)
    given = {f.name: getattr(arguments, f.name) for f in fields(ServeSettings)}
    keys = [*arguments.api_key, *filter(None, [os.environ.get(KEY_VARIABLE)])]
    given |= {
        "api_key": tuple(keys),
        "served_model_name": tuple(arguments.served_model_name),
    }
    settings = ServeSettings(**given)
    check_folder(arguments.model)
    require_extra("serve", "serve")
    from headrace.serve.server import Server  # imports FastAPI, which takes a second

    server = Server(arguments.model, options, settings)
    waiting = status(f"loading {arguments.model} …")

    def ready(info: Any) -> None:
        gc.freeze()  # as in the instance's process: full collections skip the objects that exist now
        waiting.stop()
        print(
            f"headrace: {server.url} · model {server.model_name} · {info.kv_tokens:,} KV tokens · "
            f"ready in {info.startup_seconds:.1f} s",
            flush=True,
        )

    with waiting:
        asyncio.run(server.run(ready, compiling(waiting)))
