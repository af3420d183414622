"""A template's markers say which format it renders, and a prompt's end whether it opens a `<think>` block."""

import pytest

from dialects.dialect_kit import AUTO, NAMED, NONE, REQUIRED, SEVERAL, TOOLS, accepts, shape_of
from dialects.template_kit import LLAMA, MISTRAL, THINKING
from headrace.dialects.choose import (
    DIALECTS,
    answer_dialect,
    choose_dialect,
    dialect_named,
    opens_reasoning,
    template_reasons,
)
from headrace.errors import ConfigError, RequestError
from headrace.text.chat import ChatTemplate


def test_each_template_has_its_format():
    assert [found and found.name for found in map(choose_dialect, (THINKING, LLAMA, MISTRAL, "{{ messages }}"))] == [
        "hermes",
        "llama3",
        "mistral",
        None,
    ]
    assert choose_dialect("<|start_header_id|>{{ message.content }}") is None
    for other in ("<tool_call>\n<function=f> arguments", "<tool_call>f\n<arg_key>arguments", "[TOOL_CALLS]f[ARGS]{}"):
        assert choose_dialect(other) is None


def test_a_template_of_one_call_has_answers_of_one_call():
    one = choose_dialect(LLAMA + "{{ raise_exception('This model only supports single tool-calls at once!') }}")
    assert one is not None and (one.name, one.between) == ("llama3", None)
    assert shape_of(one).once and not shape_of("llama3").once
    assert not accepts(shape_of(one), SEVERAL["llama3"][0])


def test_real_templates(data_dir):
    folder = data_dir / "tokenizers/chat_templates/chat_templates"
    found = {file.stem: choose_dialect(file.read_text()) for file in folder.glob("*.jinja")}
    assert {name: dialect.name for name, dialect in found.items() if dialect} == {"qwen2.5-instruct": "hermes"}
    assert not any(template_reasons(file.read_text()) for file in folder.glob("*.jinja"))


def test_a_format_by_name():
    assert {name: dialect_named(name).name for name in DIALECTS} == {name: name for name in DIALECTS}
    with pytest.raises(ConfigError, match="tool_format=pythonic is not one of hermes, llama3, mistral, json"):
        dialect_named("pythonic")


def test_what_an_answer_s_format_depends_on():
    assert answer_dialect(THINKING, TOOLS, AUTO) == DIALECTS["hermes"]
    assert answer_dialect(THINKING, TOOLS, AUTO, "llama3") == DIALECTS["llama3"]
    assert answer_dialect(THINKING, TOOLS, NONE) is None
    assert answer_dialect("", (), NONE, "hermes") is None
    for choice in (REQUIRED, NAMED):
        assert answer_dialect("", TOOLS, choice) == DIALECTS["json"]
        assert answer_dialect(MISTRAL, TOOLS, choice) == DIALECTS["mistral"]
    with pytest.raises(RequestError, match=r"^tools: the model's chat template") as caught:
        answer_dialect("{{ messages }}", TOOLS, AUTO)
    assert caught.value.param == "tools"


def test_which_prompts_open_reasoning():
    template = ChatTemplate(THINKING)
    asked = [{"role": "user", "content": "What does <think> mean?"}]
    assert template_reasons(THINKING) and not template_reasons(LLAMA)
    assert not opens_reasoning(template.render(asked))
    assert not opens_reasoning(template.render(asked, enable_thinking=False))
    assert opens_reasoning(template.render(asked) + "<think>\n")
    assert not opens_reasoning("")
