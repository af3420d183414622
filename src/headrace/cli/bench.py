"""`headrace bench serve`: a trace of real traffic against a server."""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import os
from pathlib import Path
from typing import Any

from headrace.config import require
from headrace.errors import ConfigError

__all__ = ["add"]

KEY_VARIABLE = "HEADRACE_API_KEY"


def add(commands: Any) -> None:
    """Register the command."""
    parser = commands.add_parser("bench", help="measure a server under real traffic", description="Measure a server.")
    kinds = parser.add_commands("what", "WHAT")
    serve = kinds.add_parser(
        "serve",
        help="send a trace's requests to an OpenAI-compatible server",
        description="Send a trace's requests to an OpenAI-compatible server at the trace's times, without waiting for "
        "answers (open loop); print latencies, throughput, goodput and failures.",
    )
    _add_load(serve.add_argument_group("load"))
    _add_server(serve.add_argument_group("server"))
    _add_report(serve.add_argument_group("report"))
    serve.set_defaults(run=run)


def _add_load(group: Any) -> None:
    group.add_argument(
        "--trace", required=True, metavar="FILE", help="Azure's CSV or Mooncake's JSON lines, recognised by content"
    )
    group.add_argument("--rate", type=float, required=True, metavar="R", help="mean requests a second")
    group.add_argument("--duration", type=float, required=True, metavar="S", help="seconds in which requests are sent")
    group.add_argument(
        "--scale",
        type=float,
        default=1.0,
        metavar="X",
        help="factor on all lengths, for small machines (default: 1)",
    )
    group.add_argument(
        "--max-requests", type=int, metavar="N", help="most requests to send (default: all that the duration allows)"
    )
    group.add_argument(
        "--vocab-size",
        type=int,
        default=1000,
        metavar="N",
        help="prompts are random token ids from 3 to N-1 (default: 1000, which every vocabulary has)",
    )
    group.add_argument("--seed", type=int, default=0, metavar="N", help="seed of the prompts' tokens (default: 0)")
    group.add_argument(
        "--grace",
        type=float,
        default=60.0,
        metavar="S",
        help="seconds after --duration, until unfinished requests count as failed (default: 60)",
    )


def _add_server(group: Any) -> None:
    group.add_argument("--url", required=True, metavar="URL", help="for example http://127.0.0.1:8000")
    group.add_argument("--model", metavar="NAME", help="the name to send (default: the first that the server lists)")
    group.add_argument(
        "--api-key",
        metavar="KEY",
        help=f"sent as a bearer token; better set {KEY_VARIABLE}, which process lists do not show",
    )
    group.add_argument(
        "--token-events",
        action="store_true",
        help="send return_token_ids, for which headrace and vLLM send an event per token (default: no: one event may "
        "have several tokens, as clients see it)",
    )


def _add_report(group: Any) -> None:
    group.add_argument("--slo-ttft", type=float, metavar="MS", help="goodput: the limit on the time to the first token")
    group.add_argument(
        "--slo-tpot", type=float, metavar="MS", help="goodput: the limit on the mean time per output token"
    )
    group.add_argument("--out", metavar="DIR", help="write serve.json, with every request, and plots here")


def run(arguments: argparse.Namespace) -> None:
    """Read the trace, send its requests, print the summary."""
    from headrace.bench.serving import find_model, make_calls, run_calls
    from headrace.bench.summary import summarise, summary_text
    from headrace.bench.traces import Prompts, read_trace, schedule

    _check(arguments)
    plan = schedule(read_trace(Path(arguments.trace)), arguments.rate, arguments.duration, arguments.max_requests)
    prompts = Prompts(arguments.vocab_size, arguments.seed, arguments.scale)
    out = _folder(arguments.out)
    key = arguments.api_key or os.environ.get(KEY_VARIABLE) or None
    model = find_model(arguments.url, key, arguments.model)
    calls = make_calls(plan, prompts, model, arguments.token_events)
    print(
        f"{len(calls)} requests of {arguments.trace} over {calls[-1].at:.1f} s to {model} at {arguments.url}",
        flush=True,
    )
    rows = asyncio.run(run_calls(arguments.url, calls, arguments.duration + arguments.grace, key))
    summary = summarise(rows, arguments.slo_ttft, arguments.slo_tpot)
    print(summary_text(summary))
    if out is not None:
        _write(arguments, model, rows, summary, out)


def _check(arguments: argparse.Namespace) -> None:
    require(0 <= arguments.grace < math.inf, f"--grace {arguments.grace:g} must be a time in seconds")
    for name in ("slo_ttft", "slo_tpot"):
        limit = getattr(arguments, name)
        require(limit is None or 0 < limit < math.inf, f"--{name.replace('_', '-')} {limit} must be above 0 ms")


def _folder(name: str | None) -> Path | None:
    """Make the folder before the run, so that an error does not lose the results."""
    if name is None:
        return None
    try:
        Path(name).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--out {name} cannot be written: {error}") from None
    return Path(name)


def _write(arguments: argparse.Namespace, model: str, rows: list[Any], summary: dict[str, Any], out: Path) -> None:
    from headrace.bench.plots import write_plots
    from headrace.bench.summary import row_json

    settings = {k: v for k, v in vars(arguments).items() if k not in ("run", "api_key", "out")} | {"model": model}
    found = {"settings": settings, "summary": summary, "requests": [row_json(row) for row in rows]}
    try:
        (out / "serve.json").write_text(json.dumps(found, indent=1) + "\n")
        write_plots(rows, out)
    except OSError as error:
        raise ConfigError(f"--out {out} cannot be written: {error}") from None
    print(f"wrote {out / 'serve.json'} and plots")
