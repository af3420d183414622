"""`headrace serve --tensor-parallel-size 2`: the bits of one process, and a rank that dies under streams."""

import json
import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import psutil
import pytest
import torch

from headrace import SamplingParams
from serve.http_kit import served, until

PROMPT = "Once upon a time, Mia"
ASKED = {"prompt": PROMPT, "max_tokens": 40, "ignore_eos": True, "return_token_ids": True, "logprobs": 2}
SAMPLING: list[dict[str, Any]] = [
    {"temperature": 0},
    {"temperature": 0.9, "seed": 5},
    {"temperature": 1.2, "seed": 6, "top_k": 9},
]


def ranks(server):
    """The processes of ranks above 0: the engine's children."""
    return psutil.Process(server.instance_pid()).children()


def stream(server, fields, on_token):
    tokens, scores = [], []
    with server.client.stream("POST", "/v1/completions", json={**ASKED, **fields, "stream": True}) as answer:
        for line in answer.iter_lines():
            if line.startswith("data: {"):
                event = json.loads(line.removeprefix("data: "))
                assert "error" not in event, event
                for choice in event["choices"]:
                    tokens += choice["token_ids"]
                    scores += choice["logprobs"]["token_logprobs"]
                    on_token()
    return tokens, scores


def test_two_ranks_give_the_bits_of_one_and_survive_the_death_of_one(tinyworld_checkpoint, llm):
    expected = []
    for fields in SAMPLING:
        whole = llm.generate(PROMPT, SamplingParams(ignore_eos=True, max_tokens=40, logprobs=2, **fields))[0].outputs[0]
        expected.append((whole.token_ids, [t[i].logprob for i, t in zip(whole.token_ids, whole.logprobs)]))
    hidden_TD = llm.frontend.engine.runner.hidden(llm.tokenizer.encode(PROMPT))
    with served(tinyworld_checkpoint, "--tensor-parallel-size", "2") as server:
        [rank] = ranks(server)
        assert "headrace.engine.run.rank" in rank.cmdline()
        killed: list[int] = []

        def kill_once():
            if not killed:
                killed.append(rank.pid)
                os.kill(rank.pid, signal.SIGKILL)

        quiet = [stream(server, fields, lambda: None) for fields in SAMPLING]
        assert quiet == expected
        embedding = server.post("/v1/embeddings", input=PROMPT, model=server.model, normalize=False).json()["data"][0][
            "embedding"
        ]
        torch.testing.assert_close(torch.tensor(embedding), hidden_TD.mean(0), atol=1e-5, rtol=1e-5)
        with ThreadPoolExecutor(3) as pool:
            assert list(pool.map(lambda fields: stream(server, fields, kill_once), SAMPLING)) == expected
        until(lambda: server.client.get("/health").json() == {"status": "ready", "restarts": 1})
        assert killed and not psutil.pid_exists(rank.pid) and len(ranks(server)) == 1
        # An idle engine whose rank dies does not wait for the next request to say so.
        ranks(server)[0].kill()
        until(lambda: server.client.get("/health").json() == {"status": "ready", "restarts": 2})
        others = ranks(server)
    until(lambda: not any(process.is_running() for process in others))


@pytest.mark.parametrize(("size", "said"), [("3", "must be 1, 2, 4, 8 or 16"), ("8", "does not divide the model's 4")])
def test_an_impossible_degree_is_refused(tinyworld_checkpoint, size, said):
    command = [sys.executable, "-m", "headrace", "serve", str(tinyworld_checkpoint), "--tensor-parallel-size", size]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and said in done.stderr and "Traceback" not in done.stderr
