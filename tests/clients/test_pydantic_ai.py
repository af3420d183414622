"""Agents of pydantic-ai get valid outputs at the first try, and call a tool before one."""

import pytest

NAMES = ("Mia", "Finn")


@pytest.fixture(scope="module")
def told(clients, server):
    return clients.program("pydantic_ai_calls.py", url=server.url, prompt="What does Mia own?")


@pytest.mark.parametrize("kind", ["by_tool", "native", "found"])
def test_an_output_is_valid_without_a_second_try(told, kind):
    assert told[kind]["name"] in NAMES and 0 <= told[kind]["coins"] <= 99
    assert told["requests"] == [1, 1, 2]


def test_a_tool_is_called_and_its_result_is_sent_back(told):
    [who] = told["calls"]
    assert who in NAMES
    assert told["kinds"] == ["user-prompt", "tool-call", "tool-return", "tool-call", "tool-return"]
