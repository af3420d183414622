"""instructor's models are valid at the first try, by tools and by JSON."""

import pytest

MESSAGES = [{"role": "user", "content": "What does Mia own?"}]


@pytest.fixture(scope="module")
def told(clients, server, llm):
    braces = [llm.tokenizer.encode(text, add_special_tokens=False)[0] for text in "{}"]
    return clients.program("instructor_calls.py", url=server.url, messages=MESSAGES, braces=braces)


@pytest.mark.parametrize("mode", ["TOOLS", "TOOLS_STRICT", "JSON_SCHEMA"])
def test_a_model_is_valid_without_a_second_try(told, mode):
    person = told["made"][mode]
    assert person["name"] in ("Mia", "Finn") and 0 <= person["coins"] <= 99 and len(person["things"]) <= 2


def test_a_model_in_parts_ends_as_the_whole_one(told):
    assert told["partial"] == told["made"]["TOOLS"] and told["parts"] > 1


def test_any_object_of_json_mode_is_json(told):
    assert told["note"] == {"text": "nothing"}


def test_an_answer_that_is_cut_is_no_model(told):
    assert told["cut"] == ["IncompleteOutputException"] * 3
