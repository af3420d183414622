"""`DraftModel`: a small model that drafts, with its KV in a store of its own under the same block numbers."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from headrace.cache.manager import BlockMoves
from headrace.engine.run.runner import Runner
from headrace.engine.schedule.mask import TokenMask
from headrace.engine.schedule.plan import SAMPLE, Plan, Slice
from headrace.engine.schedule.request import Request
from headrace.engine.schedule.speculator import common_prefix

__all__ = ["DraftModel"]


@dataclass(slots=True)
class _Known:
    """What is kept of a request: hashes of its prefixes by block, and how many blocks were found valid."""

    prefixes: list[int] = field(default_factory=lambda: [0])
    """prefixes[i]: of the tokens before block i."""
    blocks: list[int] = field(default_factory=list)
    """The request's live block table when `valid` was counted."""
    valid: int = 0


class DraftModel:
    """Samples drafts with the target's noise and parameters (2211.17192 §2.3, with shared noise), a token a step.

    A block's draft KV is valid as far as its tokens, and those before it, are the request's: that is looked up by
    content, so a prefix that another request drafted for is found, and whatever was freed, swapped or never seen is
    computed when it is needed, in chunks.
    """

    def __init__(
        self, runner: Runner, max_len: int, chunk: int, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        """`runner` has the target's number and size of blocks. `chunk`: most tokens that it catches up in a step."""
        self.runner = runner
        self._size = runner.store.block_size
        self._max_len = max_len
        self._chunk = chunk
        self._clock = clock
        self._held: dict[int, tuple[int, list[int]]] = {}
        """What the KV of a block belongs to: the prefix before it, and its tokens."""
        self._known: dict[int, _Known] = {}
        self._steps = 0

    def behind(self, request: Request) -> int:
        """Known tokens that it must compute to draft one: at least the last, whose row samples."""
        return request.num_tokens - self._computed(request)

    def room(self, request: Request) -> int:
        """Drafts that its context allows behind the known tokens."""
        return self._max_len - request.num_tokens + 1

    def move(self, moves: BlockMoves) -> None:
        """Copy what the target copies. Swapped blocks are computed again: the host keeps the target's alone."""
        if moves.copies:
            self.runner.submit(Plan(self._steps, copies=moves.copies))
            for source, target in moves.copies:
                if source in self._held:
                    self._held[target] = self._held[source]
                else:
                    self._held.pop(target, None)

    def draft(
        self, asked: Sequence[tuple[Request, int]], passed: Callable[[int, float], object] = lambda rows, seconds: None
    ) -> list[list[int]]:
        """`count` drafts for each request, none where it does not catch up in this step; their blocks are allocated.

        `passed` is told the tokens of each pass, and its seconds.
        """
        began = self._clock()
        drafts: list[list[int]] = [[] for _ in asked]
        begun: list[tuple[int, Request, int, TokenMask | None]] = []
        left, slices = self._chunk, []
        for i, (request, count) in enumerate(asked):
            start, end = self._computed(request), request.num_tokens
            taken = min(end - start, left)
            if taken <= 0:
                continue
            left -= taken
            mask = None
            if start + taken == end:
                mask = None if request.mask is None else request.mask.fork()
                begun.append((i, request, count, mask))
            slices.append(self._slice(request, start, start + taken, [], mask))
            self._hold(request, start, start + taken, [])
        while slices:
            rows = sum(len(s.token_ids) for s in slices)
            result = self._run(slices)
            slices = []
            for i, request, count, mask in begun:
                if len(drafts[i]) == count:
                    continue
                [token] = result[request.request_id]
                drafts[i].append(token)
                if mask is not None:
                    mask.accept((token,))
                if len(drafts[i]) < count:
                    end = request.num_tokens + len(drafts[i])
                    slices.append(self._slice(request, end - 1, end, drafts[i], mask))
                    self._hold(request, end - 1, end, drafts[i])
            now = self._clock()
            passed(rows, now - began)
            began = now
        return drafts

    def finish(self, request: Request) -> None:
        """Forget a request. What its blocks hold stays: another may have the same prefix."""
        self._known.pop(request.request_id, None)

    def _run(self, slices: list[Slice]) -> dict[int, list[int]]:
        self._steps += 1
        result = self.runner.result(self.runner.submit(Plan(self._steps, slices)))
        return {number: part.token_ids for number, part in result.slices.items()}

    def _slice(self, request: Request, start: int, end: int, drafts: list[int], mask: TokenMask | None) -> Slice:
        """Positions [start, end) of the known tokens and the drafts; the last samples, if no known one follows it."""
        samples = end >= request.num_tokens
        edits = []
        if samples and request.edits is not None:
            edits = [request.edits.after(request.num_output_tokens, drafts)]
        return Slice(
            request.request_id,
            start,
            _tokens(request, drafts, start, end),
            request.kv.blocks,
            [SAMPLE] if samples else [],
            request.params,
            request.seed,
            request.choice,
            edits,
            mask,
        )

    def _computed(self, request: Request) -> int:
        """How many tokens, from the first, have draft KV; the last known one never counts, as its row samples."""
        known = self._known.setdefault(request.request_id, _Known())
        tokens, blocks, size = request.token_ids, request.kv.blocks, self._size
        prefixes, last = known.prefixes, len(tokens) - 1
        while len(prefixes) <= last // size:
            at = (len(prefixes) - 1) * size
            prefixes.append(hash((prefixes[-1], *tokens[at : at + size])))
        if known.blocks is not blocks:  # after a preemption they are others
            known.blocks, known.valid = blocks, 0
        while known.valid * size < last:
            prefix, held = self._held.get(blocks[known.valid], (None, []))
            if prefix != prefixes[known.valid]:
                break
            at = known.valid * size
            same = common_prefix(held, tokens[at : min(at + size, last)])
            if same < size:
                return at + same
            known.valid += 1
        return min(known.valid * size, last)

    def _hold(self, request: Request, start: int, end: int, drafts: list[int]) -> None:
        """Note that the positions [start, end) of the known tokens and the drafts are computed."""
        prefixes, size = list(self._known[request.request_id].prefixes), self._size
        first = start // size
        while len(prefixes) <= (end - 1) // size:  # the last known token or a draft filled the block before
            at = (len(prefixes) - 1) * size
            prefixes.append(hash((prefixes[-1], *_tokens(request, drafts, at, at + size))))
        for block in range(first, -(-end // size)):
            content = _tokens(request, drafts, block * size, min((block + 1) * size, end))
            self._held[request.kv.blocks[block]] = (prefixes[block], content)


def _tokens(request: Request, drafts: list[int], start: int, end: int) -> list[int]:
    """Positions [start, end) of the known tokens and the drafts behind them; never a copy of all."""
    known = request.num_tokens
    if start >= known:
        return drafts[start - known : end - known]
    found = request.token_ids[start:end]
    return found if end <= known else found + drafts[: end - known]
