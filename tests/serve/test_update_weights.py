"""/update_weights: new weights in a running server, in running streams, and in a restarted engine."""

import asyncio
import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import openai
import pytest
from openai.types.chat import ChatCompletionMessageParam

from headrace import LLM, SamplingParams
from headrace.serve.errors import UnavailableError
from serve.gateway_kit import start
from serve.http_kit import served, until

PROMPT = "Once upon a time, Mia went to the garden, and there she found what Tom had lost. " * 2
ASKED = {"prompt": PROMPT, "temperature": 0, "max_tokens": 40, "ignore_eos": True, "return_token_ids": True}
PATH = "/update_weights"


@pytest.fixture(scope="module")
def folders(tinyworld_checkpoint, other_checkpoint):
    return {"first": tinyworld_checkpoint, "other": other_checkpoint}


@pytest.fixture(scope="module")
def llms(folders):
    """The same models without a server."""
    return {name: LLM(folder, threads=1) for name, folder in folders.items()}


def tokens(llms, name, prompt=PROMPT, count=40):
    params = SamplingParams(temperature=0.0, max_tokens=count, ignore_eos=True)
    return list(llms[name].generate(prompt, params)[0].outputs[0].token_ids)


@pytest.fixture(scope="module")
def server(tinyworld_checkpoint):
    """A server with a key that allows updates."""
    with served(
        tinyworld_checkpoint, "--allow-weight-updates", "--api-key", "secret", "--served-model-name", "tiny"
    ) as running:
        running.client.headers["Authorization"] = "Bearer secret"
        yield running


@pytest.fixture
def fresh(server, folders):
    """The server with its first weights, and their version."""
    return update(server, folders["first"])


def update(server, folder, **fields):
    answer = server.post(PATH, path=str(folder), **fields)
    assert answer.status_code == 200, answer.text
    return answer.json()["weights_version"]


def events(server, **fields):
    """A stream's chunks as they come."""
    with server.client.stream("POST", "/v1/completions", json={**ASKED, **fields, "stream": True}) as answer:
        for line in answer.iter_lines():
            if line.startswith("data: {"):
                event = json.loads(line.removeprefix("data: "))
                assert "error" not in event, event
                yield event


def test_every_answer_uses_the_new_weights_and_has_their_version(server, fresh, folders, llms):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="secret", max_retries=0) as client:

        def told():
            more = {"ignore_eos": True, "return_token_ids": True}
            whole = client.completions.create(
                model="tiny", prompt=PROMPT, temperature=0, max_tokens=40, extra_body=more
            )
            messages: list[ChatCompletionMessageParam] = [{"role": "user", "content": "Where is Mia?"}]
            chat = client.chat.completions.create(model="tiny", messages=messages, max_tokens=2)
            chunks = list(
                client.chat.completions.create(
                    model="tiny", messages=messages, max_tokens=2, stream=True, stream_options={"include_usage": True}
                )
            )
            vector = client.embeddings.create(model="tiny", input=PROMPT)
            answers: list[Any] = [whole, chat, *chunks, vector, client.models.retrieve("tiny")]
            seen = {answer.weights_version for answer in answers}
            choice: Any = whole.choices[0]
            assert whole.usage is not None
            return choice.token_ids, vector.data[0].embedding, seen, whole.usage.prompt_tokens_details

        before = told()
        assert before[0] == tokens(llms, "first") and before[2] == {fresh}
        assert update(server, folders["other"]) == fresh + 1
        after = told()
        assert after[0] == tokens(llms, "other") != before[0] and after[2] == {fresh + 1} and after[1] != before[1]
        assert after[3].cached_tokens == 0 and told()[3].cached_tokens > 0
        assert update(server, folders["first"], version=fresh + 40) == fresh + 40
        assert told()[:3] == (before[0], before[1], {fresh + 40})


def test_a_stream_goes_on_under_the_new_weights(server, fresh, folders, llms):
    known: list[int] = []
    rest: list[int] = []
    for _ in range(20):
        known, rest, versions = [], [], []
        before = update(server, folders["first"])
        for event in events(server, max_tokens=400):
            versions.append(event["weights_version"])
            (known if event["weights_version"] == before else rest).extend(event["choices"][0]["token_ids"])
            if len(versions) == 3:
                update(server, folders["other"])
        assert versions == sorted(versions) and set(versions) <= {before, before + 1} and len(known) + len(rest) == 400
        if rest:  # else a busy machine read the third event when the stream was over
            break
    assert rest and known == tokens(llms, "first", count=400)[: len(known)]
    ids = llms["first"].tokenizer.encode(PROMPT) + known
    assert rest == tokens(llms, "other", {"prompt_token_ids": ids}, len(rest))


def test_an_engine_that_dies_comes_back_with_the_last_weights(server, fresh, folders, llms):
    restarts = server.client.get("/health").json()["restarts"]
    update(server, folders["other"])
    update(server, folders["first"])
    update(server, folders["other"], version=fresh + 7)
    got = []
    for event in events(server, max_tokens=60):
        assert event["weights_version"] == fresh + 7
        got += event["choices"][0]["token_ids"]
        if len(got) == 5:
            os.kill(server.instance_pid(), signal.SIGKILL)
    assert got == tokens(llms, "other", count=60)
    until(lambda: server.client.get("/health").json() == {"status": "ready", "restarts": restarts + 1})
    answer = server.post("/v1/completions", **ASKED).json()
    assert answer["choices"][0]["token_ids"] == tokens(llms, "other") and answer["weights_version"] == fresh + 7
    assert server.client.get("/v1/models").json()["data"][0]["weights_version"] == fresh + 7
    assert update(server, folders["first"]) == fresh + 8


def broken(kind, good, folder):
    """(A folder that cannot be loaded, part of the error message)."""
    if kind == "nowhere":
        return folder / "nowhere", "is no folder on this machine"
    if kind == "hub":
        return "org/name", "is no folder on this machine"
    if kind == "file":
        return good / "config.json", "is no folder on this machine"
    if kind == "empty":
        return folder, "has neither model.safetensors"
    if kind == "endless":
        return "a/" * 3000, "cannot be read"
    if kind == "null":
        return "a\0b", "cannot be read"
    shutil.copytree(good, folder, dirs_exist_ok=True)
    weights, config = folder / "model.safetensors", folder / "config.json"
    if kind == "truncated":
        weights.write_bytes(weights.read_bytes()[:-100])
        return folder, "is truncated or corrupt"
    if kind == "another model":
        config.write_text(json.dumps({**json.loads(config.read_text()), "rope_theta": 123.0}))
        return folder, "makes rope_theta 123.0"
    data = weights.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    if kind == "tensor missing":
        header["another.weight"] = header.pop("model.norm.weight")
        said = "model.norm.weight is missing from the checkpoint"
    else:
        matrix = header["model.layers.0.mlp.down_proj.weight"]
        matrix["shape"] = matrix["shape"][::-1]
        said = "model.layers.0.mlp.down_proj.weight has shape"
    text = json.dumps(header).encode()
    weights.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + size :])
    return folder, said


KINDS = (
    "nowhere",
    "hub",
    "file",
    "empty",
    "endless",
    "null",
    "truncated",
    "another model",
    "tensor missing",
    "misshapen",
)


@pytest.mark.parametrize("kind", KINDS)
def test_what_cannot_be_put_in_is_a_400_and_changes_nothing(server, folders, llms, tmp_path, kind):
    version = server.client.get("/v1/models").json()["data"][0]["weights_version"]
    before = server.post("/v1/completions", **ASKED).json()
    path, said = broken(kind, folders["other"], tmp_path)
    refused = server.post(PATH, path=str(path), version=99)
    error = refused.json()["error"]
    assert refused.status_code == 400 and error["param"] == "path" and said in error["message"], error
    after = server.post("/v1/completions", **ASKED).json()
    assert after["choices"] == before["choices"] and after["weights_version"] == before["weights_version"] == version
    assert after["usage"]["prompt_tokens_details"]["cached_tokens"] > 0, "the cache is whole, too"


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({}, "path"),
        ({"path": None}, "path"),
        ({"path": ""}, "path"),
        ({"path": 3}, "path"),
        ({"path": "x", "version": -1}, "version"),
        ({"path": "x", "version": 2**53}, "version"),
        ({"path": "x", "version": 1.5}, "version"),
        ({"path": "x", "verson": 1}, "verson"),
    ],
)
def test_fields_are_checked(server, fields, param):
    refused = server.post(PATH, **fields)
    assert refused.status_code == 400 and refused.json()["error"]["param"] == param


def test_a_key_is_needed(server, folders):
    refused = server.client.post(PATH, json={"path": str(folders["first"])}, headers={"Authorization": "Bearer wrong"})
    assert refused.status_code == 401


def test_without_the_flag_it_is_refused_by_its_name(tinyworld_checkpoint):
    with served(tinyworld_checkpoint) as plain:
        for sent in (b"", json.dumps({"path": str(tinyworld_checkpoint)}).encode()):
            refused = plain.client.post(PATH, content=sent)
            error = refused.json()["error"]
            assert refused.status_code == 403 and "--allow-weight-updates" in error["message"]
            assert error["type"] == "permission_error" and error["code"] is None
        assert plain.post("/v1/completions", **ASKED).json()["weights_version"] == 0


# ---- the gateway by itself


def test_files_that_have_changed_are_not_taken_for_the_same_weights(folders, tmp_path, capfd):
    folder = Path(shutil.copytree(folders["other"], tmp_path / "hf"))
    link = tmp_path / "latest"
    link.symlink_to(folder)

    async def scenario():
        gateway, _ = await start(folders["first"])
        assert await gateway.update_weights(str(link)) == 1
        link.unlink()
        link.symlink_to(folders["first"])
        os.kill(gateway.info.pid, signal.SIGKILL)
        output = await (await gateway.open("a", None, [5, 6], SamplingParams(max_tokens=2))).result()
        assert output.weights_version == 1 and gateway.restarts == 1, "the link's target is what was put in"
        shutil.copyfile(folders["first"] / "model.safetensors", folder / "model.safetensors")
        stream = await gateway.open("b", None, [5, 6], SamplingParams(max_tokens=200, ignore_eos=True))
        os.kill(gateway.info.pid, signal.SIGKILL)
        with pytest.raises(UnavailableError, match=r"version 1 in .* have changed since they were put in"):
            await stream.result()
        assert gateway.state == "failed"
        with pytest.raises(UnavailableError, match="failed"):
            await gateway.update_weights(str(folder))
        await gateway.stop()

    asyncio.run(scenario())
    assert "no other is started" in capfd.readouterr().err
