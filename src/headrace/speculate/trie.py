"""`SuffixTrie`: how often each short sequence of tokens occurred in many texts, and what followed it.

    texts "a b c", "a b d"        root ─ a ─ b ┬ c     count(a b) = 2, count(a b c) = 1
                                       │       └ d
                                       ├ b ┬ c
                                       …   └ d

Suffix trees of texts that grow side by side, bounded in depth (SuffixDecoding, 2411.04975). A node exists for a
sequence that occurred at least twice, and for its continuations; what occurred once is a leaf that refers to its text.
So a token of new text costs about one node, not one for each depth.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence

from headrace.cache.key import CacheKey

__all__ = ["DEPTH", "Strand", "SuffixTrie"]

DEPTH = 16
"""Tokens of the longest sequence with a count. Behind it, and behind a leaf, a draft follows the text itself."""
SHARDS = 128
"""Dictionaries of children: one for all would stop a step for milliseconds when it grows or is dropped."""
DOUBT = 1.0
"""A sequence of m tokens counts as if it had once more been followed by something else, DOUBT / m times."""


class Strand:
    """One text of the trie, which may grow.

    `ends` are the nodes of its suffixes: those whose next token is still to be counted.
    """

    __slots__ = ("ends", "index", "root", "token_ids")

    def __init__(self, index: int, root: int) -> None:
        self.token_ids = array("i")
        self.index, self.root = index, root
        self.ends: list[int] = []


class SuffixTrie:
    """Nodes are numbers, and their fields lie in arrays: no objects that a garbage collection must visit.

    Each namespace has its own root, so no node serves two of them. Counts only grow; a trie ends as a whole, by
    `dismantle`, a shard at a time.
    """

    __slots__ = (
        "_best",
        "_count",
        "_depth",
        "_place",
        "_roots",
        "_shards",
        "_strand",
        "_strands",
        "_token",
        "num_tokens",
        "size",
    )

    def __init__(self) -> None:
        self._shards: list[dict[int, int]] = [{} for _ in range(SHARDS)]
        """Children, by (node << 32 | token)."""
        self._roots: dict[CacheKey, int] = {}
        self._strands: list[Strand] = []
        self.size = 0
        """Nodes, roots and texts."""
        self.num_tokens = 0
        """Tokens of the texts."""
        # Node 0 does not exist: as a child it means none.
        self._count, self._best, self._token = array("i", [0]), array("i", [0]), array("i", [0])
        self._depth, self._strand, self._place = array("b", [0]), array("i", [0]), array("i", [0])

    def open(self, namespace: CacheKey) -> Strand:
        """A new, empty text of a namespace. It costs at most two of `size`."""
        root = self._roots.get(namespace)
        if root is None:
            root = self._roots[namespace] = self._node(0, 0, 0, 0)
            self._count[root] = 2  # no leaf
        strand = Strand(len(self._strands), root)
        self._strands.append(strand)
        self.size += 1
        return strand

    def extend(self, strand: Strand, token: int, starts: bool = True) -> None:
        """Count one more token of a text: at most `DEPTH` new nodes. `starts`: whether sequences may start with it."""
        count, best, depth, shards = self._count, self._best, self._depth, self._shards
        strand.token_ids.append(token)
        self.num_tokens += 1
        at, index = len(strand.token_ids), strand.index
        # A leaf among its ends is this text's alone, and implies the token by its place in the text.
        live = [node for node in strand.ends if count[node] > 1]
        if starts:
            live.append(strand.root)
        ends = strand.ends = []
        for node in live:
            child = shards[(node ^ token) % SHARDS].get(node << 32 | token)
            if child is None:
                child = self._add(node, token, index, at)
            else:
                count[child] += 1
                if depth[child] == DEPTH:
                    self._strand[child], self._place[child] = index, at
                elif count[child] == 2:
                    self._unfold(child)
            if count[child] >= count[best[node]]:
                best[node] = child
            if depth[child] < DEPTH:
                ends.append(child)

    def follow(self, nodes: Sequence[int], namespace: CacheKey, token: int) -> list[int]:
        """The nodes of the suffixes that end in `token`, from those before it; counts nothing."""
        found = []
        for node in (*nodes, self._roots.get(namespace, 0)):
            child = self._shards[(node ^ token) % SHARDS].get(node << 32 | token)
            if child is not None and self._depth[child] < DEPTH:
                found.append(child)
        return found

    def draft(self, node: int, own: int, most: int, floor: float) -> tuple[list[int], float]:
        """The likeliest tokens behind `node`, and how many of them are expected to be right.

        It follows the most frequent child while the product of the shares is at least `floor`. `own` is 1 where the
        node's count contains the end of the text that asks.
        """
        count, best, token, depth = self._count, self._best, self._token, self._depth
        drafted: list[int] = []
        chance, expected, context = 1.0, 0.0, depth[node]
        total = count[node] - own
        while count[node] > 1 and depth[node] < DEPTH and len(drafted) < most:
            node = best[node]
            chance *= count[node] / (total + DOUBT / context)
            if chance < floor:  # as where nothing followed: node 0 has count 0
                return drafted, expected
            drafted.append(token[node])
            expected += chance
            context += 1
            total = count[node]
        place = self._place[node]
        for following in self._strands[self._strand[node]].token_ids[place : place + most - len(drafted)]:
            chance *= context / (context + DOUBT)
            if chance < floor:
                break
            drafted.append(following)
            expected += chance
            context += 1
        return drafted, expected

    def evidence(self, node: int, own: int) -> int:
        """How often something followed `node`: its count without the end of the text that asks."""
        return self._count[node] - own

    def depth(self, node: int) -> int:
        """Tokens of the sequence of `node`."""
        return self._depth[node]

    def count(self, namespace: CacheKey, token_ids: Sequence[int]) -> int:
        """How often a sequence is known to have occurred. Below a leaf nothing is counted: 0."""
        node = self._roots.get(namespace, 0)
        for token in token_ids:
            node = self._shards[(node ^ token) % SHARDS].get(node << 32 | token, 0)
        return self._count[node]

    def dismantle(self) -> None:
        """Drop a part of a trie that nobody reads any more."""
        shard = self._shards.pop()
        part = len(self._strands) // (len(self._shards) + 1)
        del self._strands[len(self._strands) - part :]
        self.size = self.size - len(shard) - part if self._shards else 0

    def _node(self, depth: int, token: int, strand: int, place: int) -> int:
        node = len(self._count)
        self._count.append(1)
        self._best.append(0)
        self._token.append(token)
        self._depth.append(depth)
        self._strand.append(strand)
        self._place.append(place)
        self.size += 1
        return node

    def _add(self, parent: int, token: int, strand: int, place: int) -> int:
        """A leaf: a sequence that occurred once, before `place` of a text."""
        node = self._node(self._depth[parent] + 1, token, strand, place)
        self._shards[(parent ^ token) % SHARDS][parent << 32 | token] = node
        return node

    def _unfold(self, node: int) -> None:
        """Give a leaf that occurred again the child that its first text implies.

        Where that text has no next token yet, `node` is among its ends, and the token will be counted when it comes.
        """
        strand, place = self._strands[self._strand[node]], self._place[node]
        if place < len(strand.token_ids):
            child = self._add(node, strand.token_ids[place], strand.index, place + 1)
            self._best[node] = child
            if place + 1 == len(strand.token_ids) and self._depth[child] < DEPTH:
                strand.ends.append(child)

    def check_integrity(self) -> None:
        """Raise AssertionError unless counts, depths, best children and sizes agree."""
        children: dict[int, list[int]] = {}
        for i, shard in enumerate(self._shards):
            for key, child in shard.items():
                parent, token = key >> 32, key & 0xFFFFFFFF
                assert (parent ^ token) % SHARDS == i, "a child in another shard"
                assert token == self._token[child] and self._depth[child] == self._depth[parent] + 1, "a wrong child"
                children.setdefault(parent, []).append(child)
        roots = set(self._roots.values())
        assert self.size == sum(map(len, self._shards)) + len(roots) + len(self._strands), "the size drifted"
        for node in range(1, len(self._count)):
            below = children.get(node, [])
            most = max((self._count[child] for child in below), default=0)
            assert self._count[self._best[node]] == most and (not below or self._best[node] in below), "not the best"
            if node not in roots:
                assert sum(self._count[child] for child in below) <= self._count[node], "children occur more often"
                assert self._count[node] > 1 or not below, "a leaf with children"
                text = self._strands[self._strand[node]].token_ids
                assert text[self._place[node] - 1] == self._token[node], "a leaf that refers to another text"
