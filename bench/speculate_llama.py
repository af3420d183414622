"""llama-server with the trained pair as the peer of `bench/speculate.py`: prompts and answers as token ids, batch 1."""

from __future__ import annotations

import contextlib
import http.client
import json
import socket
import statistics
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import speculate_work as work
from headrace.bench.measure import in_turn, pairs
from headrace.kernels.ops import Ops
from peer_envs import LLAMA_SOURCE, Environment
from peer_sides import healthy
from speculate_work import Ask, Engine

ENVIRONMENTS = Path(".venv-peers")
START_SECONDS = 60.0
DTYPES = {"float32": "f32", "bfloat16": "bf16"}
DRAFTS = (3, 6, 8)
"""The longest drafts that the peer tries; 3 is its default."""
LOOKUPS = ("ngram-simple", "ngram-cache", "ngram-mod")
STORIES = 4


def compare(ops: Ops, rounds: int) -> dict[str, Any]:
    """Tokens per second of stories at temperature 0: ours with a draft and with lookup, over the best of the peer's."""
    environment = Environment(ENVIRONMENTS, "llama.cpp")
    if environment.reason:
        print(f"llama    n/a: llama.cpp is {environment.reason}")
        return {"reason": environment.reason}
    return {dtype: _compare(ops, rounds, environment, dtype) for dtype in DTYPES}


def _compare(ops: Ops, rounds: int, environment: Environment, dtype: str) -> dict[str, Any]:
    models = work.trained_pair(ops, dtype)
    files = [_gguf(environment, name, DTYPES[dtype]) for name in ("target", "draft")]
    load = work.stories(STORIES, 0.0)
    ours = {
        "off": Engine(models),
        "draft": Engine(models, "draft:pair"),
        "ngram": Engine(models, "ngram"),
        "suffix": Engine(models, "suffix"),
    }
    flags: dict[str, list[object]] = {"off": []}
    flags |= {f"draft {n}": ["-md", files[1], "--spec-type", "draft-simple", "--spec-draft-n-max", n] for n in DRAFTS}
    flags |= {name: ["--spec-type", name] for name in LOOKUPS}
    with ExitStack() as stack:
        binary = environment.folder / "build" / "bin" / "llama-server"
        ports = {name: stack.enter_context(_server(binary, files[0], more)) for name, more in flags.items()}
        sides: dict[str, Any] = {f"headrace {name}": _ours(engine, load) for name, engine in ours.items()}
        sides |= {f"llama.cpp {name}": _theirs(port, load) for name, port in ports.items()}
        rates = dict(zip(sides, in_turn(list(sides.values()), rounds)))
    medians = {name: statistics.median(values) for name, values in rates.items()}
    out: dict[str, Any] = {"rates": rates}
    for kind, mine, theirs in (
        ("off", ["headrace off"], ["llama.cpp off"]),
        ("draft", ["headrace draft"], [f"llama.cpp draft {n}" for n in DRAFTS]),
        ("lookup", ["headrace ngram", "headrace suffix"], [f"llama.cpp {name}" for name in LOOKUPS]),
    ):
        best, peer = max(mine, key=medians.__getitem__), max(theirs, key=medians.__getitem__)
        found = pairs(rates[best], rates[peer])
        below = " BELOW 1.0" * (found.ratio < 1)
        print(
            f"llama    {dtype} {kind:8} {best} {medians[best]:.0f} tok/s, {peer} {medians[peer]:.0f}: "
            f"{found.verdict}{below}",
            flush=True,
        )
        out[kind] = {"ours": best, "theirs": peer, "pairs": found, "bar": 1.0}
    return out


def _ours(engine: Engine, load: work.Load) -> Any:
    numbers = iter(range(10**6))

    def run() -> float:
        ran = [engine.run([ask]) for ask in load(next(numbers))]
        return sum(len(one.tokens[0]) for one in ran) / sum(one.seconds for one in ran)

    return run


def _theirs(port: int, load: work.Load) -> Any:
    numbers = iter(range(10**6))

    def run() -> float:
        told = [_complete(port, ask) for ask in load(next(numbers))]
        seconds = sum(times["prompt_ms"] + times["predicted_ms"] for times in told) / 1e3  # without HTTP
        return sum(times["predicted_n"] for times in told) / seconds

    return run


def _complete(port: int, ask: Ask) -> dict[str, float]:
    """One greedy request; its timings."""
    body = {
        "prompt": ask.prompt,
        "n_predict": ask.params.max_tokens,
        "temperature": 0,
        "samplers": ["top_k"],
        "top_k": 1,
        "cache_prompt": True,
    }
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", port, timeout=120)) as connection:
        connection.request("POST", "/completion", json.dumps(body), {"Content-Type": "application/json"})
        answer = json.loads(connection.getresponse().read())
    return dict(answer["timings"])


@contextlib.contextmanager
def _server(binary: Path, model: Path, more: list[object]) -> Iterator[int]:
    """A llama-server of one slot and two threads, and its port."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    flags = ["-t", 2, "-tb", 2, "-np", 1, "-c", 512, "--offline", "--no-webui", *more]
    command = [str(binary), "-m", str(model), "--host", "127.0.0.1", "--port", str(port), *map(str, flags)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        began = time.monotonic()
        while not healthy(port):
            if process.poll() is not None or time.monotonic() - began > START_SECONDS:
                raise RuntimeError(f"llama-server did not start: {' '.join(command)}")
            time.sleep(0.1)
        yield port
    finally:
        process.terminate()
        process.wait()


def _gguf(environment: Environment, name: str, dtype: str) -> Path:
    """A model of the pair as a GGUF file, by the peer's own converter."""
    out = work.PAIR / f"{name}-{dtype}.gguf"
    if not out.exists():
        script, source = Path(__file__).with_name("peer_gguf.py"), environment.folder / "source" / LLAMA_SOURCE
        checkpoint = str(work.trained(name))
        command = [environment.python, str(script), str(source / "vendor/llama.cpp"), checkpoint, str(out), dtype]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return out.absolute()
