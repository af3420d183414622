"""Where each token of a text stands in it.

Offsets count characters. Tokens that are parts of one character stand where it does; a token that shows nothing, as the
one that starts a text, stands where the following text does.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from headrace.text.tokenizer import Tokenizer

__all__ = ["TokenPlace", "places_of_ids", "places_of_text"]


class TokenPlace(NamedTuple):
    """One token's place. A token that `opens` a text, or a part after a special token, shows no first space."""

    offset: int
    opens: bool


def places_of_ids(tokenizer: Tokenizer, ids: Sequence[int], goes_on: bool = False) -> tuple[str, list[TokenPlace]]:
    """The text of ids, special tokens included, and each one's place in it.

    Where the text `goes_on`, a character that is not complete is left to what follows.
    """
    stream = tokenizer.detokenizer(skip_special_tokens=False)
    places = []
    for token_id in ids:
        places.append(TokenPlace(*stream.place(token_id)))
        stream.push((token_id,))
    if goes_on:
        stream.settle()
    else:
        stream.flush()
    return stream.text, places


def places_of_text(
    tokenizer: Tokenizer, text: str, ids: Sequence[int], spans: Sequence[tuple[int, int]]
) -> list[TokenPlace]:
    """The places in `text` of the ids that it became.

    `spans` are the tokenizer's. They are where a token ends, but leave out a space that belongs to it, or give it one
    that the tokenizer put before the text.
    """
    places: list[TokenPlace] = []
    least = done = 0
    for token_id, (start, end) in zip(ids, spans):
        shown = tokenizer.token_text(token_id), tokenizer.token_text(token_id, opens=True)
        for opens, token in enumerate(shown):
            found = [at for at in (end - len(token), done) if token and at >= least and text.startswith(token, at)]
            if found:
                place = TokenPlace(found[0], bool(opens))
                break
        else:
            place = TokenPlace(max(least, min(start, done) if start < end else done), opens=not shown[1])
        places.append(place)
        least, done = place.offset, max(done, end)
    return places
