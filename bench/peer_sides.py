"""The sides of `bench/peers.py`, each in a process and in an environment of its own.

    PYTHON bench/peer_sides.py KIND MODEL THREADS OPTIONS

It says {"ready": true} when the model is loaded. Then it reads a task of `peer_work.make_task` a line, and answers with
a line of its figures. Between tasks it waits. All that a peer prints goes to standard error.
Nothing is imported at the top but the standard library: a peer's environment has the peer alone.
"""

from __future__ import annotations

import contextlib
import ctypes
import http.client
import json
import os
import re
import resource
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from peer_work import figures

KV_GIB = 2
MAX_SEQS = 32
MAX_LEN = 2048
START_SECONDS = 120.0
PR_SET_PDEATHSIG = 1

Generate = Callable[[list[list[int]], list[int], int], None]
"""Generates from prompts, greedily and without end tokens; the last argument is the length of their common prefix."""
Run = Callable[[dict[str, Any]], dict[str, Any]]


def timed(generate: Generate) -> Run:
    """Run the calls of a task one after another."""

    def run(task: dict[str, Any]) -> dict[str, Any]:
        seconds = []
        for prompts, outputs in task["calls"]:
            start = time.perf_counter()
            generate(prompts, outputs, task["prefix"])
            seconds.append(time.perf_counter() - start)
        return figures(task, seconds)

    return run


def headrace(model: str, threads: int, options: dict[str, Any]) -> Run:
    """Our `LLM`."""
    from headrace import LLM, SamplingParams

    llm = LLM(
        model, threads=threads, kv_cache_memory=f"{KV_GIB}GiB", max_num_seqs=MAX_SEQS, max_model_len=MAX_LEN, **options
    )

    def generate(prompts: list[list[int]], outputs: list[int], prefix: int) -> None:
        params = [SamplingParams(temperature=0.0, ignore_eos=True, max_tokens=n) for n in outputs]
        found = llm.generate([{"prompt_token_ids": ids} for ids in prompts], params)
        assert [len(one.outputs[0].token_ids) for one in found] == outputs

    return timed(generate)


def vllm(model: str, threads: int, options: dict[str, Any]) -> Run:
    """vLLM's `LLM`, with its compiled graphs."""
    os.environ |= {
        "VLLM_CPU_KVCACHE_SPACE": str(KV_GIB),
        "VLLM_CPU_OMP_THREADS_BIND": f"0-{threads - 1}",
        "VLLM_CPU_NUM_OF_RESERVED_CPU": "0",
        "VLLM_CACHE_ROOT": str(Path(sys.prefix) / "cache"),
        "VLLM_HOST_IP": "127.0.0.1",
        "VLLM_LOGGING_LEVEL": "WARNING",
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
    }
    from vllm import LLM, SamplingParams

    llm = LLM(model=model, max_model_len=MAX_LEN, skip_tokenizer_init=True, max_num_seqs=MAX_SEQS, **options)

    def generate(prompts: list[list[int]], outputs: list[int], prefix: int) -> None:
        params = [SamplingParams(temperature=0, ignore_eos=True, max_tokens=n, detokenize=False) for n in outputs]
        found = llm.generate([{"prompt_token_ids": ids} for ids in prompts], params, use_tqdm=False)
        assert [len(one.outputs[0].token_ids) for one in found] == outputs

    return timed(generate)


def openvino(model: str, threads: int, options: dict[str, Any]) -> Run:
    """OpenVINO GenAI's continuous batching; `options` are properties of its CPU plugin."""
    import numpy as np
    import openvino as ov
    import openvino_genai as genai

    scheduler = genai.SchedulerConfig()
    scheduler.cache_size = KV_GIB
    scheduler.max_num_seqs = MAX_SEQS
    scheduler.max_num_batched_tokens = 1024
    scheduler.dynamic_split_fuse = True
    scheduler.enable_prefix_caching = True
    properties = {"INFERENCE_NUM_THREADS": threads, "ENABLE_MMAP": False, **options}
    pipe = genai.ContinuousBatchingPipeline(model, scheduler, "CPU", properties)

    def config(output: int) -> Any:
        one = genai.GenerationConfig()
        one.max_new_tokens, one.ignore_eos, one.do_sample = output, True, False
        return one

    def generate(prompts: list[list[int]], outputs: list[int], prefix: int) -> None:
        ids = [ov.Tensor(np.array([prompt], dtype=np.int64)) for prompt in prompts]
        found = pipe.generate(ids, [config(n) for n in outputs])
        assert [len(one.m_generation_ids[0]) for one in found] == outputs

    return timed(generate)


def ctranslate2(model: str, threads: int, options: dict[str, Any]) -> Run:
    """CTranslate2's `Generator`: static batches of 16, each as long as its longest output.

    It computes a batch's prompts together up to the shortest one only, so prompts of like lengths stand together.
    """
    import ctranslate2

    generator = ctranslate2.Generator(model, device="cpu", inter_threads=1, intra_threads=threads, **options)
    vocabulary = list(json.loads((Path(model) / "vocabulary.json").read_text()))
    batch = 16

    def generate(prompts: list[list[int]], outputs: list[int], prefix: int) -> None:
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
        words = [[vocabulary[token] for token in prompt] for prompt in prompts]
        shared = {"static_prompt": words[0][:prefix], "cache_static_prompt": True} if prefix else {}
        for first in range(0, len(order), batch):
            some = order[first : first + batch]
            longest = max(outputs[i] for i in some)
            found = generator.generate_batch(
                [words[i][prefix:] for i in some],
                max_length=longest,
                min_length=longest,
                sampling_topk=1,
                beam_size=1,
                include_prompt_in_result=False,
                end_token=[],
                **shared,
            )
            assert all(len(one.sequences_ids[0]) == longest for one in found)

    return timed(generate)


def transformers(model: str, threads: int, options: dict[str, Any]) -> Run:
    """`generate` on one left-padded batch, as long as the longest output."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(threads)
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=getattr(torch, options["dtype"])).eval()
    loaded.generation_config.eos_token_id = None
    loaded.generation_config.pad_token_id = 1

    @torch.inference_mode()
    def generate(prompts: list[list[int]], outputs: list[int], prefix: int) -> None:
        longest = max(map(len, prompts))
        ids = torch.full((len(prompts), longest), 1)
        mask = torch.zeros_like(ids)
        for row, prompt in enumerate(prompts):
            ids[row, longest - len(prompt) :] = torch.tensor(prompt)
            mask[row, longest - len(prompt) :] = 1
        found = loaded.generate(
            input_ids=ids, attention_mask=mask, max_new_tokens=max(outputs), do_sample=False, pad_token_id=1
        )
        assert found.shape[1] == longest + max(outputs)

    return timed(generate)


def llama(model: str, threads: int, options: dict[str, Any]) -> Run:
    """llama.cpp: llama-bench and llama-batched-bench where they have the load, llama-server for requests at once."""
    tools = Path(sys.prefix) / "build" / "bin"

    def tool(name: str, *flags: object) -> str:
        command = [str(tools / name), "-m", model, "-t", str(threads), *map(str, flags)]
        done = subprocess.run(command, text=True, stdout=subprocess.PIPE, check=True)
        return done.stdout

    def bench(*flags: object) -> float:
        return json.loads(tool("llama-bench", "-r", 1, "-o", "json", *flags))[0]["avg_ts"]

    def run(task: dict[str, Any]) -> dict[str, Any]:
        prompts, outputs = task["calls"][-1]
        length, output, count = len(prompts[0]), outputs[0], len(prompts)
        if task["name"] == "dec1":
            found = {"rate": bench("-p", 0, "-n", output, "-d", length)}
        elif task["name"] == "pre":
            found = {"rate": bench("-p", length, "-n", 0)}
        elif task["name"] == "dec16":
            flags = ("-c", count * (length + output), "-b", 2048, "-ub", 512)
            text = tool("llama-batched-bench", *flags, "-npp", length, "-ntg", output, "-npl", count)
            row = [line.split("|") for line in text.splitlines() if re.match(rf"\|\s+{length} \|", line)][-1]
            found = {"rate": count * output / float(row[9]), "decode": float(row[8])}
        elif task["name"] == "warm":  # each tool warms up by itself
            found = {}
        else:
            with _server(tools / "llama-server", model, threads) as port:
                found = timed(_requests(port))(task)
        return {**found, "memory": resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024}

    return run


@contextlib.contextmanager
def _server(binary: Path, model: str, threads: int) -> Iterator[int]:
    """A llama-server with a slot for each request, and its port."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    flags = ["-t", threads, "-tb", threads, "-np", MAX_SEQS, "-c", MAX_SEQS * 1280, "--kv-unified", "--offline"]
    command = [str(binary), "-m", model, "--host", "127.0.0.1", "--port", str(port), "--no-webui", *map(str, flags)]
    process = subprocess.Popen(command, stdout=sys.stderr, stderr=sys.stderr)
    try:
        began = time.monotonic()
        while not healthy(port):
            if process.poll() is not None or time.monotonic() - began > START_SECONDS:
                raise RuntimeError("llama-server did not start")
            time.sleep(0.1)
        _complete(port, [1000, 1001, 1002], 4)
        yield port
    finally:
        process.terminate()
        process.wait()


def healthy(port: int) -> bool:
    with (
        contextlib.suppress(OSError, http.client.HTTPException),
        contextlib.closing(http.client.HTTPConnection("127.0.0.1", port, timeout=5)) as connection,
    ):
        connection.request("GET", "/health")
        return connection.getresponse().status == 200
    return False


def _complete(port: int, prompt: list[int], output: int) -> None:
    """One request to llama-server, whose slots keep the prefix of what they computed."""
    body = {
        "prompt": prompt,
        "n_predict": output,
        "ignore_eos": True,
        "temperature": 0,
        "samplers": ["top_k"],
        "top_k": 1,
        "cache_prompt": True,
    }
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", port, timeout=900)) as connection:
        connection.request("POST", "/completion", json.dumps(body), {"Content-Type": "application/json"})
        answer = json.loads(connection.getresponse().read())
    assert answer.get("tokens_predicted") == output, answer


def _requests(port: int) -> Generate:
    def generate(prompts: list[list[int]], outputs: list[int], prefix: int) -> None:
        with ThreadPoolExecutor(len(prompts)) as pool:
            list(pool.map(lambda pair: _complete(port, *pair), zip(prompts, outputs)))

    return generate


KINDS = {f.__name__: f for f in (headrace, vllm, openvino, ctranslate2, transformers, llama)}


def main() -> None:
    """Serve one side."""
    kind, model, threads, options = sys.argv[1:]
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # a benchmark that is killed leaves no stopped side
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    os.environ["HF_HUB_OFFLINE"] = "1"

    def say(answer: dict[str, Any]) -> None:
        out.write(json.dumps(answer) + "\n")
        out.flush()

    run = KINDS[kind](model, int(threads), json.loads(options))
    say({"ready": True})
    for line in sys.stdin:
        say(run(json.loads(line)))


if __name__ == "__main__":
    main()
