"""`NullRunner`: runs plans without a model. Its KV is a hash of the prefix, so a wrong block changes tokens.

Each token slot holds the hash of the tokens up to its position, made from the hash in the slot before it,
read through the block table as attention reads it. A sampled token is a function of that hash and the request's
own parameters. Aliased blocks, late copies, prefixes shared too early and lost swaps all change tokens. With
`check=True` every slot of every prefix is also verified in `submit`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from headrace.engine.run.masks import fill_rows
from headrace.engine.schedule.plan import (
    PREVIOUS,
    SAMPLE,
    LogitEdits,
    Plan,
    Slice,
    SliceResult,
    StepResult,
    TokenLogprobs,
)

__all__ = ["NullHandle", "NullRunner"]

_MASK = (1 << 61) - 1
_EMPTY = (-1, 0, 0)


def _mix(a: int, b: int) -> int:
    x = (a * 0x9E3779B97F4A7C1 + b + 0x51_7C_C1_B7) & _MASK
    return (x ^ (x >> 29)) * 0xBF58476D1CE4E5 & _MASK


@dataclass(slots=True)
class NullHandle:
    """A submitted step, with its result inside."""

    result: StepResult


class NullRunner:
    """A runner of `num_blocks` blocks of `block_size` tokens, `host_slots` slots and a small vocabulary."""

    def __init__(
        self, num_blocks: int, block_size: int, host_slots: int = 0, vocab_size: int = 97, check: bool = False
    ) -> None:
        self.block_size = block_size
        self.vocab_size = vocab_size
        self.check = check
        self._slots: list[tuple[int, int, int]] = [_EMPTY] * (num_blocks * block_size)
        """(position, hash before, hash after) of the token each slot holds."""
        self._host: list[list[tuple[int, int, int]]] = [[] for _ in range(host_slots)]
        self._last: dict[int, int] = {}

    def submit(self, plan: Plan) -> NullHandle:
        """Run a plan. It is read completely before this returns."""
        for block, slot in plan.swap_out:
            self._host[slot] = self._read(block)
        for slot, block in plan.swap_in:
            self._write(block, self._host[slot])
        for source, target in plan.copies:
            self._write(target, self._read(source))
        after = [self._store(s) for s in plan.slices]  # every slice writes before any reads, as in a layer
        if self.check:
            for s in plan.slices:
                self._verify(s)
        result = StepResult(plan.step)
        for s, hashes in zip(plan.slices, after):
            result.slices[s.request_id] = self._outcome(s, hashes)
        return NullHandle(result)

    def result(self, handle: NullHandle) -> StepResult:
        """The step's result."""
        return handle.result

    def logprob(self, state: int, token: int) -> float:
        """A made-up log-probability of `token` after the prefix with hash `state`."""
        return -(_mix(state, token) % 4001 + 1) / 500.0

    def state(self, token_ids: Sequence[int]) -> int:
        """The hash of a prefix."""
        state = 0
        for token in token_ids:
            state = _mix(state, token + 1)
        return state

    def sample(
        self, state: int, seed: int, choice: int, edits: LogitEdits | None = None, allowed: Sequence[int] | None = None
    ) -> int:
        """The token after the prefix with hash `state`, for a request's own parameters."""
        noise = _mix(_mix(state, seed), choice)
        banned: set[int] = set()
        if edits is not None:
            for token, divide, add in zip(edits.token_ids, edits.divide, edits.add):
                if add == float("-inf"):
                    banned.add(token)
                elif add or divide != 1.0:
                    noise += hash((token, divide, add))
        tokens = allowed if allowed is not None else range(self.vocab_size)
        for probe in range(4 * self.vocab_size):
            token = tokens[_mix(noise, probe) % len(tokens)]
            if token not in banned:
                return token
        return tokens[0]

    def _read(self, block: int) -> list[tuple[int, int, int]]:
        assert block > 0, "the null block was read"
        return self._slots[block * self.block_size : (block + 1) * self.block_size]

    def _write(self, block: int, content: list[tuple[int, int, int]]) -> None:
        assert block > 0, "the null block was written"
        self._slots[block * self.block_size : (block + 1) * self.block_size] = content

    def _tokens(self, s: Slice) -> list[int]:
        if s.token_ids[-1] != PREVIOUS:
            return s.token_ids
        if s.request_id not in self._last:
            raise RuntimeError(f"request {s.request_id} has no token from an earlier plan for PREVIOUS")
        return [*s.token_ids[:-1], self._last[s.request_id]]

    def _before(self, s: Slice) -> int:
        if s.start == 0:
            return 0
        at = s.start - 1
        return self._slots[s.block_table[at // self.block_size] * self.block_size + at % self.block_size][2]

    def _store(self, s: Slice) -> list[int]:
        """Write the slice's tokens; returns the hash before it and after each of them."""
        size, table = self.block_size, s.block_table
        states = [self._before(s)]
        for at, token in enumerate(self._tokens(s), s.start):
            state = _mix(states[-1], token + 1)
            self._slots[table[at // size] * size + at % size] = (at, states[-1], state)
            states.append(state)
        return states

    def _verify(self, s: Slice) -> None:
        """Every slot of the prefix must hold this position and follow from the slot before it."""
        size, before = self.block_size, 0
        for at in range(s.start + len(s.token_ids)):
            position, prior, state = self._slots[s.block_table[at // size] * size + at % size]
            assert position == at, f"request {s.request_id} position {at}: its slot holds position {position}"
            assert prior == before, f"request {s.request_id} position {at}: its slot follows another prefix"
            before = state

    def _outcome(self, s: Slice, states: list[int]) -> SliceResult:
        """Score and sample the last rows."""
        got = SliceResult([])
        rows = states[len(states) - len(s.targets) :]
        sampling = [state for state, target in zip(rows, s.targets) if target == SAMPLE]
        edits = s.edits or [None] * len(sampling)
        masks: list[Sequence[int] | None] = [s.params.allowed_token_ids] * len(sampling)
        if s.mask is not None:
            words_NW = np.zeros((len(sampling), -(-self.vocab_size // 32)), np.uint32)
            fill_rows(s, words_NW)
            masks = [self._allowed(words_W) for words_W in words_NW]
        got.token_ids = [
            self.sample(state, s.seed, s.choice, edit, allowed) for state, edit, allowed in zip(sampling, edits, masks)
        ]
        if got.token_ids:
            self._last[s.request_id] = got.token_ids[-1]
        if s.top is not None:
            scored = [(state, target) for state, target in zip(rows, s.targets) if target != SAMPLE]
            got.scores = [self._logprobs(state, target, s.top) for state, target in scored]
            got.logprobs = [self._logprobs(state, token, s.top) for state, token in zip(sampling, got.token_ids)]
        return got

    def _allowed(self, words_W: np.ndarray) -> list[int]:
        bits = np.unpackbits(words_W.view(np.uint8), bitorder="little")[: self.vocab_size]
        return [int(token) for token in np.flatnonzero(bits)]

    def _logprobs(self, state: int, token: int, top: int) -> TokenLogprobs:
        ranked = sorted(range(self.vocab_size), key=lambda t: (-self.logprob(state, t), t))
        best = ranked[:top]
        return TokenLogprobs(
            token, self.logprob(state, token), 1 + ranked.index(token), best, [self.logprob(state, t) for t in best]
        )
