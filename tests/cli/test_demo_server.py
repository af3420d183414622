"""What the demo shows over HTTP: a call of the tool where there is one, an error where there must be one."""

import json

import pytest

from headrace.cli import demo_server
from headrace.errors import RequestError
from headrace.train.tinyworld import TOOL

SUMMARY = {"prompt": "One", "reply": " day", "accuracy": 0.95}
FUNCTION = {"name": "find", "arguments": '{"who": "Finn"}'}
CALL = {"id": "call_1", "type": "function", "function": FUNCTION}
CALLED = {"role": "assistant", "content": None, "tool_calls": [CALL]}


class Fake:
    """A server that calls the tool, if `calls`, for the first question alone."""

    def __init__(self, calls=True, text=" day", refuses=False):
        self.calls = calls
        self.text = text
        self.refuses = refuses
        self.asked = []

    def complete(self, model, prompt, fields):
        return {"choices": [{"text": self.text}]}

    def message(self, model, messages, fields):
        if self.refuses:
            raise RequestError("it refuses")
        self.asked.append((messages, fields))
        needed = self.calls and "tools" in fields and "find" in messages[-1]["content"]
        return CALLED if needed else {"role": "assistant", "content": "so", "tool_calls": None}


@pytest.fixture
def show(monkeypatch, capsys):
    """(server, …) → what is printed."""

    def run(fake, once=True, **summary):
        monkeypatch.setattr("headrace.cli.remote.Remote", lambda url: fake)
        demo_server._show("http://x", {**SUMMARY, **summary}, once)
        return capsys.readouterr().out

    return run


def test_a_call_is_answered_and_the_reply_shown(show):
    fake = Fake()
    out = show(fake)
    assert "Where can I find Finn? ↳ calls find with " + FUNCTION["arguments"] in out
    assert "at the garden ↳ so\n  Where does Finn live? ↳ so\nWithout it:\n  Where can I find Finn? ↳ so\n" in out
    (_, offered), (answered, again), (_, home), (_, without) = fake.asked
    assert offered == again == home == {**without, "tools": [TOOL], "tool_choice": "auto"}
    assert answered[1:] == [CALLED, {"role": "tool", "tool_call_id": "call_1", "content": "at the garden"}]
    assert "tools" not in without and json.loads(out.split("-d '")[1].split("'")[0])["prompt"] == "One"


def test_a_trained_model_that_calls_nothing_is_a_bug(show):
    with pytest.raises(RuntimeError, match="calls no tool: a bug in headrace"):
        show(Fake(calls=False))
    assert "Where can I find Finn? ↳ so" in show(Fake(calls=False), accuracy=0.2)
    assert "Where can I find Finn? ↳ so" in show(Fake(calls=False), once=False)


def test_another_reply_is_a_bug(show):
    with pytest.raises(RuntimeError, match="the server answered ' night', not ' day': a bug"):
        show(Fake(text=" night"))


def test_a_server_that_refuses_tools_ends_only_what_runs_once(show):
    """As for the model of an earlier demo, whose template has no tools."""
    assert show(Fake(refuses=True), once=False).endswith("it refuses\n")
    with pytest.raises(RequestError, match="it refuses"):
        show(Fake(refuses=True))
