"""Conversations: what the assistant says, and its end, counts; templates that rewrite the past are refused."""

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, normalizers, pre_tokenizers

from headrace.dialects.choose import choose_dialect
from headrace.dialects.hermes import HERMES
from headrace.errors import ConfigError
from headrace.text.messages import read_messages
from headrace.text.tokenizer import Tokenizer
from headrace.train import tinyworld
from headrace.train.corpus.bpe import CHAT_TEMPLATE
from headrace.train.corpus.chat import encode_chat
from train.corpus_kit import built, whole_document, write_jsonl

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ '[INST] ' + m.content + ' [/INST]' }}"
    "{% else %}{{ ' ' + m.content + ' ' + eos_token }}{% endif %}{% endfor %}"
)
BARE = (
    "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)
FORGETFUL = (
    "{% for m in messages %}{{ '<|' + m.role + '|>' }}"
    "{{ m.content if loop.last or m.role == 'user' else '…' }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
TOOLS = "{% if tools %}{{ 'tools: ' + tools | tojson }}{% endif %}" + CHATML


@pytest.fixture(scope="module")
def with_template(tmp_path_factory):
    """(template, end token, further special tokens) → tinyworld's tokenizer with that template."""
    folder = tmp_path_factory.mktemp("tokenizer")
    tinyworld.build_tokenizer(320, 0).save(folder)

    def make(template, eos="<|end|>", added=()):
        backend = Backend.from_file(str(folder / "tokenizer.json"))
        backend.add_special_tokens([eos, *added])
        return Tokenizer(backend, {"eos_token": eos, "bos_token": "<s>"}, template)

    return make


@pytest.fixture(scope="module")
def tokenizers(with_template):
    """name → a tokenizer."""
    chatml = ("<|im_start|>", "<|im_end|>")
    pieces = {"<unk>": 0, "<s>": 1, "</s>": 2, "▁": 3, **{chr(c): 4 + i for i, c in enumerate(range(32, 127))}}
    merges = [("▁", c) for c in "abcdefghijklmnopqrstuvwxyz["]
    pieces |= {a + b: len(pieces) + i for i, (a, b) in enumerate(merges)}
    llama = Backend(models.BPE(pieces, merges, unk_token="<unk>"))
    llama.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    llama.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse()])
    llama.add_special_tokens(["<s>", "</s>"])
    metaspace = Backend.from_str(llama.to_str())
    metaspace.normalizer = normalizers.NFC()
    metaspace.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    special = {"eos_token": "</s>", "bos_token": "<s>"}
    return {
        "headrace": with_template(CHAT_TEMPLATE),
        "chatml": with_template(CHATML, "<|im_end|>", chatml),
        "other end": with_template(CHATML, "<|end|>", chatml),
        "bare": with_template(BARE),
        "tools": with_template(TOOLS, "<|im_end|>", chatml),
        "forgetful": with_template(FORGETFUL),
        "llama": Tokenizer(llama, special, LLAMA),
        "metaspace": Tokenizer(metaspace, special, LLAMA),
    }


def said(tokenizer, messages, **options):
    """(all tokens' text, the stretches that count, as texts)."""
    found = encode_chat(tokenizer, messages, "x:1", **options)
    assert found is not None
    ids, counts = found
    runs, run = [], []
    for token, counted in zip([*ids.tolist(), 0], [*counts.tolist(), False]):
        if counted:
            run.append(token)
        elif run:
            runs.append(tokenizer.decode(run, skip_special_tokens=False))
            run = []
    return tokenizer.decode(ids.tolist(), skip_special_tokens=False), runs


def chat(*contents, system=None):
    turns = [{"role": role, "content": text} for role, text in zip(("user", "assistant") * len(contents), contents)]
    return [{"role": "system", "content": system}, *turns] if system else turns


@pytest.mark.parametrize(
    ("name", "end"),
    [
        ("headrace", "<|end|>"),
        ("chatml", "<|im_end|>"),
        ("other end", "<|im_end|>"),
        ("llama", " </s>"),
        ("metaspace", " </s>"),
    ],
)
def test_what_the_assistant_says_and_its_end_count(tokenizers, name, end):
    tokenizer = tokenizers[name]
    whole, runs = said(tokenizer, chat("hi there", "yes", "and now", "it is so"))
    assert [run.lstrip(" ") for run in runs] == [f"yes{end}", f"it is so{end}"]
    assert whole.endswith(end.strip())


def test_a_template_without_an_end_gets_one(tokenizers):
    whole, runs = said(tokenizers["bare"], chat("hi", "yes"))
    assert (whole, runs) == ("user: hi\nassistant: yes\n<|end|>", ["yes\n<|end|>"])


def test_what_follows_the_last_reply_is_left_out(tokenizers):
    whole, runs = said(tokenizers["chatml"], chat("hi", "yes", "and then?"))
    assert whole.endswith("yes<|im_end|>") and runs == ["yes<|im_end|>"]
    assert encode_chat(tokenizers["chatml"], chat("hi"), "x:1") is None


@settings(max_examples=80, deadline=None)
@given(
    st.lists(st.text(st.characters(codec="utf-8", exclude_characters="<|>"), max_size=12), min_size=2, max_size=6),
    st.sampled_from(["headrace", "chatml"]),
    st.sampled_from([None, "be kind"]),
)
def test_tokens_are_those_that_the_server_is_asked_with(tokenizers, contents, name, system):
    tokenizer, messages = tokenizers[name], chat(*contents, system=system)
    found = encode_chat(tokenizer, messages, "x:1")
    assert found is not None
    ids, counts = (part.tolist() for part in found)
    end = tokenizer.eos_token_id
    expected = [False] * len(ids)
    for turn in (i for i, message in enumerate(messages) if message["role"] == "assistant"):
        asked = tokenizer.encode(tokenizer.apply_chat_template(messages[:turn]), add_special_tokens=False)
        reply = [*tokenizer.encode(messages[turn]["content"], add_special_tokens=False), end]
        assert (ids[: len(asked)] == asked and ids[len(asked) : len(asked) + len(reply)] == reply) or name == "chatml"
        stop = ids.index(end, len(asked)) + 1
        expected[len(asked) : stop] = [True] * (stop - len(asked))
    assert counts == expected


def test_templates_that_rewrite_the_past_are_refused(tokenizers):
    assert said(tokenizers["forgetful"], chat("hi", "yes"))[1] == ["yes<|end|>"]
    with pytest.raises(ConfigError, match=r"x:1: message 1: the chat template renders the conversation up"):
        said(tokenizers["forgetful"], chat("hi", "yes", "and", "no"))


def test_tools_reach_the_template(tokenizers):
    whole, _ = said(tokenizers["tools"], chat("hi", "yes"), tools=[{"name": "look"}])
    assert whole.startswith('tools: [{"name": "look"}]<|im_start|>user')


TOOL = {"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}
LOOK = {"name": "look", "arguments": {"city": "Łódź", "near": None}}
LOOKED = '<tool_call>\n{"name": "look", "arguments": {"city": "Łódź", "near": null}}\n</tool_call>'
NAMED = '<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call>'
TOOL_TALK: list[dict[str, Any]] = [
    {"role": "user", "content": "and now?"},
    {"role": "assistant", "content": "I look.", "tool_calls": [{"type": "function", "function": LOOK}, {"name": "f"}]},
    {"role": "tool", "content": "sun"},
    {"role": "tool", "content": "rain"},
    {"role": "assistant", "tool_calls": [{"type": "function", "function": LOOK}]},
    {"role": "tool", "content": "sun"},
    {"role": "assistant", "content": "It is sunny."},
]
SAID = [f"I look.\n{LOOKED}\n{NAMED}<|end|>", f"{LOOKED}<|end|>", "It is sunny.<|end|>"]


@pytest.mark.parametrize("system", [None, "Be kind."])
def test_the_learnt_template_writes_tools_as_hermes_does(tokenizers, system):
    assert choose_dialect(CHAT_TEMPLATE) == HERMES
    opening = [{"role": "system", "content": system}] if system else []
    whole, runs = said(tokenizers["headrace"], [*opening, *TOOL_TALK], tools=[TOOL, {"name": "f"}])
    seen = [f"<|user|><tool_response>\n{text}\n</tool_response><|end|>" for text in ("sun", "rain", "sun")]
    assert runs == SAID
    assert whole == (
        f"<|system|>{system + chr(10) * 2 if system else ''}You may call these tools:\n"
        '{"name": "look", "parameters": {"type": "object"}}\n{"name": "f"}<|end|>'
        f"<|user|>and now?<|end|><|assistant|>{SAID[0]}{seen[0]}{seen[1]}<|assistant|>{SAID[1]}"
        f"{seen[2]}<|assistant|>{SAID[2]}"
    )


def test_the_learnt_template_without_tools(tokenizers):
    """Turns of the past may hold calls where there is no tool any more; a system's message stands where it stood."""
    _, runs = said(tokenizers["headrace"], TOOL_TALK)
    assert runs == SAID
    talk = [*chat("hi", "yes", system="Be kind."), {"role": "system", "content": "Be brief."}, *chat("and", "no")]
    plain = "".join(f"<|{message['role']}|>{message['content']}<|end|>" for message in talk)
    assert said(tokenizers["headrace"], talk)[0] == plain
    with_tools = said(tokenizers["headrace"], talk, tools=[TOOL])[0]
    assert with_tools.partition("<|user|>")[2] == plain.partition("<|user|>")[2]


def test_transformers_renders_the_learnt_template_alike(tokenizers):
    utils = pytest.importorskip("transformers.utils.chat_template_utils")
    messages = read_messages(TOOL_TALK)
    for tools in ([TOOL], None):
        (theirs,), _ = utils.render_jinja_template(
            [messages], tools=tools, chat_template=CHAT_TEMPLATE, add_generation_prompt=True, eos_token="<|end|>"
        )
        assert tokenizers["headrace"].apply_chat_template(TOOL_TALK, tools=tools) == theirs


def test_a_conversation_that_the_assistant_begins_is_refused(tokenizers):
    with pytest.raises(ConfigError, match="x:1: the conversation begins with the assistant"):
        said(tokenizers["headrace"], [{"role": "assistant", "content": "hi"}])


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"text": "a"}, r"c\.jsonl:2: has no field 'messages'; it has text: name the right one with --messages-field"),
        ({"messages": []}, r"c\.jsonl:2: messages must be a list"),
        ({"messages": "hi"}, r"c\.jsonl:2: messages must be a list"),
        ({"messages": [{"content": "a"}]}, r"c\.jsonl:2: messages\[0\] must be an object with a role"),
        ({"messages": chat("hi", "yes")[::-1]}, r"c\.jsonl:2: the conversation begins with the assistant"),
        (
            {"messages": [{"role": "judge", "content": ""}, *chat("a", "b")[1:]]},
            r"c\.jsonl:2: .*role judge is not one of",
        ),
        (
            {"messages": [{"role": "user", "content": 5}, *chat("a", "b")[1:]]},
            r":2: messages\[0\]\.content must",
        ),
        ({"messages": chat("a", "b"), "tools": "look"}, r"c\.jsonl:2: tools must be a JSON list"),
        ({"messages": chat("a", "b"), "tools": {"name": "look"}}, r"c\.jsonl:2: tools must be a list of tools"),
        (
            {"messages": [*chat("a"), {"role": "assistant", "tool_calls": [{"name": "f", "arguments": "{"}]}]},
            r"c\.jsonl:2: messages\[1\]\.tool_calls\[0\]\.arguments must be a JSON object, .*: not JSON",
        ),
    ],
)
def test_a_corrupt_conversation_is_named(tmp_path, record, message):
    file = write_jsonl(tmp_path / "c.jsonl", [{"messages": chat("hi", "yes")}, record])
    with pytest.raises(ConfigError, match=message):
        built(tmp_path, file, chat=True)


def test_chats_are_built_with_their_masks(tmp_path):
    file = write_jsonl(
        tmp_path / "c.jsonl",
        [{"talk": chat("what is 3+4?", "it is 7")}, {"talk": chat("hello")}, {"talk": chat("a", "b", "c", "d")}],
    )
    result, corpus = built(tmp_path, file, chat=True, messages_field="talk", validation=0)
    assert (result.skipped, corpus.index.documents, corpus.index.masked) == (1, 2, True)
    ids, counts = whole_document(corpus, 0)
    reply = [token for token, counted in zip(ids, counts) if counted]
    assert corpus.tokenizer.decode(reply, skip_special_tokens=False) == "it is 7<|endoftext|>"
    assert corpus.index.counted == len(reply) + 4 and corpus.tokenizer.chat_template.source == CHAT_TEMPLATE
    _, tuned = built(tmp_path, file, chat=True, messages_field="talk", tokenizer=tmp_path / "data", name="tuned")
    assert whole_document(tuned, 0) == (ids, counts)


def test_masks_survive_shards_of_any_length(tmp_path):
    file = write_jsonl(tmp_path / "c.jsonl", [{"messages": chat("a" * i, "b" * (i % 5 + 1))} for i in range(1, 40)])
    _, corpus = built(tmp_path, file, chat=True, shard_tokens=9)
    assert len(corpus.index.shards) > 10
    for number in range(39):
        ids, counts = whole_document(corpus, number)
        reply = [token for token, counted in zip(ids, counts) if counted]
        text = corpus.tokenizer.decode(reply, skip_special_tokens=False)
        assert text == "b" * ((number + 1) % 5 + 1) + "<|endoftext|>"
        assert corpus.piece(number, 2, 3).counts.tolist() == counts[2:6]


def test_chat_needs_records_a_template_and_a_reply(tmp_path):
    (tmp_path / "a.txt").write_text("hi")
    with pytest.raises(ConfigError, match=r"a\.txt: --chat needs records with messages"):
        built(tmp_path, tmp_path / "a.txt", chat=True)
    file = write_jsonl(tmp_path / "c.jsonl", [{"messages": chat("hello")}])
    with pytest.raises(ConfigError, match="there is no conversation with a turn of the assistant in it"):
        built(tmp_path, file, chat=True)
    built(tmp_path, tmp_path / "a.txt", name="plain")
    config = tmp_path / "plain" / "tokenizer_config.json"
    config.write_text(json.dumps({"eos_token": "<|endoftext|>"}))
    with pytest.raises(ConfigError, match=r"--chat: .* has no chat template"):
        built(tmp_path, file, chat=True, tokenizer=tmp_path / "plain")


def test_real_templates_mark_the_replies(data_dir, with_template):
    """Of the published templates that keep the past: what counts holds the reply, and nothing of the user."""
    marked = []
    for file in sorted((data_dir / "tokenizers/chat_templates/chat_templates").glob("*.jinja")):
        source = file.read_text().replace("    ", "").replace("\n", "")
        tokenizer = with_template(source, "<|im_end|>", ("<|im_start|>",))
        try:
            _, runs = said(tokenizer, chat("qqqq", "rrrr", "uuuu", "vvvv"))
        except ConfigError as error:
            assert "x:1" in str(error)
            continue
        marked.append(file.stem)
        assert len(runs) == 2 and "rrrr" in runs[0] and "vvvv" in runs[1], file.stem
        assert not any("q" in run or "uuuu" in run for run in runs), file.stem
    assert {"chatml", "llama-3-instruct", "zephyr", "qwen2.5-instruct", "llama-2-chat"} <= set(marked)
