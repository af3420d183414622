"""Chat templates in a process that is stopped at its limits, however a conversation comes."""

import gc
import os
import signal
from types import MappingProxyType
from typing import Any

import pytest

from headrace.errors import CheckpointError, RequestError
from headrace.text.chat import ChatTemplate
from headrace.text.template_process import TemplateProcess

MESSAGES = [{"role": "user", "content": "hello"}]
PLAIN = ChatTemplate(
    "{{ bos_token }}{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}", {"bos_token": "<s>"}
)
ENDLESS = ChatTemplate("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}")


@pytest.fixture
def templates():
    with TemplateProcess(0.5) as process:
        yield process


def alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_it_renders_what_the_template_renders(templates):
    named = ChatTemplate({"default": "plain", "tool_use": "{{ tools | tojson }}{{ add_generation_prompt }}"})
    assert templates.pid is None
    assert templates.render(PLAIN, MESSAGES) == PLAIN.render(MESSAGES) == "<s><user>hello"
    pid = templates.pid
    assert templates.render(named, MESSAGES) == "plain"
    assert templates.render(named, MESSAGES, False, '[{"name": "é"}]') == '[{"name": "é"}]False'
    assert templates.render(PLAIN, (MappingProxyType(MESSAGES[0]),)) == "<s><user>hello"
    assert templates.pid == pid
    long = "words " * 500_000
    assert templates.render(PLAIN, [{"role": "user", "content": long}]) == f"<s><user>{long}"


def test_a_template_at_its_limit_is_stopped_and_the_next_one_works(templates):
    templates.start()
    pid = templates.pid
    with pytest.raises(CheckpointError, match=r"the chat template took longer than 0\.5 s and was stopped"):
        templates.render(ENDLESS, MESSAGES)
    assert not alive(pid)
    with pytest.raises(CheckpointError, match="writes more than"):
        templates.render(ChatTemplate("{% for i in range(60000) %}{{ 'a' * 1000 }}{% endfor %}"), MESSAGES)
    assert templates.render(PLAIN, MESSAGES) == "<s><user>hello"


@pytest.mark.parametrize(
    ("source", "messages", "says"),
    [
        ("{{ raise_exception('no thanks') }}", MESSAGES, "refuses them: no thanks"),
        ("x", [], "messages must be a list of messages"),
        ("x", [{"role": "user", "content": object()}], "messages: a chat template takes plain JSON values: object"),
    ],
)
def test_messages_at_fault_are_named(templates, source, messages, says):
    with pytest.raises(RequestError, match=says):
        templates.render(ChatTemplate(source), messages)


def test_messages_nested_too_deeply_are_named(templates):
    nested: list[Any] = []
    for _ in range(100_000):
        nested = [nested]
    with pytest.raises(RequestError, match=r"^messages: a chat template takes plain JSON values"):
        templates.render(PLAIN, [{"role": "user", "content": "a", "x": nested}])


def test_a_process_that_dies_is_replaced(templates):
    templates.start()
    pid = templates.pid
    os.kill(pid, signal.SIGKILL)
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    assert templates.render(PLAIN, MESSAGES) == "<s><user>hello"
    assert templates.pid != pid


def test_the_process_ends_with_its_owner():
    templates = TemplateProcess()
    templates.start()
    pid = templates.pid
    del templates
    gc.collect()
    assert not alive(pid)
