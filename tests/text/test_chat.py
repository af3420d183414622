"""Rendering equals transformers'; hostile and broken templates end in one clear line."""

import json
import shutil
from typing import Any

import pytest

from headrace.errors import CheckpointError, RequestError
from headrace.text.chat import ChatTemplate
from headrace.text.tokenizer import Tokenizer

TEMPLATES = (
    "alpaca",
    "amberchat",
    "chatml",
    "chatqa",
    "falcon-instruct",
    "gemma-it",
    "granite-3.0-instruct",
    "llama-2-chat",
    "llama-3-instruct",
    "mistral-instruct",
    "openchat-3.5",
    "phi-3-small",
    "phi-3",
    "qwen2.5-instruct",
    "saiga",
    "solar-instruct",
    "vicuna",
    "zephyr",
)
SYSTEM: dict[str, Any] = {"role": "system", "content": "  Be brief. "}
TURNS: list[dict[str, Any]] = [
    {"role": "user", "content": " Hi <there> & 'you'\n"},
    {"role": "assistant", "content": "Hello é漢😀 "},
    {"role": "user", "content": 'And "now"?', "name": None},
]
TOOL = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "a < b",
        "parameters": {"type": "object", "properties": {"a": {"type": "number"}}, "required": ["a"]},
    },
}
CONVERSATIONS: dict[str, tuple[list[dict[str, Any]], dict[str, Any]]] = {
    "turns": (TURNS, {}),
    "system": ([SYSTEM, *TURNS], {}),
    "one": (TURNS[:1], {}),
    "answered": (TURNS[:2], {"add_generation_prompt": False}),
    "tools": ([SYSTEM, *TURNS], {"tools": [TOOL]}),
    "variables": (TURNS, {"enable_thinking": False}),
    "reasoning": ([TURNS[0], {**TURNS[1], "reasoning": "because"}, TURNS[2]], {}),
}


def folder_with(tmp_path, data_dir, template, **config):
    shutil.copy(data_dir / "checkpoints/stories260K/tokenizer.json", tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps(
            {
                "tokenizer_class": "PreTrainedTokenizerFast",
                "bos_token": "<s>",
                "eos_token": "</s>",
                "unk_token": "<unk>",
                **({} if template is None else {"chat_template": template}),
                **config,
            }
        )
    )
    return tmp_path


@pytest.mark.parametrize("conversation", CONVERSATIONS)
@pytest.mark.parametrize("name", TEMPLATES)
def test_rendering_equals_transformers(data_dir, tmp_path, name, conversation):
    transformers = pytest.importorskip("transformers")
    jinja2 = pytest.importorskip("jinja2")
    source = (data_dir / "tokenizers/chat_templates/chat_templates" / f"{name}.jinja").read_text()
    folder = folder_with(tmp_path, data_dir, source)
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    messages, options = CONVERSATIONS[conversation]
    options = {"add_generation_prompt": True, **options}
    try:
        expected = theirs.apply_chat_template(messages, tokenize=False, **options)
    except (jinja2.TemplateError, TypeError):
        with pytest.raises(RequestError, match="messages"):
            Tokenizer.from_folder(folder).apply_chat_template(messages, **options)
        return
    assert Tokenizer.from_folder(folder).apply_chat_template(messages, **options) == expected


def test_named_templates_and_the_jinja_file(data_dir, tmp_path):
    named = [{"name": "default", "template": "plain"}, {"name": "tool_use", "template": "tools {{ tools|tojson }}"}]
    folder = folder_with(tmp_path, data_dir, named)
    tokenizer = Tokenizer.from_folder(folder)
    assert tokenizer.apply_chat_template(TURNS) == "plain"
    assert tokenizer.apply_chat_template(TURNS, tools=[{"a": "<b>"}]) == 'tools [{"a": "<b>"}]'
    (folder / "chat_template.jinja").write_text("from the file {{ bos_token }}")
    assert Tokenizer.from_folder(folder).apply_chat_template(TURNS) == "from the file <s>"


def test_no_template_is_a_clear_error(data_dir, tmp_path):
    tokenizer = Tokenizer.from_folder(folder_with(tmp_path, data_dir, None))
    assert not tokenizer.has_chat_template
    with pytest.raises(RequestError, match="no chat template"):
        tokenizer.apply_chat_template(TURNS)


@pytest.mark.parametrize(
    "template",
    [
        "{{ messages.__class__ }}",
        "{{ ''.__class__.__mro__ }}",
        "{{ messages[0].get.__globals__ }}",
        "{{ raise_exception.__globals__ }}",
        "{{ strftime_now.__code__ }}",
        "{{ messages.append(1) }}",
        "{{ 'x' * 10**12 }}",
        "{{ 9**9**9**9**9 }}",
        "{{ [0] * 99999999 }}",
        "{% for i in range(10**9) %}x{% endfor %}",
        "{% for i in range(99999) %}{% for j in range(99999) %}xxxxxxxx{% endfor %}{% endfor %}",
        "{{ cycler.__init__.__globals__ }}",
        "{{ ''|attr('__class__') }}",
        "{{ '%s'.__mod__.__self__ }}",
        "{{ self._TemplateReference__context }}",
        "{{ namespace.__init__.__globals__ }}",
        "{{ '{0.__class__}'.format(1) }}",
    ],
)
def test_hostile_templates_are_refused(template):
    with pytest.raises((CheckpointError, RequestError), match="template"):
        text = ChatTemplate(template).render(TURNS)
        assert text == "", f"the template got {text[:100]!r}"
        raise RequestError("template rendered to nothing")  # an undefined attribute prints nothing: also safe


@pytest.mark.parametrize("template", ["{% if %}", "{{ unclosed", "{% for x in %}", "{% unknown %}", "{{ 1|nofilter }}"])
def test_a_template_that_does_not_compile_is_the_checkpoints_fault(template):
    with pytest.raises(CheckpointError, match="does not compile"):
        ChatTemplate(template).render(TURNS)


def test_the_dialect():
    render = ChatTemplate(
        "{% for m in messages %}{% if loop.index > 2 %}{% break %}{% endif %}\n"
        "{% generation %}{{ m.content }}{% endgeneration %}\n{% endfor %}{{ strftime_now('%%') }}"
    ).render
    assert render([{"role": "user", "content": "a"}] * 3) == "aa%"


def test_a_template_that_refuses_the_messages_says_why():
    template = ChatTemplate("{{ raise_exception('roles must alternate') }}")
    with pytest.raises(RequestError, match="roles must alternate"):
        template.render(TURNS)


@pytest.mark.parametrize(
    "messages",
    [
        [],
        "hello",
        {"role": "user"},
        [{"content": "x"}],
        ["x"],
        None,
        [{"role": 7, "content": "x"}],
        [{"role": "user", "content": object()}],
    ],
)
def test_what_is_not_a_conversation_is_refused(messages):
    with pytest.raises(RequestError, match="messages"):
        ChatTemplate("x").render(messages)
