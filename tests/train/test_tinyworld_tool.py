"""Texts with the tool: conversations as the server renders them, where only some questions need the tool."""

import re
from itertools import islice, pairwise

import pytest

from headrace.dialects.base import AnswerShape, ToolChoice
from headrace.dialects.hermes import HERMES
from headrace.dialects.parser import AnswerParser, Arguments, CallStart, Content
from headrace.dialects.request import described_tools
from headrace.train import tinyworld
from headrace.train.corpus.chat import encode_chat
from headrace.train.corpus.world import encode_document
from headrace.train.tinyworld import FIND, HOME_OF, PEOPLE, PLACES, TOOL

USER, END, ASSISTANT = "<|user|>", "<|end|>", "<|assistant|>"
RESPONSE = re.compile(r"<tool_response>\n(at the (\w+))\n</tool_response>")
ASKS = {words.format(who): (who, words) for who in PEOPLE for words in FIND}
SHAPE = AnswerShape(HERMES, described_tools([TOOL]), ToolChoice("auto"))


@pytest.fixture(scope="module")
def tokenizer():
    return tinyworld.build_tokenizer(512, 0)


@pytest.fixture(scope="module")
def listed(tokenizer):
    """The system's turn of a chat request with the tool."""
    asked = [{"role": "user", "content": "hi"}]
    with_tool, without = (tokenizer.apply_chat_template(asked, tools=tools) for tools in ([TOOL], None))
    assert with_tool.endswith(without)
    return with_tool.removesuffix(without)


@pytest.fixture(scope="module")
def texts():
    return list(islice(tinyworld.documents(0), 12000))


@pytest.fixture(scope="module")
def with_tool(texts, listed):
    return [text for text in texts if text.turns[0][0].startswith(listed)]


def questions(text, listed):
    """(the user's turn, the reply) of each turn."""
    return [
        (prompt.removeprefix(listed).removeprefix(USER).removesuffix(END + ASSISTANT), reply)
        for prompt, reply in text.turns
    ]


def message(reply):
    """What the parser of answers makes of a reply, as an assistant's message."""
    parser = AnswerParser(SHAPE, str)
    parts = [*parser.push(reply), *parser.finish()]
    content = "".join(part.text for part in parts if isinstance(part, Content))
    calls = [
        {"type": "function", "function": {"name": start.name, "arguments": arguments.text}}
        for start, arguments in pairwise(parts)
        if isinstance(start, CallStart) and isinstance(arguments, Arguments)
    ]
    return {"role": "assistant", "content": content, "tool_calls": calls}


def conversation(text, listed):
    messages = []
    for asked, reply in questions(text, listed):
        response = RESPONSE.fullmatch(asked)
        messages.append({"role": "tool", "content": response[1]} if response else {"role": "user", "content": asked})
        messages.append(message(reply))
    return messages


def test_a_text_is_what_the_server_renders_of_its_conversation(with_tool, tokenizer, listed):
    assert len(with_tool) > 400
    for text in with_tool:
        written = "".join(prompt + reply + END for prompt, reply in text.turns)
        messages = conversation(text, listed)
        assert tokenizer.apply_chat_template(messages, add_generation_prompt=False, tools=[TOOL]) == written


def test_its_tokens_are_those_of_chats_as_training_data(with_tool, tokenizer, listed):
    for text in with_tool[:40]:
        found = encode_chat(tokenizer, conversation(text, listed), "x:1", tools=[TOOL])
        assert found is not None
        ids, counts = encode_document(text, tokenizer)
        assert (found[0] == ids).all() and (found[1] == counts).all()


def test_a_call_is_answered_and_then_told(with_tool, listed):
    called = 0
    for text in with_tool:
        turns = questions(text, listed)
        for (asked, reply), (after, told) in pairwise([*turns, ("", "")]):
            calls = message(reply)["tool_calls"]
            response = RESPONSE.fullmatch(after)
            assert bool(calls) == (asked in ASKS) == bool(response)
            if response:
                who, place = ASKS[asked][0], response[2]
                assert calls[0]["function"] == {"name": "find", "arguments": f'{{"who": "{who}"}}'} and len(calls) == 1
                assert told == f"{who} is at the {place}." and place in PLACES
                called += place != HOME_OF[who]
    assert called > 300


def test_nothing_held_out_is_in_a_text(texts, listed):
    """Neither as a question nor as a response of the tool, which tells of a place as a trip does."""
    for text in texts:
        asker = ""
        for asked, _ in questions(text, listed):
            if asked in ASKS:
                assert not tinyworld.held_out(ASKS[asked])
                asker = ASKS[asked][0]
            if response := RESPONSE.fullmatch(asked):
                assert not tinyworld.held_out((asker, "to", response[2]))


def test_whether_to_call_depends_on_the_question_and_on_the_tool(texts, with_tool, listed):
    """With the tool there are questions of every kind; without it there is no call."""
    asked = [asked for text in with_tool for asked, _ in questions(text, listed) if not RESPONSE.fullmatch(asked)]
    needed = sum(question in ASKS for question in asked)
    assert 0.3 < needed / len(asked) < 0.8
    for sign in ("at home", "own", " and ", " went to ", " gave ", "+", "Write as JSON", " has the "):
        assert any(sign in question for question in asked), sign
    unknown = 0
    for text in texts:
        if not text.turns[0][0].startswith(listed):
            for asked, reply in questions(text, listed):
                assert "tool_" not in asked + reply
                assert asked not in ASKS or reply == f"I do not know where {ASKS[asked][0]} is."
                unknown += asked in ASKS
    assert unknown > 300


def test_a_trip_is_asked_in_other_words(texts, listed):
    trips = [asked for text in texts for asked, _ in questions(text, listed) if re.search(r" went to .* now\?$", asked)]
    asks = {trip.split(". ")[1] for trip in trips}
    assert len(asks) == len(PEOPLE) and not asks & ASKS.keys()


def test_the_exam_asks_for_calls(listed):
    asked = [(prompt, answer) for category, prompt, answer in tinyworld.exam(0, 200) if category == "tool"]
    assert len(asked) > 9
    for prompt, answer in asked:
        question = prompt.removeprefix(listed + USER).removesuffix(END + ASSISTANT)
        assert tinyworld.held_out(ASKS[question])
        assert message(answer)["tool_calls"] and message(answer)["content"] == ""
    one = tinyworld.held_out_question("tool")
    assert (one.prompt, one.answer) in asked


def test_a_text_fits_a_row_of_the_demo(with_tool, tokenizer):
    assert max(len(encode_document(text, tokenizer)[0]) for text in with_tool) <= 256
