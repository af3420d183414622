"""One more axis: the door. What comes through HTTP, whole or streamed, is what the engine said, by ==.

Each request alone through `LLM` is compared with all of them at once through a server whose steps are short and whose
cache is too small for them, so that they are cut up, preempted and computed again.
"""

import asyncio
import json
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from headrace import LLM, Constraint, SamplingParams
from headrace.serve import http
from headrace.serve.app import create_app
from headrace.serve.metrics import ServerMetrics
from headrace.serve.models import ModelDirectory, ServedModel
from headrace.serve.settings import ServeSettings
from headrace.serve.text_service import TextService
from headrace.serve.trials import ConstraintTrials
from headrace.text.tokenizer import Tokenizer
from invariance.harness import prompts
from serve.gateway_kit import start
from serve.http_kit import served

COUNT = 16
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"enum": ["Mia", "Max"]},
        "n": {"type": "integer"},
        "say": {"type": "string", "maxLength": 9},
    },
    "required": ["name", "n"],
    "additionalProperties": False,
}
FLAGS = ("--max-num-batched-tokens", "13", "--block-size", "8", "--num-kv-blocks", "44", "--served-model-name", "door")
SAMPLING: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0},
    "seeded": {"temperature": 1.1, "top_p": 0.95, "seed": 11},
    "penalised": {"temperature": 0.9, "repetition_penalty": 1.2, "presence_penalty": 0.3, "seed": 12},
    "json": {"temperature": 1.0, "seed": 13, "structured_outputs": {"json": SCHEMA}},
    "regex": {
        "temperature": 1.0,
        "seed": 14,
        "structured_outputs": {"regex": "[a-z]{3,8}[0-9]{2}, ab[c-f]{1,4} [a-z ]{3,40}!"},
        "bad_words": ["e", "th"],
        "jump_forward": False,
    },
}
ASKED: dict[str, Any] = {"max_tokens": 24, "ignore_eos": True, "logprobs": 3}


@pytest.fixture(scope="module", params=["tinyworld", "gqa-qknorm", "bf16"])
def model(request, folders):
    folder = folders[request.param]
    with served(folder, *FLAGS) as server:
        llm = LLM(folder, threads=2)
        yield server, llm, prompts(llm.frontend.model_config.vocab_size)[:COUNT]
        assert server.metric("vllm:num_preemptions_total") > 0, "the cache was large enough: nothing was tested"


def inside(llm, ids, sampling):
    """Tokens, texts and log-probabilities of one request, in the form that HTTP has them."""
    asked = {name: value for name, value in sampling.items() if name != "structured_outputs"}
    outputs = sampling.get("structured_outputs", {})
    if "json" in outputs:
        asked["constraint"] = Constraint.json_schema(outputs["json"])
    elif "regex" in outputs:
        asked["constraint"] = Constraint.regex(outputs["regex"])
    params = SamplingParams(**asked, **ASKED, prompt_logprobs=3)
    output = llm.generate({"prompt_token_ids": ids}, params)[0]
    choice = output.outputs[0]
    scores = [
        None if table is None else {str(t): [e.logprob, e.rank, e.decoded_token] for t, e in table.items()}
        for table in output.prompt_logprobs
    ]
    best = []
    for table in choice.logprobs:
        by_text: dict[str, float] = {}
        for entry in table.values():
            by_text[entry.decoded_token] = max(entry.logprob, by_text.get(entry.decoded_token, entry.logprob))
        best.append(by_text)
    own = [table[t].logprob for t, table in zip(choice.token_ids, choice.logprobs)]
    return {"tokens": choice.token_ids, "text": choice.text, "logprobs": own, "best": best}, scores


def read(choices):
    """The same of the choices of one answer, or of the chunks of a stream."""
    logprobs = [c["logprobs"] for c in choices if c["logprobs"]]
    return {
        "tokens": [t for c in choices for t in c["token_ids"]],
        "text": "".join(c["text"] for c in choices),
        "logprobs": [x for part in logprobs for x in part["token_logprobs"]],
        "best": [x for part in logprobs for x in part["top_logprobs"]],
    }


def whole(server, ids, sampling):
    fields = {**sampling, **ASKED, "prompt": ids, "return_token_ids": True, "prompt_logprobs": 3}
    [choice] = server.post("/v1/completions", **fields).json()["choices"]
    scores = [
        None if table is None else {t: [e["logprob"], e["rank"], e["decoded_token"]] for t, e in table.items()}
        for table in choice["prompt_logprobs"]
    ]
    return read([choice]), scores


def streamed(server, ids, sampling):
    fields = {**sampling, **ASKED, "prompt": ids, "return_token_ids": True, "stream": True}
    with server.client.stream("POST", "/v1/completions", json=fields) as answer:
        lines = [line.removeprefix("data: ") for line in answer.iter_lines() if line]
    assert lines.pop() == "[DONE]"
    return read([choice for line in lines for choice in json.loads(line)["choices"]])


@pytest.mark.parametrize("sampling", SAMPLING)
def test_the_door_changes_no_bit(model, sampling):
    server, llm, texts = model
    expected = [inside(llm, ids, SAMPLING[sampling]) for ids in texts]
    with ThreadPoolExecutor(COUNT) as pool:
        assert list(pool.map(lambda ids: whole(server, ids, SAMPLING[sampling]), texts)) == expected
        got = list(pool.map(lambda ids: streamed(server, ids, SAMPLING[sampling]), texts))
        assert got == [said for said, _ in expected]


def test_a_door_that_rounds_is_noticed(folders, monkeypatch):
    class Rounds:
        @staticmethod
        def encode(content):
            return json.dumps(json.loads(json.dumps(content), parse_float=lambda x: round(float(x), 6))).encode()

    ids = [5, 6, 7, 8]
    expected, _ = inside(LLM(folders["tinyworld"]), ids, SAMPLING["greedy"])

    async def ask():
        gateway, _ = await start(folders["tinyworld"])
        texts = TextService(Tokenizer.from_folder(folders["tinyworld"]))
        trials = ConstraintTrials(str(folders["tinyworld"]), gateway.info.vocab_size)
        models = ModelDirectory(ServedModel(gateway, texts, trials, ["door"], defaults={}, priorities=False))
        transport = httpx.ASGITransport(create_app(models, ServerMetrics("door"), ServeSettings()))
        async with httpx.AsyncClient(transport=transport, base_url="http://door") as client:
            fields = {**SAMPLING["greedy"], **ASKED, "prompt": ids, "return_token_ids": True}
            right = (await client.post("/v1/completions", json=fields)).json()["choices"]
            monkeypatch.setattr(http, "_encoder", Rounds)
            wrong = (await client.post("/v1/completions", json=fields)).json()["choices"]
        await texts.close()
        await trials.close()
        await gateway.stop()
        return read(right), read(wrong)

    right, wrong = asyncio.run(ask())
    assert right == expected and wrong != expected and wrong["tokens"] == expected["tokens"]
