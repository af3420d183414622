"""Learning a byte-level BPE tokenizer from texts."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers, trainers

from headrace.config import require
from headrace.text.tokenizer import Tokenizer

__all__ = ["CHAT_TEMPLATE", "learn_tokenizer"]

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message.role not in ['system', 'user', 'assistant'] %}"
    "{{ raise_exception('role ' + message.role + ' is not one of system, user, assistant') }}{% endif %}"
    "{{ '<|' + message.role + '|>' + message.content + eos_token }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
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
