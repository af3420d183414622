"""The load generator against real servers: ours, and ones that refuse, break off or never answer."""

import asyncio
import contextlib
import http.server
import json
import re
import socket
import threading

import pytest

from headrace.bench.serving import find_model, make_calls, run_calls
from headrace.bench.summary import summarise
from headrace.bench.traces import Prompts, TraceRow
from headrace.cli import main
from headrace.errors import RequestError
from serve.http_kit import served

VOCAB = 300
HEAD = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"


@pytest.fixture(scope="module")
def server(tinyworld_checkpoint):
    with served(tinyworld_checkpoint, "--served-model-name", "tiny") as running:
        yield running


@pytest.fixture
def trace(tmp_path):
    path = tmp_path / "trace.jsonl"
    rows = [
        {"timestamp": 20 * i, "input_length": 60 + i, "output_length": 3 + i % 4, "hash_ids": [i % 2]}
        for i in range(12)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def bench(capsys, *argv):
    """(exit code, standard output, standard error)."""
    code: str | int | None
    try:
        code = main(["bench", "serve", *(str(a) for a in argv)])
    except SystemExit as end:
        code = end.code
    return code, *capsys.readouterr()


def test_a_run_from_the_command_line(capsys, server, trace, tmp_path):
    out = tmp_path / "out"
    code, text, error = bench(
        capsys,
        "--url",
        f"{server.url}/v1",
        "--trace",
        trace,
        "--rate",
        50,
        "--duration",
        0.2,
        "--vocab-size",
        VOCAB,
        "--out",
        out,
        "--slo-ttft",
        60_000,
        "--slo-tpot",
        60_000,
        "--token-events",
    )
    assert (code, error) == (0, "") and "10 of 10 requests answered" in text and "100.0% of all" in text
    found = json.loads((out / "serve.json").read_text())
    assert found["settings"]["model"] == "tiny" and "api_key" not in found["settings"]
    assert found["summary"]["failed"] == found["summary"]["short"] == 0
    for i, row in enumerate(found["requests"]):
        assert (row["prompt_tokens"], row["output_tokens"]) == (60 + i, 3 + i % 4)
        assert len(row["tokens_at"]) == row["output_tokens"]
        assert row["scheduled"] <= row["sent"] <= row["tokens_at"][0] <= row["tokens_at"][-1] <= row["end"]
    assert all((out / f"{name}.png").read_bytes().startswith(b"\x89PNG") for name in ("ttft", "gaps", "in_flight"))


def test_without_a_trace_the_load_fits_the_server(capsys, server, tmp_path):
    """The model has 512 tokens and 512 positions: a load that ignores either gets 400."""
    out = tmp_path / "out"
    code, text, error = bench(capsys, "--url", server.url, "--rate", 100, "--duration", 0.2, "--out", out)
    assert (code, error) == (0, "") and "20 of 20 requests answered" in text and "synthetic requests" in text
    found = json.loads((out / "serve.json").read_text())
    assert found["settings"]["vocab_size"] == server.client.get("/v1/models").json()["data"][0]["vocab_size"]
    assert len({row["prompt_tokens"] for row in found["requests"]}) > 5


def test_requests_that_cannot_fit_are_announced(capsys, server, tmp_path):
    trace = tmp_path / "trace.jsonl"
    rows = [{"timestamp": i, "input_length": n, "output_length": 2} for i, n in enumerate((600, 900, 8))]
    trace.write_text("".join(json.dumps(row) + "\n" for row in rows))
    load = ("--url", server.url, "--trace", trace, "--rate", 50, "--duration", 1)
    code, text, error = bench(capsys, *load)
    assert code == 0 and "1 of 3 requests answered" in text and "2 × HTTP 400" in text
    assert error.strip() == (
        "headrace: warning: 2 of 3 requests are longer than the server's 512 tokens, and will be refused: "
        "--scale 0.56 makes them fit"
    )
    code, text, error = bench(capsys, *load, "--scale", 0.56)
    assert (code, error) == (0, "") and "3 of 3 requests answered" in text
    code, text, error = bench(capsys, *load, "--max-requests", 2)
    assert (code, text) == (2, "") and "all 2 requests are longer than the server's 512 tokens: --scale 0.56" in error


def test_a_vocabulary_that_the_server_does_not_have_is_refused(capsys, server):
    code, out, error = bench(capsys, "--url", server.url, "--vocab-size", 513)
    assert (code, out) == (2, "") and "--vocab-size 513 is more than the server's 512" in error


@pytest.mark.parametrize("answers, expected", [([400] * 3, 1), ([400, 200, 400], 0), ([200] * 3, 0)])
def test_a_run_in_which_every_request_failed_fails(capsys, answers, expected):
    """Against a server that names neither its vocabulary nor its longest sequence."""
    left = list(answers)

    class Handler(http.server.BaseHTTPRequestHandler):
        def answer(self, status, body):
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def do_GET(self):
            self.answer(200, b'{"data": [{"id": "other"}, {"id": "m", "max_model_len": null}]}')

        def do_POST(self):
            self.rfile.read(int(self.headers["Content-Length"]))
            status = left.pop()
            self.answer(status, event("a") + b"data: [DONE]\n\n" if status == 200 else b'{"error": {"message": "no"}}')

        def log_message(self, *_):
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever).start()
        try:
            url = f"http://127.0.0.1:{server.server_port}"
            code, text, error = bench(capsys, "--url", url, "--model", "m", "--rate", 100, "--duration", 0.03)
        finally:
            server.shutdown()
    assert code == expected and f"{answers.count(200)} of 3 requests answered" in text
    assert error == ("headrace: every request failed\n" if expected else "")


def test_prompts_that_share_blocks_are_found_in_the_cache(server):
    rows = [(0.0, TraceRow(0.0, 64, 2, (11,))), (0.0, TraceRow(0.0, 64, 2, (11,)))]
    before = server.metric("vllm:prefix_cache_hits_total")
    for plan in rows:
        [row] = run(server.url, make_calls([plan], Prompts(VOCAB), "tiny"))
        assert row.failure is None
    assert server.metric("vllm:prefix_cache_hits_total") > before


def test_refusals_are_counted_by_status(server):
    rows = [TraceRow(0.0, 8, 2), TraceRow(0.0, 8, 2), TraceRow(0.0, 100_000, 2)]
    found = run(server.url, make_calls([(0.0, row) for row in rows], Prompts(VOCAB), "tiny"))
    assert [row.failure for row in found] == [None, None, "HTTP 400"] and found[2].message
    found = run(server.url, make_calls([(0.0, rows[0])], Prompts(VOCAB), "another"))
    assert summarise(found)["failures"] == {"HTTP 404": 1} and "another" in found[0].message


def run(url, calls, limit=60.0):
    return asyncio.run(run_calls(url, calls, limit))


def chunk(data):
    return b"%x\r\n%s\r\n" % (len(data), data)


def event(text, **fields):
    return b"data: " + json.dumps({"choices": [{"text": text, "finish_reason": None}], **fields}).encode() + b"\n\n"


class FakeServer:
    """Answers every connection with these bytes; `hold` keeps it open after them."""

    def __init__(self, answer, hold=False):
        self.answer, self.hold = answer, hold
        self.bodies = []

    async def __call__(self, reader, writer):
        head = await reader.readuntil(b"\r\n\r\n")
        length = next(int(line.split(b":")[1]) for line in head.split(b"\r\n") if line.startswith(b"Content-Length"))
        self.bodies.append((head, await reader.readexactly(length)))
        with contextlib.suppress(ConnectionError):
            for byte in range(0, len(self.answer), 7):  # no event or chunk comes in one piece
                writer.write(self.answer[byte : byte + 7])
                await writer.drain()
            if self.hold:
                await reader.read()
        writer.close()

    def run(self, limit=60.0, calls=None, key=None):
        """The rows of a run against it."""

        async def both():
            server = await asyncio.start_server(self, "127.0.0.1", 0)
            async with server:
                port = server.sockets[0].getsockname()[1]
                return await run_calls(f"http://127.0.0.1:{port}", calls or self.calls(), limit, key)

        return asyncio.run(both())

    @staticmethod
    def calls(count=1):
        return make_calls([(0.0, TraceRow(0.0, 4, 3))] * count, Prompts(VOCAB), "m")


def test_events_are_read_whatever_their_pieces():
    usage = b'data: {"choices": [], "usage": {"completion_tokens": 3}}\r\n\r\n'
    whole = event("a") + b": a comment\n\n" + event("é\n") + usage + b"data: [DONE]\n\n"
    answers = [
        HEAD + b"".join(chunk(whole[i : i + 5]) for i in range(0, len(whole), 5)) + b"0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(whole) + whole,
        b"HTTP/1.0 200 OK\r\n\r\n" + whole,
    ]
    for answer in answers:
        server = FakeServer(answer)
        [row] = server.run(key="secret")
        assert (row.failure, row.output_tokens, len(row.tokens_at)) == (None, 3, 2)
        [(head, body)] = server.bodies
        sent = json.loads(body)
        assert b"Authorization: Bearer secret\r\n" in head and head.startswith(b"POST /v1/completions HTTP/1.1")
        assert len(sent["prompt"]) == 4 and sent["max_tokens"] == 3 and sent["ignore_eos"] is True
        assert sent["temperature"] == 0 and sent["stream_options"] == {"include_usage": True}


def test_an_answer_whose_tokens_have_no_text_is_an_answer():
    last = b'data: {"choices": [{"text": "", "finish_reason": "length"}], "usage": {"completion_tokens": 3}}\n\n'
    [row] = FakeServer(HEAD + chunk(last + b"data: [DONE]\n\n") + b"0\r\n\r\n").run()
    assert (row.failure, row.output_tokens, len(row.tokens_at)) == (None, 3, 1)


@pytest.mark.parametrize(
    "answer, kind, says",
    [
        (
            b"HTTP/1.1 429 Full\r\nContent-Length: 33\r\n\r\n" + b'{"error": {"message": "no room"}}',
            "HTTP 429",
            "no room",
        ),
        (b"HTTP/1.1 503 Gone\r\nContent-Length: 0\r\n\r\n", "HTTP 503", "no reason"),
        (b"HTTP/1.1 500 Oh\r\nContent-Length: 99\r\n\r\nhalf", "HTTP 500", "ended before"),
        (HEAD + chunk(event("a")), "broken stream", "ended before"),
        (HEAD + chunk(event("a")) + b"0\r\n\r\n", "broken stream", r"without \[DONE\]"),
        (HEAD + chunk(event("a")) + chunk(b'data: {"error": {"message": "lost"}}\n\n'), "broken stream", "lost"),
        (HEAD + chunk(b"data: {]\n\n"), "broken stream", "not a completion"),
        (HEAD + chunk(b"data: [DONE]\n\n"), "broken stream", "no token"),
        (HEAD + b"zz\r\n", "broken stream", "no size"),
        (b"", "connection", "no HTTP answer"),
        (b"220 mail.example\r\n\r\n", "connection", "not HTTP"),
    ],
)
def test_failures_have_kinds(answer, kind, says):
    [row] = FakeServer(answer).run()
    assert row.failure == kind and row.end is not None
    assert re.search(says, row.message)


def test_what_never_ends_is_cut_at_the_limit():
    rows = FakeServer(HEAD + chunk(event("a")), hold=True).run(limit=0.3, calls=FakeServer.calls(3))
    assert [row.failure for row in rows] == ["timeout"] * 3
    late = make_calls([(0.0, TraceRow(0.0, 4, 3)), (100.0, TraceRow(0.0, 4, 3))], Prompts(VOCAB), "m")
    rows = FakeServer(b"", hold=True).run(limit=0.3, calls=late)
    assert [row.failure for row in rows] == ["timeout", "not sent"]


def test_arrivals_do_not_wait_for_answers():
    """A server that answers nobody until the last request is there: a closed loop would never send it."""
    count, there = 40, []

    async def both():
        everybody = asyncio.Event()

        async def answer(reader, writer):
            await reader.readuntil(b"\r\n\r\n")
            there.append(writer)
            if len(there) == count:
                everybody.set()
            await everybody.wait()
            writer.write(HEAD + chunk(event("a") + b"data: [DONE]\n\n") + b"0\r\n\r\n")
            writer.close()

        server = await asyncio.start_server(answer, "127.0.0.1", 0)
        async with server:
            port = server.sockets[0].getsockname()[1]
            return await run_calls(f"http://127.0.0.1:{port}", FakeServer.calls(count), 60.0)

    assert [row.failure for row in asyncio.run(both())] == [None] * count


def test_a_server_that_is_not_there(capsys, trace, free_port):
    with pytest.raises(RequestError, match="cannot be reached"):
        find_model(f"http://127.0.0.1:{free_port}")
    code, _, error = bench(
        capsys, "--url", f"http://127.0.0.1:{free_port}", "--trace", trace, "--rate", 1, "--duration", 1
    )
    assert code == 2 and error.count("\n") == 1 and "cannot be reached" in error
    [row] = run(f"http://127.0.0.1:{free_port}", FakeServer.calls())
    assert row.failure == "connection"


@pytest.fixture
def free_port():
    with socket.socket() as bound:  # bound, and not listening: nobody else can take it
        bound.bind(("127.0.0.1", 0))
        yield bound.getsockname()[1]


def test_a_key_that_is_refused(capsys, tinyworld_checkpoint, trace, monkeypatch):
    arguments = ("--trace", trace, "--rate", 20, "--duration", 0.1, "--vocab-size", VOCAB)
    with served(tinyworld_checkpoint, "--api-key", "secret") as locked:
        code, _, error = bench(capsys, "--url", locked.url, *arguments)
        assert code == 2 and "refuses the key (401)" in error
        monkeypatch.setenv("HEADRACE_API_KEY", "secret")
        code, text, _ = bench(capsys, "--url", locked.url, *arguments)
        assert code == 0 and "2 of 2 requests answered" in text


@pytest.mark.parametrize(
    "flags, says",
    [
        (["--trace", "nowhere.csv"], "nowhere.csv cannot be read"),
        (["--trace", __file__], "is not a trace"),
        (["--rate", 0], "rate=0"),
        (["--rate", "fast"], "--rate"),
        (["--duration", -1], "duration=-1"),
        (["--scale", 0], "scale=0"),
        (["--max-requests", 0], "max_requests=0"),
        (["--vocab-size", 3], "vocab_size=3"),
        (["--grace", -1], "--grace"),
        (["--slo-ttft", 0], "--slo-ttft"),
        (["--url", "there"], "is not an address"),
        (["--url", "http://[::1"], "is not an address"),
        (["--api-key", "schlüssel"], "printable ASCII"),
        (["--out", f"{__file__}/below"], "cannot be written"),
    ],
)
def test_bad_input_is_one_line(capsys, trace, flags, says):
    code, out, error = bench(
        capsys, "--url", "http://127.0.0.1:1", "--trace", trace, "--rate", 1, "--duration", 1, *flags
    )
    assert (code, out) == (2, "") and error.count("\n") == 1 and says in error, error
