"""`TokenMask`: which tokens may come next. The engine asks; a room above builds it from a request's parameters."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import TYPE_CHECKING, Protocol

from headrace.engine.schedule.sampling import SamplingParams
from headrace.errors import RequestError

if TYPE_CHECKING:
    import numpy as np

__all__ = ["MaskFactory", "TokenMask", "no_masks", "replay"]


class TokenMask(Protocol):
    """What a request's output may go on with: a state of one output, which only the request's scheduler advances."""

    @property
    def ended(self) -> bool:
        """Whether the output is complete and nothing may follow it."""
        ...

    @property
    def failed(self) -> str | None:
        """Why the output cannot go on: nothing is allowed, or a limit is exceeded. None where nothing says so yet."""
        ...

    def fill(self, words_W: np.ndarray) -> None:
        """Set uint32 `words_W` so that bit (id & 31) of word id >> 5 says whether token id may come next.

        Another thread may call it, while nothing else uses the mask. Where nothing may come, `failed` says so and every
        bit is set: the token that is sampled does not count.
        """
        ...

    def accept(self, tokens: Sequence[int]) -> None:
        """Go on behind `tokens`; sets `failed` where they are not allowed."""
        ...

    def forced(self) -> list[int]:
        """The tokens of the text that must come next, spelled as the tokenizer does; empty where there is a choice."""
        ...

    def allows(self, tokens: Sequence[int]) -> int:
        """How many of these tokens, from the first on, may follow; one that ends the output only as the first."""
        ...

    def fork(self) -> TokenMask:
        """An independent mask in the same state."""
        ...


MaskFactory = Callable[[SamplingParams, Collection[int]], TokenMask]
"""The mask of a new request with these parameters; of the tokens given, one ends the output where it may end."""


def no_masks(params: SamplingParams, stop_ids: Collection[int]) -> TokenMask:
    """The factory of an engine without grammars."""
    raise RequestError.about("constraint", "{constraint}: this engine was made without grammars")


def replay(mask: TokenMask, output: Sequence[int], jump: bool) -> list[int]:
    """Bring a new mask behind `output`; returns the forced tokens that follow. With `jump` false nothing is forced.

    The walk is that of the engine which gave the output, so a run of forced tokens that was cut goes on as it was.
    Raises `RequestError` where the output is none of this mask.
    """
    known = 0
    while True:
        run = mask.forced() if jump else []
        mask.accept(run)
        ahead = list(output[known : known + len(run)])
        known += len(ahead)
        if ahead == run[: len(ahead)] and known == len(output):
            return run[len(ahead) :]
        if ahead != run or mask.failed:
            break
        mask.accept(output[known : known + 1])
        known += 1
    raise RequestError("the resume record is broken: its output does not satisfy its constraint")
