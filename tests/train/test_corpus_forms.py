"""Conversations in the forms that files have: what counts is what a template makes of the plain form."""

import json
import sys
import types
from typing import Any

import pytest

from headrace.errors import ConfigError
from train.corpus_kit import built, whole_document, write_jsonl

TEMPLATE = (
    "{% if tools %}{% for tool in tools %}{{ tool | tojson }}{{ '\n' }}{% endfor %}{% endif %}"
    "{% for m in messages %}{{ '<|' + m.role + '|>' + m.content }}"
    "{% for call in m.tool_calls or [] %}{{ call.function.arguments | tojson }}{% endfor %}"
    "{{ eos_token }}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
TOOL: dict[str, Any] = {
    "type": "function",
    "function": {"name": "look", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}},
}
OTHER = {
    "type": "function",
    "function": {"name": "now", "parameters": {"type": "object", "properties": {"zone": {"type": "string"}}}},
}
TURNS = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]


def called(arguments):
    return [
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": arguments}}]},
        {"role": "tool", "content": "1"},
        {"role": "assistant", "content": "ok"},
    ]


CITY, ZONE = called({"city": "Rome"}), called({"zone": "utc", "near": [None, {"x": 1}]})


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """A folder whose template writes tools and calls."""
    folder = tmp_path_factory.mktemp("forms")
    (folder / "a.txt").write_text("so it goes")
    built(folder, folder / "a.txt", name="tokenizer")
    config = folder / "tokenizer" / "tokenizer_config.json"
    config.write_text(json.dumps({"eos_token": "<|endoftext|>", "chat_template": TEMPLATE}))
    return folder / "tokenizer"


def texts(corpus):
    """(the whole text, the text that counts) of each document."""
    found = []
    for number in range(corpus.index.documents):
        ids, counts = whole_document(corpus, number)
        replies = [token for token, counted in zip(ids, counts) if counted]
        found.append(tuple(corpus.tokenizer.decode(part, skip_special_tokens=False) for part in (ids, replies)))
    return found


def of(tmp_path, tokenizer, file, name="data"):
    return texts(built(tmp_path, file, chat=True, tokenizer=tokenizer, name=name, validation=0)[1])


def of_rows(tmp_path, tokenizer, rows):
    return of(tmp_path, tokenizer, write_jsonl(tmp_path / "x.jsonl", rows), f"data{len(list(tmp_path.iterdir()))}")


@pytest.mark.parametrize(
    "form",
    [
        json.dumps([TOOL]),
        [json.dumps(TOOL)],
        [{**TOOL, "function": {"name": "look", "parameters": json.dumps(TOOL["function"]["parameters"])}}],
    ],
)
def test_tools_may_be_json_text(tmp_path, tokenizer, form):
    rows = [{"messages": TURNS, "tools": tools} for tools in ([TOOL], form)]
    plain, found = of_rows(tmp_path, tokenizer, rows)
    assert plain == found and plain[0].startswith(json.dumps(TOOL) + "\n<|user|>")


@pytest.mark.parametrize("none", ["", "[]", "null", [], None])
def test_a_row_without_tools_has_none(tmp_path, tokenizer, none):
    plain, found = of_rows(tmp_path, tokenizer, [{"messages": TURNS}, {"messages": TURNS, "tools": none}])
    assert plain == found == ("<|user|>hi<|endoftext|><|assistant|>hello<|endoftext|>", "hello<|endoftext|>")


def test_text_parts_and_arguments_as_text(tmp_path, tokenizer):
    parts = [{**turn, "content": [{"type": "text", "text": turn["content"]}]} for turn in TURNS]
    rows = [{"messages": form} for form in (TURNS, parts, CITY, called('{"city": "Rome"}'))]
    plain, found, objects, encoded = of_rows(tmp_path, tokenizer, rows)
    assert plain == found and plain[1] == "hello<|endoftext|>"
    assert objects == encoded and objects[1] == '{"city": "Rome"}<|endoftext|>ok<|endoftext|>'


def test_rows_without_messages_are_skipped_and_counted(tmp_path, tokenizer):
    file = write_jsonl(tmp_path / "x.jsonl", [{"messages": TURNS}, {"messages": None}, {"messages": TURNS[:1]}])
    result, corpus = built(tmp_path, file, chat=True, tokenizer=tokenizer)
    assert (result.skipped, corpus.index.documents) == (2, 1)
    result, corpus = built(tmp_path, file, chat=True, name="learnt")
    assert (result.skipped, corpus.index.documents) == (2, 1)


def test_a_tokenizer_learns_from_text_parts(tmp_path):
    rows = [{"messages": [{**turn, "content": [{"type": "text", "text": "mill" * 9}]} for turn in TURNS]}] * 2
    _, corpus = built(tmp_path, write_jsonl(tmp_path / "x.jsonl", rows), chat=True)
    assert corpus.tokenizer.token_id("mill") is not None


def test_a_template_that_does_not_end_is_stopped(tmp_path, tokenizer):
    for file in tokenizer.glob("token*"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    endless = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"eos_token": "<|endoftext|>", "chat_template": endless})
    )
    file = write_jsonl(tmp_path / "x.jsonl", [{"messages": TURNS}])
    with pytest.raises(ConfigError, match=r"x\.jsonl:1: the chat template took longer than 2 s"):
        built(tmp_path, file, chat=True, tokenizer=tmp_path)


def test_nulls_that_a_dataset_invents_are_not_content(tmp_path, tokenizer, monkeypatch):
    """A hub dataset gives every record of a column the same keys."""
    columns = {"city": None, "zone": None, "near": None}
    rows = [
        {"messages": called({**columns, **row[1]["tool_calls"][0]["function"]["arguments"]})} for row in (CITY, ZONE)
    ]
    fake: Any = types.ModuleType("datasets")
    fake.load_dataset = lambda *arguments, **options: iter(rows)
    monkeypatch.setitem(sys.modules, "datasets", fake)
    city, zone = of(tmp_path, tokenizer, "hub:owner/name")
    assert city[1] == '{"city": "Rome"}<|endoftext|>ok<|endoftext|>'
    assert zone[1].startswith('{"zone": "utc", "near": [null, {"x": 1}]}')


def test_a_null_in_a_json_line_is_content(tmp_path, tokenizer):
    [(_, counted)] = of_rows(tmp_path, tokenizer, [{"messages": called({"city": None})}])
    assert counted.startswith('{"city": null}')


def test_parquet_gives_what_json_lines_give(tmp_path, tokenizer):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    rows = [
        {"messages": CITY, "tools": [TOOL, OTHER]},
        {"messages": ZONE, "tools": None},
        {"messages": called({}), "tools": [OTHER]},
        {"messages": TURNS, "tools": []},
        {"messages": None, "tools": []},
    ]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "x.parquet")
    by_rows = of_rows(tmp_path, tokenizer, rows)
    assert len(by_rows) == 4 and of(tmp_path, tokenizer, tmp_path / "x.parquet") == by_rows
    packed = [{**row, "tools": json.dumps(row["tools"])} for row in rows]
    parquet.write_table(pyarrow.Table.from_pylist(packed), tmp_path / "y.parquet")
    assert of(tmp_path, tokenizer, tmp_path / "y.parquet", "packed") == by_rows


def test_nulls_in_maps_and_lists_of_parquet_were_written(tmp_path, tokenizer):
    pa = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    inner = pa.struct([("x", pa.int64()), ("y", pa.int64())])
    values = pa.struct([("a", pa.map_(pa.string(), inner)), ("b", pa.large_list(inner)), ("c", pa.list_(inner, 2))])
    function = pa.struct([("name", pa.string()), ("arguments", values)])
    message = pa.struct(
        [("role", pa.string()), ("content", pa.string()), ("tool_calls", pa.list_(pa.struct([("function", function)])))]
    )
    rows = [
        {"messages": called({"a": [("k", None), ("l", {"y": 1})], "b": [None, {"x": 2}], "c": [{"x": 3}, None]})},
        {"messages": called({"a": []})},
    ]
    table = pa.Table.from_pylist(rows, pa.schema([("messages", pa.list_(message))]))
    parquet.write_table(table, tmp_path / "x.parquet")
    one, two = of(tmp_path, tokenizer, tmp_path / "x.parquet")
    assert one[1].startswith('{"a": {"k": null, "l": {"y": 1}}, "b": [null, {"x": 2}], "c": [{"x": 3}, null]}')
    assert two[1].startswith('{"a": {}}<|endoftext|>')
