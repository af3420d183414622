"""`headrace bench serve`: a synthetic load, or a trace of real traffic, against a server."""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import os
import sys
from pathlib import Path
from typing import Any

from headrace.cli.extras import require_extra
from headrace.cli.progress import warn
from headrace.config import require
from headrace.errors import ConfigError
from headrace.typed import expanded

__all__ = ["add"]

FAILED = 1
KEY_VARIABLE = "HEADRACE_API_KEY"
VOCABULARY = 1000


def add(commands: Any) -> None:
    """Register the command."""
    parser = commands.add_parser("bench", help="measure a server under real traffic", description="Measure a server.")
    kinds = parser.add_commands("what", "WHAT")
    serve = kinds.add_parser(
        "serve",
        help="send requests to an OpenAI-compatible server",
        description="Send requests to an OpenAI-compatible server at a trace's times, or at random ones, without "
        "waiting for answers (open loop); print latencies, throughput, goodput and failures. Fails if every request "
        "does.",
    )
    _add_load(serve.add_argument_group("load"))
    _add_server(serve.add_argument_group("server"))
    _add_report(serve.add_argument_group("report"))
    serve.set_defaults(run=run)


def _add_load(group: Any) -> None:
    group.add_argument(
        "--trace",
        metavar="FILE",
        help="Azure's CSV or Mooncake's JSON lines, recognised by content (default: a synthetic load, with Poisson "
        "arrivals and the lengths of Azure's conversations)",
    )
    group.add_argument(
        "--rate", type=float, default=1.0, metavar="R", help="mean requests a second (default: 1, for small machines)"
    )
    group.add_argument(
        "--duration", type=float, default=30.0, metavar="S", help="seconds in which requests are sent (default: 30)"
    )
    group.add_argument(
        "--scale",
        type=float,
        metavar="X",
        help="factor on all lengths (default: 1; of the synthetic load, what makes it fit the server's longest "
        "sequence)",
    )
    group.add_argument(
        "--max-requests", type=int, metavar="N", help="most requests to send (default: all that the duration allows)"
    )
    group.add_argument(
        "--vocab-size",
        type=int,
        metavar="N",
        help="prompts are random token ids from 3 to N-1 (default: what the server says, or "
        f"{VOCABULARY}, which every large model has)",
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


def run(arguments: argparse.Namespace) -> int:
    """Send a load and print the summary; returns 1 if every request failed."""
    _check(arguments)
    from headrace.bench.traces import read_trace, request_count, schedule, synthetic

    timing = arguments.rate, arguments.duration, arguments.max_requests
    count = request_count(*timing)
    rows = synthetic(count, arguments.seed) if arguments.trace is None else read_trace(expanded(arguments.trace))
    plan = schedule(rows, *timing)
    require_extra("bench serve", "serve")
    if arguments.out is not None:
        require_extra("bench serve --out", "reproduce")
    from headrace.bench.serving import find_model, make_calls, run_calls
    from headrace.bench.summary import summarise, summary_text

    out = _folder(arguments.out)
    key = arguments.api_key or os.environ.get(KEY_VARIABLE) or None
    target = find_model(arguments.url, key, arguments.model)
    calls = make_calls(plan, _prompts(arguments, plan, target), target.name, arguments.token_events)
    what = "synthetic requests" if arguments.trace is None else f"requests of {arguments.trace}"
    print(
        f"{len(calls)} {what}, lengths × {arguments.scale:g}, over {calls[-1].at:.1f} s "
        f"to {target.name} at {arguments.url}",
        flush=True,
    )
    done = asyncio.run(run_calls(arguments.url, calls, arguments.duration + arguments.grace, key))
    summary = summarise(done, arguments.slo_ttft, arguments.slo_tpot)
    print(summary_text(summary))
    if out is not None:
        _write(arguments, target.name, done, summary, out)
    if summary["completed"]:
        return 0
    print("headrace: every request failed", file=sys.stderr)
    return FAILED


def _prompts(arguments: argparse.Namespace, plan: Any, target: Any) -> Any:
    """The prompts' generator. Sets `scale` and `vocab_size`, where they are not given, to what the server can take."""
    from headrace.bench.traces import Prompts, fitting_scale

    rows, longest = [row for _, row in plan], target.max_model_len
    if arguments.scale is None:
        arguments.scale = fitting_scale(rows, longest) if arguments.trace is None and longest else 1.0
    most = target.vocab_size or arguments.vocab_size
    require(
        arguments.vocab_size is None or arguments.vocab_size <= most,
        f"--vocab-size {arguments.vocab_size} is more than the server's {most}",
    )
    arguments.vocab_size = arguments.vocab_size or target.vocab_size or VOCABULARY
    prompts = Prompts(arguments.vocab_size, arguments.seed, arguments.scale)
    if longest:
        over = sum(sum(prompts.lengths(row)) > longest for row in rows)
        advice = f"--scale {fitting_scale(rows, longest):g} makes them fit"
        limit = f"longer than the server's {longest} tokens"
        require(over < len(rows), f"all {over} requests are {limit}: {advice}")
        if over:
            warn(f"{over} of {len(rows)} requests are {limit}, and will be refused: {advice}")
    return prompts


def _check(arguments: argparse.Namespace) -> None:
    from headrace.bench.traces import Prompts

    vocab_size, scale = arguments.vocab_size, arguments.scale
    Prompts(VOCABULARY if vocab_size is None else vocab_size, arguments.seed, 1.0 if scale is None else scale)
    require(0 <= arguments.grace < math.inf, f"--grace {arguments.grace:g} must be a time in seconds")
    for name in ("slo_ttft", "slo_tpot"):
        limit = getattr(arguments, name)
        require(limit is None or 0 < limit < math.inf, f"--{name.replace('_', '-')} {limit} must be above 0 ms")


def _folder(name: str | None) -> Path | None:
    """Make the folder before the run, so that an error does not lose the results."""
    if name is None:
        return None
    try:
        expanded(name).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--out {name} cannot be written: {error}") from None
    return expanded(name)


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
