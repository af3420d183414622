"""The real `openai` client against a server as users start it."""

import asyncio
import base64
import itertools
import struct
from typing import Any

import openai
import pytest

from headrace import SamplingParams

PROMPT = "Once upon a time, Mia"
MESSAGES = [{"role": "user", "content": "Where does Mia live?"}]
GREEDY = {"temperature": 0, "max_tokens": 24, "extra_body": {"ignore_eos": True}}


def joined(lists):
    return list(itertools.chain.from_iterable(lists))


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as made:
        yield made


def test_models(client, server):
    [first, second] = client.models.list().data
    assert (first.id, second.id) == ("tiny", "second-name") and first.object == "model"
    assert client.models.retrieve("second-name").max_model_len > 0
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("another")


def test_a_completion_is_the_engine_s_output(client, llm):
    expected = llm.generate(PROMPT, SamplingParams(temperature=0.0, ignore_eos=True, max_tokens=24))[0]
    answer = client.completions.create(model="tiny", prompt=PROMPT, **GREEDY)
    assert answer.id.startswith("cmpl-") and answer.object == "text_completion" and answer.model == "tiny"
    assert answer.system_fingerprint == llm.fingerprint
    [choice] = answer.choices
    assert choice.text == expected.outputs[0].text and choice.finish_reason == expected.outputs[0].finish_reason
    assert choice.logprobs is None
    assert answer.usage.prompt_tokens == len(expected.prompt_token_ids)
    assert answer.usage.completion_tokens == len(expected.outputs[0].token_ids)
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens


def test_a_streamed_completion_adds_up(client):
    whole = client.completions.create(model="tiny", prompt=PROMPT, n=3, seed=4, max_tokens=20, logprobs=2)
    chunks = list(
        client.completions.create(
            model="tiny",
            prompt=PROMPT,
            n=3,
            seed=4,
            max_tokens=20,
            logprobs=2,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    assert chunks[-1].choices == [] and chunks[-1].usage.model_dump(
        exclude={"prompt_tokens_details"}
    ) == whole.usage.model_dump(exclude={"prompt_tokens_details"})
    assert {c.id for c in chunks} == {chunks[0].id} and all(c.usage is None for c in chunks[:-1])
    for i, choice in enumerate(whole.choices):
        parts = [c.choices[0] for c in chunks[:-1] if c.choices[0].index == i]
        assert "".join(p.text for p in parts) == choice.text
        assert [p.finish_reason for p in parts] == [None] * (len(parts) - 1) + [choice.finish_reason]
        for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
            assert joined(getattr(p.logprobs, name) for p in parts if p.logprobs) == getattr(choice.logprobs, name)


def test_a_list_of_prompts_keeps_its_order(client):
    prompts = [PROMPT, "One day", "Finn lived at"]
    alone = [client.completions.create(model="tiny", prompt=p, n=2, seed=1, max_tokens=8) for p in prompts]
    texts = [choice.text for answer in alone for choice in answer.choices]
    together = client.completions.create(model="tiny", prompt=prompts, n=2, seed=1, max_tokens=8)
    assert [c.index for c in together.choices] == list(range(6)) and [c.text for c in together.choices] == texts
    streamed = [""] * 6
    for chunk in client.completions.create(model="tiny", prompt=prompts, n=2, seed=1, max_tokens=8, stream=True):
        streamed[chunk.choices[0].index] += chunk.choices[0].text
    assert streamed == texts


def test_echo_gives_the_prompt_and_its_log_probabilities(client, llm):
    expected = llm.generate(PROMPT, SamplingParams(temperature=0.0, max_tokens=6, logprobs=1, prompt_logprobs=1))[0]
    ids = expected.prompt_token_ids
    scores = [table[t].logprob for t, table in zip(ids[1:], expected.prompt_logprobs[1:])]
    scores += [table[t].logprob for t, table in zip(expected.outputs[0].token_ids, expected.outputs[0].logprobs)]
    for prompt in (PROMPT, ids):
        [choice] = client.completions.create(
            model="tiny", prompt=prompt, echo=True, logprobs=1, temperature=0, max_tokens=6
        ).choices
        assert choice.text == PROMPT + expected.outputs[0].text
        assert choice.logprobs.token_logprobs == [None, *scores]
        assert choice.logprobs.top_logprobs[0] is None and len(choice.logprobs.tokens) == len(scores) + 1
    parts = [
        c.choices[0]
        for c in client.completions.create(
            model="tiny", prompt=PROMPT, echo=True, logprobs=1, temperature=0, max_tokens=6, stream=True
        )
    ]
    assert "".join(p.text for p in parts) == PROMPT + expected.outputs[0].text
    assert joined(p.logprobs.token_logprobs for p in parts if p.logprobs) == [None, *scores]
    [only] = client.completions.create(model="tiny", prompt=PROMPT, echo=True, logprobs=0, max_tokens=0).choices
    assert only.text == PROMPT and only.logprobs.token_logprobs == [None, *scores[: len(ids) - 1]]


def test_an_echo_is_whole_for_choices_that_are_ahead_of_its_computation(client):
    """The prompt is cached, so that the other choices begin before the first has computed it again for its scores."""
    prompt = [5 + i % 40 for i in range(200)]
    fields: dict[str, Any] = {"model": "tiny", "prompt": prompt, "max_tokens": 3, "n": 3, "seed": 1}
    client.completions.create(**fields)
    whole = client.completions.create(**fields, echo=True, logprobs=1)
    scores: list[list[float | None]] = [[] for _ in whole.choices]
    for chunk in client.completions.create(**fields, echo=True, logprobs=1, stream=True):
        scores[chunk.choices[0].index] += chunk.choices[0].logprobs.token_logprobs
    assert scores == [choice.logprobs.token_logprobs for choice in whole.choices]


def test_a_chat_whole_and_streamed(client, llm):
    prompt = llm.chat_prompt(MESSAGES)
    params = SamplingParams(temperature=0.0, ignore_eos=True, max_tokens=24, logprobs=3)
    expected = llm.generate(prompt, params)[0].outputs[0]
    whole = client.chat.completions.create(model="tiny", messages=MESSAGES, logprobs=True, top_logprobs=3, **GREEDY)
    message = whole.choices[0].message
    assert (message.role, message.content) == ("assistant", expected.text) and whole.id.startswith("chatcmpl-")
    told = whole.choices[0].logprobs.content
    assert [t.logprob for t in told] == [table[t].logprob for t, table in zip(expected.token_ids, expected.logprobs)]
    assert all(
        [e.logprob for e in t.top_logprobs] == sorted((e.logprob for e in t.top_logprobs), reverse=True)
        and len(t.top_logprobs) == 3
        for t in told
    )
    chunks = list(
        client.chat.completions.create(
            model="tiny",
            messages=MESSAGES,
            logprobs=True,
            top_logprobs=3,
            stream=True,
            stream_options={"include_usage": True, "continuous_usage_stats": True},
            **GREEDY,
        )
    )
    assert chunks[0].choices[0].delta.role == "assistant" and chunks[-1].choices == []
    assert "".join(c.choices[0].delta.content or "" for c in chunks[:-1]) == expected.text
    assert joined(c.choices[0].logprobs.content for c in chunks[:-1] if c.choices[0].logprobs) == told
    assert [c.choices[0].finish_reason for c in chunks[:-1]] == [None] * (len(chunks) - 2) + ["length"]
    counts = [c.usage.completion_tokens for c in chunks]
    assert counts == sorted(counts) and counts[-1] == 24


def test_content_in_parts_and_a_message_to_go_on_with(client, llm):
    parts = [{"role": "user", "content": [{"type": "text", "text": MESSAGES[0]["content"]}]}]
    plain = client.chat.completions.create(model="tiny", messages=MESSAGES, **GREEDY)
    assert client.chat.completions.create(model="tiny", messages=parts, **GREEDY).choices == plain.choices
    begun = [*MESSAGES, {"role": "assistant", "content": "Mia lives at the"}]
    prompt = llm.chat_prompt(MESSAGES)["prompt"] + "Mia lives at the"
    ids = llm.tokenizer.encode(prompt, add_special_tokens=False)
    params = SamplingParams(temperature=0.0, ignore_eos=True, max_tokens=24)
    expected = llm.generate({"prompt_token_ids": ids}, params)[0]
    answer = client.chat.completions.create(
        model="tiny",
        messages=begun,
        temperature=0,
        max_tokens=24,
        extra_body={"continue_final_message": True, "echo": True, "ignore_eos": True},
    )
    assert answer.choices[0].message.content == "Mia lives at the" + expected.outputs[0].text


def test_embeddings_as_numbers_and_as_base64(client, server):
    texts = ["Mia lives at the market.", "Finn"]
    default = client.embeddings.create(model="tiny", input=texts)  # the client asks for base64 by itself
    [first, second] = [item.embedding for item in default.data]
    assert first != second and default.usage.prompt_tokens == default.usage.total_tokens > 2
    raw = server.post("/v1/embeddings", model="tiny", input=texts[0], encoding_format="base64").json()["data"][0]
    values = server.post("/v1/embeddings", model="tiny", input=texts[0]).json()["data"][0]["embedding"]
    data = base64.b64decode(raw["embedding"])
    assert list(struct.unpack(f"<{len(data) // 4}f", data)) == values == pytest.approx(first, abs=0)


def test_stop_strings_and_tokens(client, llm):
    text = llm.generate(PROMPT, SamplingParams(temperature=0.0, ignore_eos=True, max_tokens=24))[0].outputs[0].text
    stop = text[8:13]
    [choice] = client.completions.create(model="tiny", prompt=PROMPT, stop=[stop, "never"], **GREEDY).choices
    assert choice.text == text[: text.index(stop)] and choice.finish_reason == "stop" and choice.stop_reason == stop
    [shown] = client.completions.create(
        model="tiny",
        prompt=PROMPT,
        stop=stop,
        temperature=0,
        max_tokens=24,
        extra_body={"include_stop_str_in_output": True, "ignore_eos": True},
    ).choices
    assert shown.text == text[: text.index(stop)] + stop


def test_errors_have_openais_shape(client):
    with pytest.raises(openai.NotFoundError) as missing:
        client.completions.create(model="another", prompt=PROMPT)
    body: Any = missing.value.body
    assert body["param"] == "model" and missing.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as wrong:
        client.completions.create(model="tiny", prompt=PROMPT, temperature=-1)
    body = wrong.value.body
    assert body["param"] == "temperature" and body["type"] == "invalid_request_error"
    assert wrong.value.code == "invalid_value"
    with pytest.raises(openai.BadRequestError, match="context") as overflow:
        client.completions.create(model="tiny", prompt=PROMPT, max_tokens=10**6)
    assert overflow.value.code == "context_length_exceeded" and overflow.value.param == "max_tokens"
    with pytest.raises(openai.BadRequestError, match="structural_tag cannot be honoured"):
        tag: Any = {"structured_outputs": {"structural_tag": {}}}
        client.chat.completions.create(model="tiny", messages=MESSAGES, extra_body=tag)


def test_the_async_client_streams_many_at_once(server):
    async def one(client, seed):
        stream = await client.chat.completions.create(
            model="tiny", messages=MESSAGES, seed=seed, max_tokens=16, stream=True
        )
        return "".join([c.choices[0].delta.content or "" async for c in stream])

    async def scenario():
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
            alone = [await one(client, seed) for seed in range(12)]
            assert await asyncio.gather(*(one(client, seed) for seed in range(12))) == alone

    asyncio.run(scenario())


def test_tokens_of_a_text_as_the_vocabulary_writes_them(server, llm):
    text = "Mia met Finn at the market."
    plain = server.post("/tokenize", prompt=text).json()
    assert plain == {
        "count": len(plain["tokens"]),
        "max_model_len": 512,
        "tokens": llm.tokenizer.encode(text),
        "token_strs": None,
    }
    shown = server.post("/tokenize", prompt=text, return_token_strs=True).json()
    assert shown["tokens"] == plain["tokens"] and "".join(shown["token_strs"]) == text.replace(" ", "Ġ")


def test_an_embeddings_answer_has_the_fields_of_vllms(client):
    answer = client.embeddings.create(model="tiny", input="Mia").model_dump()
    assert answer["id"].startswith("embd-") and answer["created"] > 0 and answer["usage"]["completion_tokens"] == 0
