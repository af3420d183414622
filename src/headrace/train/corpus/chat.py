"""A conversation as training data: the chat template's text, and which of its tokens the assistant wrote.

The text is tokenized whole, as the server tokenizes it. A turn is found by rendering the messages up to it: with the
generation prompt that is what the model is asked, without it and with the turn itself that is what it should have
answered. The tokens between the two count.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from headrace.config import require
from headrace.errors import CheckpointError, ConfigError, RequestError
from headrace.text.tokenizer import Tokenizer

__all__ = ["encode_chat", "messages_of"]


def messages_of(where: str, value: Mapping[str, Any], field: str) -> list[Mapping[str, Any]]:
    """The messages of a record. Raises `ConfigError` that names the record and what is wrong with them."""
    require(
        field in value,
        f"{where}: has no field {field!r}; it has {', '.join(map(str, value)) or 'none'}: name the "
        "right one with --messages-field",
    )
    messages = value[field]
    require(isinstance(messages, list) and bool(messages), f"{where}: {field} must be a list of messages")
    for number, message in enumerate(messages):
        require(
            isinstance(message, Mapping) and isinstance(message.get("role"), str),
            f"{where}: {field}[{number}] must be an object with a role (a string) and content",
        )
    return messages


def encode_chat(
    tokenizer: Tokenizer, messages: Sequence[Mapping[str, Any]], where: str, tools: Any = None
) -> tuple[np.ndarray, np.ndarray] | None:
    """(ids int64, counts bool) of a conversation: the assistant's turns and the token that ends each count.

    What follows the last of them is left out; without any the result is None. An end token is added where the template
    ends the last turn with none. Raises `ConfigError` that names the record where the messages do not suit the
    template, or the template renders a conversation's beginning otherwise than it renders it in the whole.
    """
    turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    if not turns:
        return None
    require(turns[0] > 0, f"{where}: the conversation begins with the assistant: there is nothing to reply to")
    messages = messages[: turns[-1] + 1]
    whole = _render(tokenizer, messages, False, tools, where)
    ids = _encode(tokenizer, whole, where)
    counts = np.zeros(len(ids), dtype=bool)
    for turn in turns:
        asked = _render(tokenizer, messages[:turn], True, tools, where)
        answered = _render(tokenizer, messages[: turn + 1], False, tools, where)
        require(
            whole.startswith(answered) and answered.startswith(asked),
            f"{where}: message {turn}: the chat template writes the conversation up to here otherwise than it "
            "writes it in the whole, so what the assistant said cannot be told apart: take a template that does "
            "not change earlier turns",
        )
        begin, end = (_common(ids, _encode(tokenizer, text, where)) for text in (asked, answered))
        counts[begin : _without_tail(tokenizer, ids, begin, end)] = True
    last = int(np.flatnonzero(counts)[-1]) + 1 if counts[1:].any() else 0
    require(last > 0, f"{where}: the chat template leaves nothing of what the assistant said")
    return _ended(tokenizer, ids[:last], counts[:last])


def _render(tokenizer: Tokenizer, messages: Sequence[Mapping[str, Any]], prompt: bool, tools: Any, where: str) -> str:
    try:
        return tokenizer.apply_chat_template(messages, add_generation_prompt=prompt, tools=tools)
    except (RequestError, CheckpointError) as error:
        raise ConfigError(f"{where}: {error}") from None


def _encode(tokenizer: Tokenizer, text: str, where: str) -> np.ndarray:
    try:
        return np.array(tokenizer.encode(text, add_special_tokens=False), dtype=np.int64)
    except RequestError as error:
        raise ConfigError(f"{where}: {error}") from None


def _without_tail(tokenizer: Tokenizer, ids: np.ndarray, begin: int, end: int) -> int:
    """Where a turn ends without the white space that a template writes after its end token: no model has to say it."""
    bare = end
    while bare > begin and not tokenizer.decode([int(ids[bare - 1])], skip_special_tokens=False).strip():
        bare -= 1
    return bare if bare > begin and _special(tokenizer, int(ids[bare - 1])) else end


def _special(tokenizer: Tokenizer, token: int) -> bool:
    return tokenizer.decode([token]) == "" != tokenizer.decode([token], skip_special_tokens=False)


def _common(one: np.ndarray, other: np.ndarray) -> int:
    """How many tokens two texts share from their beginnings."""
    n = min(len(one), len(other))
    different = np.flatnonzero(one[:n] != other[:n])
    return int(different[0]) if len(different) else n


def _ended(tokenizer: Tokenizer, ids: np.ndarray, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    eos = tokenizer.eos_token_id
    if eos is None or _special(tokenizer, int(ids[-1])):
        return ids, counts
    return np.append(ids, eos), np.append(counts, True)
