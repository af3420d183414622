"""Constrained decoding in the engine: what jumping forward saves, and what masks cost.

    python bench/constrained.py [--quick] [--data FOLDER]

    passes      recorded answers given token by token: tokens for each pass of the model, with forced tokens together
    profile     the character profile at 1 and 16 streams: forced tokens together against one a step
    masks       16 streams within a string of JSON, a mask a token, against free text
    any text    the same with a mask that allows any text
    bad words   the same with a mask that bans 8 texts
    spelling    how many of 64 profiles have other tokens where forced ones are sampled under their masks
    hidden      the share of the masks' seconds that steps did not wait for
    bombs       over HTTP: the 99th percentile of the time between tokens of 4 streams, while schemas that take
                seconds to compile arrive twice a second, against the same without them

The model is random, of 100M parameters in bf16 with the vocabulary of phi-2, on 2 threads; sides run in turn. FOLDER
holds the schemas and that vocabulary, as for bench/grammar.py; without it, the vocabulary is one of random bytes, and
the passes of recorded schemas are not counted. Writes docs/results/constrained.json.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import httpx

from grammar import read_cases
from headrace import LLM, Constraint, RequestOutput, SamplingParams
from headrace.bench.measure import Pairs, interleave, seconds, write_results
from headrace.bench.models import SHAPES, random_checkpoint
from headrace.bench.profile import profile_answers, profile_schema, walk
from headrace.errors import RequestError
from headrace.grammar.grammars import Grammars
from headrace.text.tokenizer import Tokenizer

TOOLS = "Glaiveai2K"
"""The schemas of MaskBench that describe the arguments of tools begin so."""
VOCABULARY = 51200
ANY_TEXT = "(?s:.*)"
IN_A_STRING = r'\{"a": "[^"\\\x00-\x1f]*'
"""JSON whose string does not end, so that both sides generate as many tokens."""
BAD_WORDS = tuple(f"{word} {word}" for word in ("ugly", "bad", "sad", "wrong", "evil", "nasty", "gloomy", "grim"))
TOKENS = 64
PROMPT = [5, 6, 7, 8] * 8


def main() -> None:
    """Count and measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer schemas and one round, to try the script")
    parser.add_argument("--data", type=Path, default=Path(os.environ.get("HEADRACE_DATA", "../shared/data")))
    arguments = parser.parse_args()
    results: dict[str, Any] = {}
    archive = arguments.data / "schema" / "schema_cases.tar.gz"
    if archive.exists():
        results["passes"] = passes(archive, arguments.data, arguments.quick)
    rounds = 1 if arguments.quick else 5
    with tempfile.TemporaryDirectory() as work:
        folder = checkpoint(Path(work), arguments.data)
        sides = {
            jump: LLM(folder, threads=2, jump_forward=jump, max_num_seqs=16, kv_cache_memory="512MiB")
            for jump in ("together", "stepwise")
        }
        results["profile"] = {streams: profile(sides, streams, rounds) for streams in (1, 16)}
        results["masks"] = masks(sides["together"], "masks", {"constraint": Constraint.regex(IN_A_STRING)}, rounds)
        any_text, words = {"constraint": Constraint.regex(ANY_TEXT)}, {"bad_words": BAD_WORDS}
        results["any text"] = masks(sides["together"], "any text", any_text, rounds)
        results["bad words"] = masks(sides["together"], "bad words", words, rounds)
        results["spelling"] = spelling(sides["together"])
        del sides
        results["bombs"] = bombs(folder, rounds)
    if not arguments.quick:
        print(write_results("constrained", results))


def checkpoint(work: Path, data: Path) -> Path:
    """A random model with phi-2's vocabulary where there is one: masks of random bytes cost four times as much."""
    words = data / "tokenizers" / "ort_ext" / "phi-2"
    if not words.is_dir():
        return random_checkpoint("small", work / "small")
    folder = random_checkpoint(replace(SHAPES["small"], vocab_size=VOCABULARY), work / "small")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(words / name, folder / name)
    return folder


def passes(archive: Path, data: Path, quick: bool) -> dict[str, Any]:
    """Tokens for each pass, over all answers of a group."""
    tokenizer = Tokenizer.from_folder(data / "tokenizers" / "ort_ext" / "phi-2")
    grammars = Grammars(tokenizer, VOCABULARY)
    groups: dict[str, list[int]] = {"profile": [0, 0, 0], "tools": [0, 0, 0], "all": [0, 0, 0]}
    for name, constraint, text in answers(archive, quick):
        try:
            forced, sampled = walk(grammars, constraint, tokenizer.encode(text, add_special_tokens=False))
        except (RequestError, ValueError):  # not served, or its properties stand in another order
            continue
        group = ["profile"] if name == "profile" else ["all", *(["tools"] if name.startswith(TOOLS) else [])]
        for counts in (groups[one] for one in group):
            counts[:] = counts[0] + 1, counts[1] + forced, counts[2] + sampled
    found = {
        name: {"answers": count, "forced": forced, "sampled": sampled, "ratio": (forced + sampled) / max(sampled, 1)}
        for name, (count, forced, sampled) in groups.items()
    }
    for name, figures in found.items():
        print(f"passes saved, {name:8s} {figures['ratio']:.2f}×  ({figures['answers']} answers)", flush=True)
    return found


def answers(archive: Path, quick: bool) -> Iterator[tuple[str, Constraint, str]]:
    """(name, constraint, an answer that is valid)."""
    for text in profile_answers():
        yield "profile", Constraint.json_schema(profile_schema()), text
    for case in list(read_cases(archive, "maskbench/"))[:: 20 if quick else 1]:
        for value, valid, _ in case.tests:
            text = json.dumps(value, ensure_ascii=False)
            if valid and not any("\ud800" <= character <= "\udfff" for character in text):
                yield case.name, Constraint.json_schema(case.schema), text


def profile(sides: dict[str, LLM], streams: int, rounds: int) -> dict[str, Any]:
    """Tokens per second of both sides; their tokens must be equal."""
    params = [
        SamplingParams(constraint=Constraint.json_schema(profile_schema()), max_tokens=400, seed=i, ignore_eos=True)
        for i in range(streams)
    ]
    outputs: dict[str, list[list[int]]] = {}

    def rate(side: str) -> float:
        def work() -> None:
            found = sides[side].generate([PROMPT] * streams, params)
            outputs[side] = [output.outputs[0].token_ids for output in found]

        return 1 / seconds(work) * sum(map(len, outputs.get(side, [[0]])))

    found: Pairs = interleave(lambda: rate("together"), lambda: rate("stepwise"), rounds)
    if outputs["together"] != outputs["stepwise"]:
        raise RuntimeError("forced tokens together and one a step gave different tokens: a bug in headrace")
    tokens = sum(map(len, outputs["together"]))
    print(f"profile, {streams:2d} streams    {found.verdict}  ({tokens} tokens)", flush=True)
    return {"tokens_per_second": asdict(found), "tokens": tokens}


def spelling(llm: LLM) -> dict[str, int]:
    """Profiles with and without jumping forward, of the same seeds."""
    found = []
    for jump in (True, False):
        params = [
            SamplingParams(
                constraint=Constraint.json_schema(profile_schema()), max_tokens=400, seed=i, jump_forward=jump
            )
            for i in range(64)
        ]
        found.append([output.outputs[0].token_ids for output in llm.generate([PROMPT] * 64, params)])
    other = sum(one != two for one, two in zip(*found, strict=True))
    print(f"spelling               {other} of 64 profiles have other tokens without jumping forward", flush=True)
    return {"profiles": 64, "differ": other}


def masks(llm: LLM, title: str, masked: dict[str, Any], rounds: int) -> dict[str, Any]:
    """Tokens per second with a mask a token, against none; and how much of the masks' time is hidden."""

    def rate(asked: dict[str, Any]) -> float:
        params = [
            SamplingParams(**asked, max_tokens=TOKENS, seed=i, ignore_eos=True, jump_forward=False) for i in range(16)
        ]
        outputs: list[RequestOutput] = []
        taken = seconds(lambda: outputs.extend(llm.generate([PROMPT] * 16, params)))
        return sum(len(output.outputs[0].token_ids) for output in outputs) / taken

    before = llm.frontend.mask_stats
    found: Pairs = interleave(lambda: rate(masked), lambda: rate({}), rounds)
    after = llm.frontend.mask_stats
    filled = after.mask_seconds - before.mask_seconds
    waited = after.mask_wait_seconds - before.mask_wait_seconds
    hidden = 1 - waited / filled
    row_us = filled / ((rounds + 1) * 16 * TOKENS) * 1e6
    print(f"{title:22s} {found.verdict}  {row_us:.0f} µs a row, {hidden:.1%} of it hidden", flush=True)
    return {
        "tokens_per_second": asdict(found),
        "row_us": row_us,
        "hidden": hidden,
        "median": statistics.median(found.ours),
    }


def bombs(folder: Path, rounds: int) -> dict[str, Any]:
    """The 99th percentile of the time between tokens, in ms."""
    command = [sys.executable, "-m", "headrace", "serve", str(folder), "--port", "0", "--threads", "2"]
    command += ["--served-model-name", "m", "--kv-cache-memory", "512MiB"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        url = server.stdout.readline().split(" ")[1]
        try:
            found = interleave(lambda: asyncio.run(p99(url, True)), lambda: asyncio.run(p99(url, False)), rounds)
        finally:
            server.terminate()
    print(f"bombs, p99 of gaps     {found.verdict}  ({statistics.median(found.theirs):.0f} ms without)", flush=True)
    return {"p99_ms": asdict(found)}


async def p99(url: str, armed: bool) -> float:
    """Of four streams, with bombs beside them or without."""
    gaps: list[float] = []
    bomber = bombing(url) if armed else None
    async with httpx.AsyncClient(base_url=url, timeout=120) as http:

        async def stream(seed: int) -> None:
            body = {"prompt": PROMPT, "max_tokens": 2 * TOKENS, "ignore_eos": True, "seed": seed, "stream": True}
            async with http.stream("POST", "/v1/completions", json=body) as answer:
                last = None
                async for line in answer.aiter_lines():
                    if line.startswith("data: {"):
                        now = time.perf_counter()
                        if last is not None:
                            gaps.append((now - last) * 1e3)
                        last = now

        await asyncio.gather(*(stream(i) for i in range(4)))
    if bomber is not None:
        bomber.kill()
        bomber.wait()
    return statistics.quantiles(gaps, n=100)[98]


def bombing(url: str) -> subprocess.Popen[str]:
    """A process of its own that sends a bomb twice a second; its bodies are ready before it begins."""
    process = subprocess.Popen(
        [sys.executable, "-c", BOMBER, url, str(time.time_ns())], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    process.stdout.readline()
    return process


BOMBER = """
import http.client, json, sys, threading, time
address, tag = sys.argv[1].removeprefix("http://"), sys.argv[2]
def body(number):  # each is another schema, so that none is known
    properties = {f"p{tag}{number}_{i}": {"type": "string"} for i in range(5000)}
    form = {"json": {"type": "object", "properties": properties}}
    return json.dumps({"prompt": "a", "max_tokens": 2, "structured_outputs": form})
def send(data):
    connection = http.client.HTTPConnection(address)
    connection.request("POST", "/v1/completions", data, {"Content-Type": "application/json"})
    connection.getresponse().read()
bodies = [body(number) for number in range(60)]
print("ready", flush=True)
for data in bodies:
    threading.Thread(target=send, args=(data,), daemon=True).start()
    time.sleep(0.5)
"""


if __name__ == "__main__":
    main()
