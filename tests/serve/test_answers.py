"""What answers contain: tokens where the text has them, their bytes, the keys that typed clients read."""

import base64
import json
import math
import struct
from typing import Any

import pytest

from headrace.text.tokenizer import Tokenizer
from serve.http_kit import served

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
MESSAGES = [{"role": "user", "content": "hi"}]
EMOJI = [*"👍".encode()]
PROMPTS = ["One day", "Finn 👍 met é", "a  b\n👩\u200d👧 c", "<|user|>hi<|end|>", " lead"]


@pytest.fixture(scope="module")
def stories(data_dir):
    with served(data_dir / "checkpoints/stories260K", "--served-model-name", "stories") as running:
        yield running


@pytest.fixture(scope="module", params=["tinyworld", "stories"])
def model(request):
    return request.getfixturevalue({"tinyworld": "server", "stories": "stories"}[request.param])


@pytest.fixture(scope="module")
def tiny(tinyworld_checkpoint):
    return Tokenizer.from_folder(tinyworld_checkpoint)


def ids_of(server, prompt):
    return server.post("/tokenize", prompt=prompt).json()["tokens"]


def streamed(server, path, **fields):
    """The chunks of a stream."""
    with server.client.stream("POST", path, json={**fields, "stream": True}) as answer:
        lines = [line.removeprefix("data: ") for line in answer.iter_lines() if line]
    assert lines.pop() == "[DONE]", lines
    return [json.loads(line) for line in lines]


def joined(chunks, index):
    """The text and the parallel lists of one choice of a stream; offsets are never ahead of the text so far."""
    text = ""
    lists: dict[str, list[Any]] = {"tokens": [], "text_offset": [], "token_logprobs": [], "top_logprobs": []}
    for choice in (c for chunk in chunks for c in chunk["choices"] if c["index"] == index):
        text += choice["text"]
        assert all(offset <= len(text) for offset in choice["logprobs"]["text_offset"])
        for name, values in lists.items():
            values += choice["logprobs"][name]
    return text, lists


def check(text, logprobs, special=()):
    offsets = logprobs["text_offset"]
    assert offsets == sorted(offsets) and all(0 <= o <= len(text) for o in offsets)
    for token, offset in zip(logprobs["tokens"], offsets):
        if "\ufffd" not in token and token not in special:
            there = text[offset : offset + len(token)]
            cut = offset + len(there) == len(text) and token.startswith(there)
            assert there == token or cut


SPECIAL = ("<s>", "</s>", "<unk>", "<|end|>", "<|user|>", "<|assistant|>")


@pytest.mark.parametrize("as_ids", [False, True])
@pytest.mark.parametrize("extra", [{}, {"max_tokens": 0}, {"stop": ["e", " t"]}, {"skip_special_tokens": False}])
def test_offsets_index_the_text_that_is_returned(model, as_ids, extra):
    prompts = [ids_of(model, prompt) for prompt in PROMPTS] if as_ids else PROMPTS
    for echo in (True, False) if "max_tokens" not in extra else (True,):
        fields = {"prompt": prompts, "echo": echo, "logprobs": 2, "n": 2, "seed": 5, "max_tokens": 12, **extra}
        choices = model.post(COMPLETIONS, **fields).json()["choices"]
        chunks = streamed(model, COMPLETIONS, **fields)
        assert len(choices) == 2 * len(prompts)
        for choice in choices:
            check(choice["text"], choice["logprobs"], SPECIAL)
            assert joined(chunks, choice["index"]) == (choice["text"], choice["logprobs"])


def test_a_start_token_and_a_first_space(stories):
    [choice] = stories.post(COMPLETIONS, prompt="One day", echo=True, logprobs=1, max_tokens=1).json()["choices"]
    assert choice["logprobs"]["text_offset"] == [0, 0, 3, 7] and choice["logprobs"]["tokens"][:3] == [
        "<s>",
        "One",
        " day",
    ]
    assert choice["logprobs"]["token_logprobs"][0] is None is choice["logprobs"]["top_logprobs"][0]
    [first] = stories.post(COMPLETIONS, prompt="", logprobs=2, max_tokens=3, temperature=0).json()["choices"]
    check(first["text"], first["logprobs"])
    assert first["logprobs"]["tokens"][0] in first["logprobs"]["top_logprobs"][0] and first["text"][0] != " "


def test_a_character_that_a_prompt_of_ids_begins_is_whole_in_the_echo(stories):
    fields = {"echo": True, "logprobs": 0, "temperature": 0}
    ids = [1, *(3 + byte for byte in EMOJI)]
    for cut in range(1, 5):
        bias = {str(ids[cut]): 100.0}
        answer = stories.post(COMPLETIONS, prompt=ids[:cut], max_tokens=1, logit_bias=bias, **fields)
        [choice] = answer.json()["choices"]
        assert choice["text"] == ("<s>👍" if cut == 4 else "<s>" + "\ufffd" * cut)
        assert choice["logprobs"]["text_offset"] == [0, *[3] * cut]
    [only] = stories.post(COMPLETIONS, prompt=ids[:3], max_tokens=0, **fields).json()["choices"]
    assert only["text"] == "<s>\ufffd\ufffd"


def test_tokens_of_a_stop_string_wait_until_it_is_known_not_to_be_one(server, tiny):
    [a] = tiny.encode("a", add_special_tokens=False)
    fields = {"prompt": "x", "allowed_token_ids": [a], "max_tokens": 6, "logprobs": 0, "return_token_ids": True}
    for stop, shown in (("aaab", "a" * 6), ("aaaa", "")):
        [choice] = server.post(COMPLETIONS, **fields, stop=stop).json()["choices"]
        assert choice["text"] == shown and choice["logprobs"]["text_offset"] == ([*range(6)] if shown else [0, 0, 0, 0])
        chunks = streamed(server, COMPLETIONS, **fields, stop=stop)
        assert joined(chunks, 0) == (shown, choice["logprobs"])
        for chunk in chunks:
            [part] = chunk["choices"]
            assert len(part["token_ids"]) == len(part["logprobs"]["tokens"])


@pytest.mark.parametrize("stream", [False, True])
def test_bytes_of_a_part_of_a_character_are_its_own(stories, stream):
    ids = [3 + byte for byte in EMOJI]
    fields = {"allowed_token_ids": ids, "logprobs": True, "top_logprobs": 4, "max_tokens": 8, "seed": 1}
    fields |= {"messages": MESSAGES, "chat_template": "{{ messages[0].content }}", "return_token_ids": True}
    if stream:
        choices = [c for chunk in streamed(stories, CHAT, **fields) for c in chunk["choices"]]
        told = [token for c in choices if c["logprobs"] for token in c["logprobs"]["content"]]
        made = [token for c in choices for token in c.get("token_ids", ())]
    else:
        [choice] = stories.post(CHAT, **fields).json()["choices"]
        told, made = choice["logprobs"]["content"], choice["token_ids"]
    assert [token["bytes"] for token in told] == [[token_id - 3] for token_id in made] and len(told) == 8
    assert all(token["token"] == "\ufffd" and len(token["top_logprobs"]) == 4 for token in told)
    assert all(isinstance(top["bytes"], list) for token in told for top in token["top_logprobs"])


def test_bytes_add_up_to_the_text(model):
    fields = {"messages": MESSAGES, "logprobs": True, "max_tokens": 24, "seed": 3, "ignore_eos": True}
    fields |= {"chat_template": "{{ messages[0].content }}", "skip_special_tokens": False}
    [choice] = model.post(CHAT, **fields).json()["choices"]
    raw = b"".join(bytes(token["bytes"]) for token in choice["logprobs"]["content"])
    assert raw.decode(errors="replace") == choice["message"]["content"]


@pytest.mark.parametrize("skip", [True, False])
@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
def test_a_stop_string_that_is_a_special_token_stops(server, tiny, path, skip):
    token = tiny.token_id("<|assistant|>")
    fields = {"logit_bias": {str(token): 100}, "stop": ["<|assistant|>"], "skip_special_tokens": skip, "max_tokens": 9}
    fields |= {"prompt": "One day"} if path == COMPLETIONS else {"messages": MESSAGES}
    [choice] = server.post(path, **fields).json()["choices"]
    text = choice["text"] if path == COMPLETIONS else choice["message"]["content"]
    assert (text, choice["finish_reason"], choice["stop_reason"]) == ("", "stop", "<|assistant|>")
    last = streamed(server, path, **fields)[-1]["choices"][0]
    assert (last["finish_reason"], last["stop_reason"]) == ("stop", "<|assistant|>")


def test_what_is_said_of_the_prompt_is_where_vllm_has_it(server):
    asked = {"prompt_logprobs": 1, "return_token_ids": True, "max_tokens": 3}
    chat = server.post(CHAT, messages=MESSAGES, **asked).json()
    ids = chat["prompt_token_ids"]
    assert len(ids) == len(chat["prompt_logprobs"]) == chat["usage"]["prompt_tokens"]
    assert chat["choices"][0].keys() & {"prompt_token_ids", "prompt_logprobs"} == set()
    assert len(chat["choices"][0]["token_ids"]) == chat["usage"]["completion_tokens"]
    completion = server.post(COMPLETIONS, prompt=[ids, ids[:2]], **asked).json()
    assert [choice["prompt_token_ids"] for choice in completion["choices"]] == [ids, ids[:2]]
    assert [len(choice["prompt_logprobs"]) for choice in completion["choices"]] == [len(ids), 2]
    assert completion.keys() & {"prompt_token_ids", "prompt_logprobs"} == set()
    chunks = streamed(server, CHAT, messages=MESSAGES, n=2, max_tokens=3, return_token_ids=True)
    assert [chunk.get("prompt_token_ids") for chunk in chunks] == [ids] + [None] * (len(chunks) - 1)
    made = [token for chunk in chunks for token in chunk["choices"][0].get("token_ids", ())]
    assert made and all("prompt_token_ids" not in chunk["choices"][0] for chunk in chunks)
    first = streamed(server, COMPLETIONS, prompt=ids, max_tokens=3, return_token_ids=True)[0]
    assert first["choices"][0]["prompt_token_ids"] == ids


def test_keys_that_typed_clients_read_are_null_where_there_is_nothing(server):
    chat = server.post(CHAT, messages=MESSAGES, max_tokens=2).json()
    completion = server.post(COMPLETIONS, prompt="a", max_tokens=2).json()
    for answer in (chat, completion):
        assert answer["system_fingerprint"] and answer["service_tier"] is None is answer["kv_transfer_params"]
        assert answer["usage"]["completion_tokens_details"] is None
        choice = answer["choices"][0]
        assert all(choice[name] is None for name in ("logprobs", "stop_reason", "token_ids"))
    assert chat["prompt_logprobs"] is None is chat["prompt_token_ids"]
    assert completion["choices"][0]["prompt_logprobs"] is None is completion["choices"][0]["prompt_token_ids"]
    message = chat["choices"][0]["message"]
    assert message.keys() - {"role", "content"} == {
        "refusal", "annotations", "audio", "function_call", "tool_calls", "reasoning", "reasoning_content"
    }  # fmt: skip
    assert all(message[name] is None for name in message.keys() - {"role", "content"})
    chunks = streamed(server, CHAT, messages=MESSAGES, max_tokens=2, stream_options={"include_usage": True})
    assert all(chunk["usage"] is None for chunk in chunks[:-1]) and chunks[-1]["usage"]["total_tokens"]
    assert all(chunk["service_tier"] is None and chunk["system_fingerprint"] for chunk in chunks)
    assert all(chunk["choices"][0]["logprobs"] is None for chunk in chunks[:-1])
    scored = server.post(CHAT, messages=MESSAGES, max_tokens=2, ignore_eos=True, logprobs=True).json()
    told = scored["choices"][0]["logprobs"]
    assert told["refusal"] is None and len(told["content"]) == 2


def test_tokens_as_ids(server):
    fields = {"max_tokens": 3, "seed": 2, "return_token_ids": True, "return_tokens_as_token_ids": True}
    [choice] = server.post(COMPLETIONS, prompt="One day", echo=True, logprobs=2, **fields).json()["choices"]
    names = [f"token_id:{i}" for i in choice["prompt_token_ids"] + choice["token_ids"]]
    assert choice["logprobs"]["tokens"] == names
    plain = server.post(COMPLETIONS, prompt="One day", echo=True, logprobs=2, max_tokens=3, seed=2).json()["choices"][0]
    assert choice["logprobs"]["text_offset"] == plain["logprobs"]["text_offset"]
    assert all(name in best for name, best in zip(names[1:], choice["logprobs"]["top_logprobs"][1:]))
    [chat] = server.post(CHAT, messages=MESSAGES, logprobs=True, top_logprobs=1, **fields).json()["choices"]
    assert [token["token"] for token in chat["logprobs"]["content"]] == [f"token_id:{i}" for i in chat["token_ids"]]
    assert all(token["top_logprobs"][0]["token"].startswith("token_id:") for token in chat["logprobs"]["content"])


def test_embeddings_have_length_1_unless_asked_otherwise(server):
    def vector(**fields):
        return server.post("/v1/embeddings", input="Mia lives here", **fields).json()["data"][0]["embedding"]

    plain, unit = vector(normalize=False), vector()
    assert math.hypot(*unit) == pytest.approx(1, abs=1e-6) and math.hypot(*plain) != pytest.approx(1, abs=1e-3)
    assert unit == vector(normalize=True) == pytest.approx([x / math.hypot(*plain) for x in plain], rel=1e-6)
    data = base64.b64decode(vector(encoding_format="base64"))
    assert list(struct.unpack(f"<{len(data) // 4}f", data)) == unit


def test_the_tokenizer_s_configuration(model):
    info = model.client.get("/tokenizer_info").json()
    assert info["tokenizer_class"] == "PreTrainedTokenizerFast" and isinstance(info["eos_token"], str)
    cards = model.client.get("/v1/models").json()["data"]
    assert ("chat_template" in info) == cards[0]["chat_template"]
