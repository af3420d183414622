"""guidellm ends a short run with no failed request, and counts the tokens that the server counts."""

import json

import pytest

REQUESTS, PROMPT, OUTPUT = 6, 32, 12


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
def test_a_run_ends_with_no_failed_request(clients, server, checkpoint, trainer, tmp_path, path):
    generated, succeeded = (server.metric(f"vllm:{name}_total") for name in ("generation_tokens", "request_success"))
    clients.run(
        "guidellm",
        "run",
        "--backend",
        f"kind=openai_http,target={server.url},model=tiny,request_format={path}",
        "--profile",
        "kind=concurrent,streams=2",
        "--constraint",
        f"kind=max_requests,count={REQUESTS}",
        "--tokenizer",
        f"kind=huggingface_auto,model={checkpoint}",
        "--data",
        f"kind=synthetic_text,prompt_tokens={PROMPT},output_tokens={OUTPUT}",
        "--output",
        f"kind=json,path={tmp_path / 'run.json'}",
        "--disable-console-interactive",
    )
    [run] = json.loads((tmp_path / "run.json").read_text())["benchmarks"]
    assert run["metrics"]["request_totals"] == {
        "successful": REQUESTS,
        "errored": 0,
        "incomplete": 0,
        "total": REQUESTS,
    }
    requests = run["requests"]["successful"]
    assert [request["output_tokens"] for request in requests] == [OUTPUT] * REQUESTS
    assert server.metric("vllm:generation_tokens_total") - generated == REQUESTS * OUTPUT
    assert server.metric("vllm:request_success_total") - succeeded == REQUESTS
    assert all(request["time_to_first_token_ms"] > 0 and request["output"] for request in requests)
    bodies = [json.loads(request["request_args"])["body"] for request in requests]
    assert all(body["stream"] and body["ignore_eos"] for body in bodies)
    if path == "/v1/completions":
        encoded = [len(trainer.tokenizer.encode(body["prompt"])) for body in bodies]
        assert [request["prompt_tokens"] for request in requests] == encoded
