"""Calls that the parser reads are rendered by the template as the model wrote them."""

from typing import Any

import pytest

from dialects.dialect_kit import Answer, accepts, answer, shape_of
from dialects.template_kit import LLAMA, MISTRAL, THINKING
from headrace.dialects.choose import choose_dialect
from headrace.text.chat import ChatTemplate

ASKED = [{"role": "user", "content": "How is the weather?"}]
CITY = '{"city": "Łódź \\"{]\\\\", "days": [1, 2]}'
ONE = '<tool_call>\n{"name": "get_weather", "arguments": ' + CITY + "}\n</tool_call>"
TWO = ONE + '\n<tool_call>\n{"name": "get", "arguments": {}}\n</tool_call>'


def message(found: Answer) -> dict[str, Any]:
    """The answer as a client sends it back."""
    calls = [
        {"id": call_id, "type": "function", "function": {"name": name, "arguments": text}}
        for call_id, (name, text) in zip(found.ids, found.calls, strict=True)
    ]
    sent = {"role": "assistant", "content": found.content or None, "tool_calls": calls}
    return sent | ({"reasoning_content": found.reasoning} if found.reasoning else {})


def rendered(source: str, text: str) -> str:
    """The prompt with the answer in its history."""
    dialect = choose_dialect(source)
    assert dialect is not None
    shape = shape_of(dialect, reasoning="may begin")
    assert accepts(shape, text)
    return ChatTemplate(source).render([*ASKED, message(answer(shape, text))], add_generation_prompt=False)


CASES = {
    "llama": (LLAMA, '{"name": "get_weather", "parameters": ' + CITY + "}"),
    "mistral": (
        MISTRAL,
        '[TOOL_CALLS] [{"name": "get_weather", "arguments": ' + CITY + '}, {"name": "get", "arguments": {}}]',
    ),
    "thinking": (THINKING, "<think>\nLet me see.\n</think>\n\n" + TWO),
    "thinking, with text": (THINKING, "<think>\nLet me see.\n</think>\n\nA moment.\n" + ONE),
}


@pytest.mark.parametrize("name", CASES)
def test_history_is_what_the_model_wrote(name):
    source, text = CASES[name]
    assert rendered(source, text).startswith(ChatTemplate(source).render(ASKED) + text)


@pytest.mark.parametrize("text", [ONE, TWO, "A moment.\n" + TWO])
def test_history_of_a_real_template(data_dir, text):
    source = (data_dir / "tokenizers/chat_templates/chat_templates/qwen2.5-instruct.jinja").read_text()
    assert rendered(source, text).startswith(ChatTemplate(source).render(ASKED) + text + "<|im_end|>")
