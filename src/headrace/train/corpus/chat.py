"""A conversation as training data: the chat template's text, and which of its tokens the assistant wrote.

The whole text is tokenized at once, as the server does. To find a turn, the messages before it are rendered with the
generation prompt, and the messages up to and with it without one. The tokens between the two ends count.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np

from headrace.config import require
from headrace.errors import CheckpointError, ConfigError, RequestError
from headrace.text.messages import read_messages
from headrace.text.template_process import TemplateProcess
from headrace.text.tokenizer import Tokenizer

__all__ = ["encode_chat", "messages_of"]


def messages_of(where: str, value: Mapping[str, Any], field: str) -> list[dict[str, Any]]:
    """The messages of a record in templates' form; none where they are null, as a table writes a row without them.

    Raises `ConfigError` that names the record and what is wrong with them.
    """
    require(
        field in value,
        f"{where}: has no field {field!r}; it has {', '.join(map(str, value)) or 'none'}: name the "
        "right one with --messages-field",
    )
    try:
        return [] if value[field] is None else read_messages(value[field], field)
    except RequestError as error:
        raise ConfigError(f"{where}: {error}") from None


def encode_chat(
    tokenizer: Tokenizer,
    messages: Sequence[Mapping[str, Any]],
    where: str,
    tools: Any = None,
    templates: TemplateProcess | None = None,
) -> tuple[np.ndarray, np.ndarray] | None:
    """(ids int64, counts bool) of a conversation: the assistant's turns and the token that ends each count.

    Text after the last of them is left out; without one the result is None. An end token is added where the template
    ends the last turn without one. `templates`: where the template runs; None for this process. Raises `ConfigError`
    that names the record where the messages do not suit the template, or where the template renders a prefix of the
    conversation differently within the whole.
    """
    turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    if not turns:
        return None
    require(turns[0] > 0, f"{where}: the conversation begins with the assistant: there is nothing to reply to")
    messages = messages[: turns[-1] + 1]
    run = tokenizer.apply_chat_template if templates is None else partial(templates.render, tokenizer.chat_template)

    def render(messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool) -> str:
        try:
            return run(messages, add_generation_prompt, tools=tools)
        except (RequestError, CheckpointError) as error:
            raise ConfigError(f"{where}: {error}") from None

    whole = render(messages, False)
    ids = _encode(tokenizer, whole, where)
    counts = np.zeros(len(ids), dtype=bool)
    for turn in turns:
        asked = render(messages[:turn], True)
        answered = render(messages[: turn + 1], False)
        require(
            whole.startswith(answered) and answered.startswith(asked),
            f"{where}: message {turn}: the chat template renders the conversation up to here differently within "
            "the whole, so the assistant's tokens cannot be found: use a template that does not change earlier turns",
        )
        begin, end = (_common(ids, _encode(tokenizer, text, where)) for text in (asked, answered))
        counts[begin : _without_tail(tokenizer, ids, begin, end)] = True
    last = int(np.flatnonzero(counts)[-1]) + 1 if counts[1:].any() else 0
    require(last > 0, f"{where}: the chat template leaves out the assistant's text: use another template")
    return _ended(tokenizer, ids[:last], counts[:last])


def _encode(tokenizer: Tokenizer, text: str, where: str) -> np.ndarray:
    try:
        return np.array(tokenizer.encode(text, add_special_tokens=False), dtype=np.int64)
    except RequestError as error:
        raise ConfigError(f"{where}: {error}") from None


def _without_tail(tokenizer: Tokenizer, ids: np.ndarray, begin: int, end: int) -> int:
    """The end of a turn without the white space that a template writes after its end token."""
    bare = end
    while bare > begin and not tokenizer.decode([int(ids[bare - 1])], skip_special_tokens=False).strip():
        bare -= 1
    return bare if bare > begin and _special(tokenizer, int(ids[bare - 1])) else end


def _special(tokenizer: Tokenizer, token: int) -> bool:
    return tokenizer.decode([token]) == "" != tokenizer.decode([token], skip_special_tokens=False)


def _common(one: np.ndarray, other: np.ndarray) -> int:
    """Length of the common prefix."""
    n = min(len(one), len(other))
    different = np.flatnonzero(one[:n] != other[:n])
    return int(different[0]) if len(different) else n


def _ended(tokenizer: Tokenizer, ids: np.ndarray, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    eos = tokenizer.eos_token_id
    if eos is None or _special(tokenizer, int(ids[-1])):
        return ids, counts
    return np.append(ids, eos), np.append(counts, True)
