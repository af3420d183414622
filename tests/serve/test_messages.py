"""The forms of a conversation that clients send, and the places that refusals name."""

import json

import pytest

TOKENIZE, CHAT = "/tokenize", "/v1/chat/completions"
ASK = {"role": "user", "content": "hi"}
CALLS = [{"id": "1", "type": "function", "function": {"name": "look", "arguments": '{"city": "Rome"}'}}]
CONTINUED = {"continue_final_message": True}
TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}"
    "{% for call in m.tool_calls or [] %}{{ call.function.arguments | tojson }}{% endfor %}{% endfor %}"
)


def rendered(server, messages, **fields):
    answer = server.post(TOKENIZE, messages=messages, **fields)
    assert answer.status_code == 200, answer.text
    return server.post("/detokenize", tokens=answer.json()["tokens"]).json()["prompt"]


@pytest.mark.parametrize("reply", [{"role": "assistant", "content": None}, {"role": "assistant"}])
def test_a_reply_without_content_is_an_empty_text(server, reply):
    empty = [ASK, {"role": "assistant", "content": ""}, ASK]
    assert rendered(server, [ASK, reply, ASK]) == rendered(server, empty)
    answers = [server.post(CHAT, messages=m, max_tokens=4, temperature=0) for m in ([ASK, reply, ASK], empty)]
    assert answers[0].json()["choices"] == answers[1].json()["choices"]


@pytest.mark.parametrize(
    ("message", "text"),
    [
        ({"role": "developer", "content": "be kind"}, "<system>be kind"),
        ({"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}, "<user>a\nb"),
        ({"role": "assistant", "content": None, "tool_calls": CALLS}, '<assistant>{"city": "Rome"}'),
        ({"role": "assistant", "function_call": CALLS[0]["function"]}, '<assistant>{"city": "Rome"}'),
        ({"role": "assistant", "content": "a", "tool_calls": [], "refusal": None}, "<assistant>a"),
    ],
)
def test_a_message_has_one_text_in_all_its_forms(server, message, text):
    assert rendered(server, [message], chat_template=TEMPLATE) == text


def test_a_final_message_in_parts_is_continued_and_echoed(server):
    parts = [{"type": "text", "text": "once "}, {"type": "text", "text": "upon"}]
    fields = {**CONTINUED, "max_tokens": 4, "temperature": 0, "echo": True}
    texts = [
        server.post(CHAT, messages=[ASK, {"role": "assistant", "content": content}], **fields).json()["choices"]
        for content in ("once \nupon", parts)
    ]
    assert texts[0] == texts[1] and texts[0][0]["message"]["content"].startswith("once \nupon")


@pytest.mark.parametrize(
    "continued", [{}, {"continue_final_message": True}, {"continue_final_message": True, "echo": True}]
)
@pytest.mark.parametrize(
    ("message", "place"),
    [
        ({"role": "user", "content": 5}, "messages[1].content must be text or a list of text parts"),
        ({"role": "user", "content": [{"type": "image_url"}]}, "messages[1].content[0] is not a text part"),
        ({"content": "a"}, "messages[1] must be an object with a role"),
        (
            {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]},
            "messages[1].tool_calls[0].function.arguments must be a JSON object",
        ),
    ],
)
def test_a_message_that_cannot_be_read_is_named(server, message, place, continued):
    answer = server.post(CHAT, messages=[ASK, message], max_tokens=1, **continued)
    error = answer.json()["error"]
    assert answer.status_code == 400 and error["param"].startswith("messages"), json.dumps(error)
    assert error["message"].startswith(place)
