"""Learning a byte-level BPE tokenizer from texts."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers, trainers

from headrace.config import require
from headrace.text.tokenizer import Tokenizer

__all__ = ["CHAT_TEMPLATE", "learn_tokenizer"]

CHAT_TEMPLATE = (
    "{% if tools %}"
    "{{ '<|system|>' + (messages[0].content + '\\n\\n' if messages[0].role == 'system' else '') }}"
    "{{ 'You may call these tools:' }}"
    "{% for tool in tools %}{{ '\\n' + (tool.function or tool) | tojson }}{% endfor %}{{ eos_token }}"
    "{% endif %}"
    "{% for message in messages %}"
    "{% if message.role == 'tool' %}"
    "{{ '<|user|><tool_response>\\n' + message.content + '\\n</tool_response>' + eos_token }}"
    "{% elif message.role not in ['system', 'user', 'assistant'] %}"
    "{{ raise_exception('role ' + message.role + ' is not one of system, user, assistant, tool') }}"
    "{% elif not (tools and loop.first and message.role == 'system') %}"
    "{{ '<|' + message.role + '|>' + (message.content or '') }}"
    "{% for call in message.tool_calls or [] %}"
    "{{ '' if loop.first and not message.content else '\\n' }}"
    "{{ '<tool_call>\\n' + {'name': call.function.name, 'arguments': call.function.arguments} | tojson }}"
    "{{ '\\n</tool_call>' }}"
    "{% endfor %}"
    "{{ eos_token }}"
    "{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
"""Turns between tokens. Tools stand in the system's turn, and calls and responses are written as Hermes writes them."""

ROLE_TOKENS = ("<|system|>", "<|user|>", "<|assistant|>")


def learn_tokenizer(texts: Iterable[str], vocab_size: int, eos: str, what: str, source: str) -> Tokenizer:
    """A tokenizer of at most `vocab_size` tokens. Equal arguments give equal tokenizers.

    Digits are single tokens. Id 0 is `eos`, which ends a text and a turn of `CHAT_TEMPLATE`. Error messages
    name the vocabulary's size `what` and the tokenizer `source`.
    """
    special: Sequence[str] = (eos, *ROLE_TOKENS)
    require(
        vocab_size >= 256 + len(special),
        f"{what}={vocab_size} must be at least {256 + len(special)}: one token for every byte, and the special ones",
    )
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(special),
        show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )
    backend.train_from_iterator(texts, trainer)
    return Tokenizer(backend, {"eos_token": eos}, CHAT_TEMPLATE, source=source)
