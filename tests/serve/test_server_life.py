"""`headrace serve` from start to exit: drain, stop, and engines that die."""

import contextlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from headrace import SamplingParams
from serve.http_kit import FLAGS, served

PROMPT = "Once upon a time, Mia"


def lines(answer):
    """The events of a stream, parsed, as they come."""
    for line in answer.iter_lines():
        if line.startswith("data: {"):
            yield json.loads(line.removeprefix("data: "))


def stream(server, **fields):
    return server.client.stream(
        "POST",
        "/v1/completions",
        json={"prompt": PROMPT, "stream": True, "ignore_eos": True, "return_token_ids": True, **fields},
    )


@contextlib.contextmanager
def paused(server):
    """Its engine stands still, so that no running request ends meanwhile."""
    pid = server.instance_pid()
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


def token_ids(events):
    return [t for event in events for choice in event.get("choices", ()) for t in choice["token_ids"]]


def test_sigterm_lets_running_requests_finish_and_takes_no_new_ones(tinyworld_checkpoint):
    with served(tinyworld_checkpoint) as server:
        with stream(server, max_tokens=200) as answer:
            events = lines(answer)
            seen = [next(events)]
            with paused(server):
                server.process.terminate()
                while httpx.get(f"{server.url}/health").json()["status"] == "ready":
                    pass
                refused = httpx.post(f"{server.url}/v1/completions", json={"prompt": PROMPT})
            assert refused.status_code == 503 and "retry-after" in refused.headers
            assert "draining" in refused.json()["error"]["message"]
            seen += events
        assert len(token_ids(seen)) == 200 and seen[-1]["choices"][0]["finish_reason"] == "length"
        assert server.process.wait(30) == 0


def test_a_second_signal_stops_at_once(tinyworld_checkpoint):
    with served(tinyworld_checkpoint, "--drain-timeout", "600") as server:
        with stream(server, max_tokens=290) as answer, stream(server, max_tokens=290) as other:
            seen, others = lines(answer), lines(other)
            next(seen), next(others)
            with paused(server):
                server.process.send_signal(signal.SIGINT)
                while httpx.get(f"{server.url}/health").json()["status"] == "ready":
                    pass
            server.process.send_signal(signal.SIGTERM)
            last = [list(seen)[-1], list(others)[-1]]
        assert all(event["error"]["type"] == "server_error" for event in last if "error" in event)
        assert server.process.wait(30) == 0


def test_an_engine_that_dies_is_replaced_and_streams_go_on(tinyworld_checkpoint, llm):
    """32 streams over HTTP, and the engine is killed at random tokens: 3 times here, 20 in `make soak`."""
    _kill_rounds(tinyworld_checkpoint, llm, rounds=3)


@pytest.mark.soak
def test_an_engine_that_dies_often(tinyworld_checkpoint, llm):
    _kill_rounds(tinyworld_checkpoint, llm, rounds=20)


def _kill_rounds(folder, llm, rounds):
    draw = random.Random(rounds)
    sampling = [{"temperature": 0.8, "seed": i} if i % 2 else {"temperature": 0} for i in range(32)]
    asked: list[dict[str, Any]] = [
        {**fields, "max_tokens": draw.randrange(20, 60), "logprobs": 1} for fields in sampling
    ]
    expected = [llm.generate(PROMPT, SamplingParams(ignore_eos=True, **fields))[0].outputs[0] for fields in asked]
    total = sum(fields["max_tokens"] for fields in asked)
    with served(folder) as server:
        for round_ in range(rounds):
            count, kill_at = [0], draw.randrange(1, total)
            turn = threading.Lock()

            def one(fields, count=count, kill_at=kill_at, turn=turn):
                seen = []
                with stream(server, **fields) as answer:
                    for event in lines(answer):
                        seen.append(event)
                        with turn:
                            count[0] += 1
                            if count[0] == kill_at // 2 + 1:
                                os.kill(server.instance_pid(), signal.SIGKILL)
                assert "error" not in seen[-1], seen[-1]
                scores = [x for e in seen for c in e["choices"] for x in c["logprobs"]["token_logprobs"]]
                return token_ids(seen), "".join(c["text"] for e in seen for c in e["choices"]), scores

            with ThreadPoolExecutor(32) as pool:
                got = list(pool.map(one, asked))
            for (ids, text, scores), whole in zip(got, expected):
                assert (ids, text) == (whole.token_ids, whole.text)
                assert scores == [table[t].logprob for t, table in zip(whole.token_ids, whole.logprobs)]
            while server.client.get("/health").json() != {"status": "ready", "restarts": round_ + 1}:
                pass  # it died at the very end: no stream waits for the next one
        assert server.metric("headrace:restarts_total") == rounds


def test_without_restart_a_death_is_an_error(tinyworld_checkpoint):
    with served(tinyworld_checkpoint, "--no-restart") as server, stream(server, max_tokens=250) as answer:
        events = lines(answer)
        next(events)
        os.kill(server.instance_pid(), signal.SIGKILL)
        last = list(events)[-1]
        assert last["error"]["type"] == "server_error" and last["error"]["code"] is None
        health = httpx.get(f"{server.url}/health")
        assert health.status_code == 503 and health.json()["status"] == "failed"
        assert httpx.post(f"{server.url}/v1/completions", json={"prompt": "a"}).status_code == 503


def test_a_full_queue_is_429_with_retry_after(tinyworld_checkpoint):
    with served(tinyworld_checkpoint, "--max-num-seqs", "1", "--max-queue", "2") as server:
        asked = {"prompt": PROMPT, "temperature": 0, "max_tokens": 200, "ignore_eos": True}
        with ThreadPoolExecutor(16) as pool:
            answers = list(pool.map(lambda _: server.post("/v1/completions", **asked), range(64)))
        full = [answer for answer in answers if answer.status_code == 429]
        served_well = [answer for answer in answers if answer.status_code == 200]
        assert full and served_well and len(full) + len(served_well) == 64
        assert all(int(answer.headers["retry-after"]) >= 1 for answer in full)
        assert {answer.json()["error"]["type"] for answer in full} == {"rate_limit_error"}
        assert {answer.json()["error"]["code"] for answer in full} == {"rate_limit_exceeded"}
        assert len({answer.json()["choices"][0]["text"] for answer in served_well}) == 1


def test_keys_guard_all_but_what_monitors_read(tinyworld_checkpoint):
    env = {**os.environ, "HEADRACE_API_KEY": "from-the-environment"}
    with served(tinyworld_checkpoint, "--api-key", "one", env=env) as server:
        for path in ("/health", "/ping", "/version", "/metrics", "/"):
            assert server.client.get(path).status_code == 200, path
        for path in ("/v1/models", "/playground/live", "/nowhere"):
            assert server.client.get(path).status_code == 401, path
        for key in ("one", "from-the-environment"):
            assert server.client.get("/v1/models", headers={"Authorization": f"Bearer {key}"}).status_code == 200


def run(*flags):
    return subprocess.run([sys.executable, "-m", "headrace", *flags], capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (("nowhere/at/all",), "nowhere/at/all"),
        (("X", "--host", "0.0.0.0"), "--api-key, or --allow-remote"),
        (("X", "--host", "::"), "--api-key, or --allow-remote"),
        (("X", "--port", "70000"), "port=70000"),
        (("X", "--max-queue", "-1"), "max_queue=-1"),
        (("X", "--max-logprobs", "21"), "max_logprobs=21"),
        (("X", "--max-body-mib", "0"), "max_body_mib=0"),
        (("X", "--drain-timeout", "nan"), "drain_timeout=nan"),
        (("X", "--kv-cache-dtype", "int3"), "int3"),
        (("X", "--block-size", "17"), "block_size=17"),
        (("X", "--api-key", ""), "API key"),
    ],
)
def test_bad_flags_are_one_line_and_code_2(flags, says, tinyworld_checkpoint):
    model = str(tinyworld_checkpoint) if flags[0] == "X" else flags[0]
    ended = run("serve", model, "--port", "0", *flags[1:])
    assert ended.returncode == 2 and says in ended.stderr and len(ended.stderr.strip().splitlines()) == 1, ended.stderr


def test_a_port_in_use_is_an_error_before_the_model_loads(tinyworld_checkpoint):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        ended = run("serve", str(tinyworld_checkpoint), "--port", str(port))
    assert ended.returncode == 2 and f"127.0.0.1:{port}" in ended.stderr and "--port" in ended.stderr


def test_a_signal_while_it_starts_ends_it(tinyworld_checkpoint):
    command = [sys.executable, "-m", "headrace", "serve", str(tinyworld_checkpoint), "--port", "0", *FLAGS]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        import psutil

        while not psutil.Process(process.pid).children():
            pass
        [engine] = psutil.Process(process.pid).children()
        process.terminate()
        assert process.wait(30) == 130 and process.stdout is not None and not process.stdout.read()
        psutil.wait_procs([engine], timeout=10)
        assert not engine.is_running()


def test_chat_talks_to_a_server(server):
    def chat(text, *flags):
        command = [sys.executable, "-m", "headrace", "chat", "--url", server.url, "--temperature", "0", *flags]
        return subprocess.run(command, input=text, capture_output=True, text=True, timeout=60)

    said = chat("Where does Mia live?\n/new\nWhere does Mia live?\n", "--max-tokens", "12")
    first, second = said.stdout.splitlines()
    messages = [{"role": "user", "content": "Where does Mia live?"}]
    answer = server.post("/v1/chat/completions", messages=messages, temperature=0, max_tokens=12).json()
    assert first == second == answer["choices"][0]["message"]["content"] and said.returncode == 0
    assert "not served" in chat("hi\n", "another").stderr
    assert "--block-size does not apply with --url" in chat("hi\n", "--block-size", "8").stderr
    gone = subprocess.run(
        [sys.executable, "-m", "headrace", "chat", "--url", "http://127.0.0.1:9"],
        input="hi\n",
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert gone.returncode == 2 and "cannot be reached" in gone.stderr
