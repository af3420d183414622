"""`SuffixProposer`: what followed the last tokens in other requests and in this one, by counts.

Samples of one prompt, and answers to prompts alike, have much text in common, of which none has all (SuffixDecoding,
2411.04975). Prompt lookup sees one request only.
"""

from __future__ import annotations

from headrace.cache.key import CacheKey
from headrace.engine.schedule.request import Request
from headrace.errors import ConfigError
from headrace.speculate.base import Proposal
from headrace.speculate.trie import DEPTH, Strand, SuffixTrie

__all__ = ["SuffixProposer"]

FEWEST_NODES = 1024
"""A trie must have room for a few texts; less is a mistake."""
TAIL = DEPTH
"""Prompt tokens counted at once: they place the output in what other requests said behind the same words."""
BURST = 128
"""Tokens counted in one call at most, about 1 ms. Only a request that comes with its output has more."""
PORTION = 4
"""Tokens of the rest of the prompt counted in one call, so that a long prompt costs each step little."""
TOKENS_PER_NODE = 4
"""Tokens of texts kept for each node: text that is repeated adds tokens and no nodes."""
MOST_DROPPED = 2
"""Dropped tries that wait until their room is needed; more are freed a part at a time all the same."""
STRETCH = 64
"""The rest of a prompt is counted in texts of this length, from the end of the prompt."""
FLOOR = 0.1
"""A draft ends where all of it is right with a smaller chance: what follows would rarely be accepted."""
CANDIDATES = 4
"""Suffixes of the known tokens from which a draft is made in each trie; the best draft is used."""


class _Backlog:
    """Known tokens before those that a request counted at once: `tokens[:low]` are not begun.

    The text being counted holds `tokens[at:]` next. Sequences start in it before `stop`, and it goes on for `DEPTH`
    tokens behind that, so that each sequence is counted once.
    """

    __slots__ = ("at", "grown", "low", "stop", "strand", "turn")

    def __init__(self, low: int) -> None:
        self.low = self.at = self.stop = low
        self.strand: Strand | None = None
        self.turn = 0
        self.grown = 0
        """Nodes that the text added."""


class _Reader:
    """One request: the text that it adds to the newer trie, and its place in the older one."""

    __slots__ = ("backlog", "earlier", "namespace", "seen", "strand", "turn")

    def __init__(self, namespace: CacheKey, seen: int, turn: int, strand: Strand) -> None:
        self.namespace, self.seen, self.turn, self.strand = namespace, seen, turn, strand
        self.earlier: list[int] = []
        """Nodes of the older trie: those of the suffixes of the known tokens."""
        self.backlog: _Backlog | None = None


class SuffixProposer:
    """Counts the tokens of all requests of a namespace in tries of suffixes, and drafts what is likeliest.

    A namespace is a whole cache key: the speed of one salt's requests must not depend on what others said. Only room is
    shared, as in the KV cache. At most `max_nodes` exist: the newer trie grows to half of them; then the older one is
    dropped and the newer takes its place. So what nobody says again is forgotten, at no cost per node, and dropped
    tries are freed a part at a time as room is needed. New weights drop both tries, since only older ones wrote them.
    """

    name = "suffix"

    def __init__(self, max_nodes: int = 1 << 18) -> None:
        if max_nodes < FEWEST_NODES:
            raise ConfigError(f"max_nodes={max_nodes} of the suffix proposer must be at least {FEWEST_NODES}")
        self.max_nodes = max_nodes
        self._newer, self._older = SuffixTrie(), SuffixTrie()
        self._turn = 0
        """How often the tries were replaced."""
        self._dropped: list[SuffixTrie] = []
        self._version = 0
        self._readers: dict[int, _Reader] = {}

    def __len__(self) -> int:
        """Requests that something is kept for."""
        return len(self._readers)

    @property
    def num_nodes(self) -> int:
        """Nodes, roots and texts, those of dropped tries too: never more than `max_nodes`."""
        return self._newer.size + self._older.size + sum(trie.size for trie in self._dropped)

    def wants(self, request: Request) -> bool:
        """See `Proposer`."""
        return True

    def propose(self, request: Request, most: int) -> Proposal:
        """See `Proposer`. `match` is the length of the suffix that the draft follows."""
        reader = self._follow(request)
        chosen: tuple[float, int, list[int]] = (0.0, 0, [])
        if most <= 0:
            return Proposal([])
        for trie, nodes, own in ((self._newer, reader.strand.ends, 1), (self._older, reader.earlier, 0)):
            least, tried = 0, 0
            for node in sorted(nodes, key=trie.depth, reverse=True):
                evidence = trie.evidence(node, own)
                if evidence <= least:
                    continue  # a longer suffix occurred as often, so it was followed by the same
                draft, expected = trie.draft(node, own, most, FLOOR)
                if expected > chosen[0]:
                    chosen = (expected, trie.depth(node), draft)
                least, tried = evidence, tried + 1
                if tried == CANDIDATES:
                    break
        return Proposal(chosen[2], chosen[1])

    def learn(self, request: Request) -> None:
        """See `Proposer`."""
        reader = self._follow(request)
        if reader.backlog is not None:
            self._count_backlog(reader, reader.backlog, request.token_ids)

    def finish(self, request: Request) -> None:
        """See `Proposer`. What the request said stays in the tries, for others."""
        reader = self._readers.get(request.request_id)
        if reader is not None:
            if len(request.token_ids) > reader.seen:
                self._follow(request)
            del self._readers[request.request_id]

    def check_integrity(self) -> None:
        """Raise AssertionError unless the tries are whole and within their room."""
        self._newer.check_integrity()
        self._older.check_integrity()
        assert self.num_nodes <= self.max_nodes, "more nodes than allowed"
        for reader in self._readers.values():
            assert reader.turn <= self._turn, "a reader of a trie to come"

    def _follow(self, request: Request) -> _Reader:
        """The request's reader, up to its last token. It begins anew where tokens were cut off or the key changed."""
        reader, tokens = self._readers.get(request.request_id), request.token_ids
        if reader is None or reader.namespace != request.cache_key or len(tokens) < reader.seen:
            reader = self._begin(request, again=reader is not None)
        self._place(reader)
        for at in range(reader.seen, len(tokens)):
            self._place(reader)
            self._newer.extend(reader.strand, tokens[at])
            if self._older.size:
                reader.earlier = self._older.follow(reader.earlier, reader.namespace, tokens[at])
        reader.seen = len(tokens)
        return reader

    def _place(self, reader: _Reader) -> None:
        """Make room for a token. Where the newer trie has been replaced, the reader begins a text in the new one."""
        self._make_room()
        if reader.turn != self._turn:
            reader.earlier = reader.strand.ends if reader.turn == self._turn - 1 else []
            reader.strand = self._newer.open(reader.namespace)
            reader.turn = self._turn

    def _make_room(self) -> None:
        """Make room for a text and a token of it."""
        count, half = DEPTH + 2, self.max_nodes // 2
        newer = self._newer
        if newer.size + count > half or newer.num_tokens >= half * TOKENS_PER_NODE:
            self._replace(keep=True)
        while self.num_nodes + count > self.max_nodes:
            self._free_part()
        if len(self._dropped) > MOST_DROPPED:
            self._free_part()

    def _replace(self, keep: bool) -> None:
        """Begin a new trie; the newer one becomes the older with `keep`, else it is dropped too."""
        gone = [self._older] if keep else [self._older, self._newer]
        self._dropped.extend(trie for trie in gone if trie.size)
        self._older, self._newer = self._newer if keep else SuffixTrie(), SuffixTrie()
        self._turn += 1 if keep else 2

    def _free_part(self) -> None:
        self._dropped[-1].dismantle()
        if not self._dropped[-1].size:
            self._dropped.pop()

    def _begin(self, request: Request, again: bool) -> _Reader:
        """Start at the end of the prompt, or near the last token where much output is known.

        What is before that is counted later, and once: neither by the other choices of a prompt nor when a request
        begins `again`.
        """
        if request.cache_key.weights_version > self._version:
            self._version = request.cache_key.weights_version
            self._replace(keep=False)
        self._make_room()
        known = len(request.token_ids)
        low = max(request.num_prompt_tokens - TAIL, known - BURST, 0)
        if again:
            low = max(known - DEPTH, 0)
        reader = _Reader(request.cache_key, low, self._turn, self._newer.open(request.cache_key))
        if low and request.parent_id is None and not again:
            reader.backlog = _Backlog(low)
        self._readers[request.request_id] = reader
        return reader

    def _count_backlog(self, reader: _Reader, backlog: _Backlog, tokens: list[int]) -> None:
        """Count `PORTION` tokens of the rest of the prompt.

        It ends at a text that added no nodes: others have said all of it, so probably also what is before it, as with
        a system prompt.
        """
        for _ in range(PORTION):
            self._make_room()
            strand, ended = backlog.strand, backlog.at == min(backlog.stop + DEPTH, len(tokens))
            if strand is None or ended or backlog.turn != self._turn:
                if backlog.low == 0 or (ended and strand is not None and backlog.grown == 0):
                    reader.backlog = None
                    return
                backlog.stop, backlog.low = backlog.low, max(backlog.low - STRETCH, 0)
                backlog.at, backlog.grown, backlog.turn = backlog.low, 0, self._turn
                strand = backlog.strand = self._newer.open(reader.namespace)
            before = self._newer.size
            self._newer.extend(strand, tokens[backlog.at], starts=backlog.at < backlog.stop)
            backlog.grown += self._newer.size - before
            backlog.at += 1
