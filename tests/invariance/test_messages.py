"""One more axis: the message. A conversation has one text, in training and in serving, however it is written.

Each template renders each way to write a conversation through every door: the server, `LLM.chat`, and `data build`.
"""

import asyncio
import json
from typing import Any

import pytest
from tokenizers import Tokenizer as Backend

from headrace import LLM
from headrace.errors import HeadraceError
from headrace.serve.text_service import TextService
from headrace.text.template_process import TemplateProcess
from headrace.text.tokenizer import Tokenizer
from headrace.train import tinyworld
from headrace.train.corpus.bpe import CHAT_TEMPLATE
from headrace.train.corpus.chat import encode_chat, messages_of

BARE = "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}"
CALLING = (
    "{% if tools %}{{ tools | tojson }}{% endif %}"
    "{% for m in messages %}{{ '<|' + m.role + '|>' + m.content }}"
    "{% if 'tool_calls' in m %}{% for call in m.tool_calls %}"
    "{{ call.function.name + '(' + call.function.arguments | tojson + ')' }}{% endfor %}{% endif %}"
    "{{ eos_token }}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
OWN = {"learnt": CHAT_TEMPLATE, "bare": BARE, "calling": CALLING}
PUBLISHED = (
    *("alpaca", "amberchat", "chatml", "chatqa", "falcon-instruct", "gemma-it", "granite-3.0-instruct", "llama-2-chat"),
    *("llama-3-instruct", "mistral-instruct", "openchat-3.5", "phi-3-small", "phi-3", "qwen2.5-instruct", "saiga"),
    *("solar-instruct", "vicuna", "zephyr"),
)
FOLDERS = ("phi-3-mini", "qwen2.5")

ASK, SAID = {"role": "user", "content": "what now?"}, {"role": "assistant", "content": "one\ntwo"}
RULE = {"role": "system", "content": "be kind"}
CALL = {"name": "look", "arguments": {"city": "Rome", "near": None}}
CALLED = {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": CALL}]}
RESULT = {"role": "tool", "content": "sun", "tool_call_id": "1"}
TOOL = {"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": {}}}}
SENT = {"name": "look", "arguments": json.dumps(CALL["arguments"])}
NULLS = {"tool_calls": None, "function_call": None, "refusal": None, "name": None, "audio": None}


def text(*contents):
    return [{"type": "text", "text": content} for content in contents]


def calls(*found):
    return [{"type": "function", "function": function} for function in found]


PLAIN, USED = [ASK, SAID], [ASK, CALLED, RESULT, SAID]
SHAPES = {
    "plain": (PLAIN, PLAIN),
    "system": ([RULE, *PLAIN], [RULE, *PLAIN]),
    "developer": ([{**RULE, "role": "developer"}, *PLAIN], [RULE, *PLAIN]),
    "parts": ([{**ASK, "content": text("what now?")}, {**SAID, "content": text("one", "two")}], PLAIN),
    "nulls": ([{**ASK, **NULLS}, {**SAID, **NULLS}], PLAIN),
    "no calls": ([ASK, {**SAID, "tool_calls": []}], PLAIN),
    "null content": ([ASK, {**SAID, "content": None}, *PLAIN], [ASK, {**SAID, "content": ""}, *PLAIN]),
    "no content": ([ASK, {"role": "assistant"}, *PLAIN], [ASK, {**SAID, "content": ""}, *PLAIN]),
    "object": ([ASK, {**CALLED, "content": None}, RESULT, SAID], USED),
    "text of an object": ([ASK, {"role": "assistant", "tool_calls": calls(SENT)}, RESULT, SAID], USED),
    "flat": ([ASK, {**CALLED, "tool_calls": [CALL]}, RESULT, SAID], USED),
    "older name": ([ASK, {**SAID, "content": None, "function_call": SENT}, {**RESULT, "role": "function"}, SAID], USED),
    "bad part": ([ASK, {**SAID, "content": [{"type": "image_url"}]}], None),
    "bad arguments": ([ASK, {**CALLED, "tool_calls": calls({"name": "look", "arguments": "{"})}, SAID], None),
}


@pytest.fixture(scope="module")
def llm(tinyworld_checkpoint):
    with LLM(tinyworld_checkpoint, num_kv_blocks=8) as running:
        yield running


@pytest.fixture(scope="module")
def tokenizer_with(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    tinyworld.build_tokenizer(320, 0).save(folder)

    def make(template):
        backend = Backend.from_file(str(folder / "tokenizer.json"))
        backend.add_special_tokens(["<s>", "</s>", "<|im_start|>", "<|im_end|>"])
        return Tokenizer(backend, {"eos_token": "</s>", "bos_token": "<s>"}, template)

    return make


def template_of(name, data_dir):
    if name in PUBLISHED:
        source = (data_dir / "tokenizers/chat_templates/chat_templates" / f"{name}.jinja").read_text()
        return source.replace("    ", "").replace("\n", "")  # as its authors say that it is to be loaded
    config = json.loads((data_dir / "tokenizers/ort_ext" / name / "tokenizer_config.json").read_text())
    return config["chat_template"]


def encoded(tokenizer, tools):
    pieces = encode_chat(tokenizer, PLAIN, "x:1", tools)
    assert pieces is not None
    return pieces[0].tolist()


def outcome(render):
    """The text, or why there is none, without the place that only a file has."""
    try:
        return render()
    except HeadraceError as error:
        return type(error), str(error).removeprefix("x:1: ")


def served(tokenizer, conversations):
    """What the server makes of conversations: texts or reasons."""

    async def whole():
        service = TextService(tokenizer)
        found: list[Any] = []
        try:
            for messages in conversations:
                try:
                    prompt = await service.chat(messages, add_generation_prompt=False)
                    found.append((prompt.text, prompt.token_ids))
                except HeadraceError as error:
                    found.append(str(error))
        finally:
            await service.close()
        return found

    return asyncio.run(whole())


def check(tokenizer, llm):
    """Every shape, at every door: one text each, which is that of its plain form."""
    llm.tokenizer = tokenizer
    by_name = dict(zip(SHAPES, served(tokenizer, [messages for messages, _ in SHAPES.values()])))
    plain = dict(zip(SHAPES, served(tokenizer, [plain or PLAIN for _, plain in SHAPES.values()])))
    assert isinstance(by_name["plain"], tuple)
    with TemplateProcess() as templates:
        for name, (messages, form) in SHAPES.items():
            asked = outcome(lambda: llm.chat_prompt(messages)["prompt"])  # noqa: B023
            trained = outcome(lambda: encode_chat(tokenizer, read(messages), "x:1", None, templates))  # noqa: B023
            if isinstance(by_name[name], str):
                assert asked[1] == by_name[name] and (form is None or plain[name] == by_name[name]), name
                assert trained[1] == by_name[name], name
                continue
            text, ids = by_name[name]
            assert form is not None and plain[name] == by_name[name], name
            assert tokenizer.apply_chat_template(messages) == asked, name
            if isinstance(trained[0], type):  # the template rewrites the past, or does not write what it replies
                assert "the chat template" in trained[1], name
                continue
            learnt = trained[0].tolist()
            assert ids[: len(learnt)] == learnt or ids[: len(learnt) - 1] == learnt[:-1], (name, text)


def read(messages):
    """As `data build` reads them from a line of a file."""
    return messages_of("x:1", json.loads(json.dumps({"messages": messages})), "messages")


@pytest.mark.parametrize("name", OWN)
def test_a_conversation_has_one_text(name, llm, tokenizer_with):
    check(tokenizer_with(OWN[name]), llm)


@pytest.mark.parametrize("name", [*PUBLISHED, *FOLDERS])
def test_a_conversation_has_one_text_with_published_templates(name, llm, tokenizer_with, data_dir):
    check(tokenizer_with(template_of(name, data_dir)), llm)


@pytest.mark.parametrize("name", ["calling", *PUBLISHED, *FOLDERS])
def test_tools_have_one_text(name, tokenizer_with, request):
    template = OWN[name] if name in OWN else template_of(name, request.getfixturevalue("data_dir"))
    tokenizer = tokenizer_with(template)

    def trained(tools):
        return outcome(lambda: encoded(tokenizer, tools))

    assert trained([TOOL]) == trained(json.dumps([TOOL])) == trained([json.dumps(TOOL)])
