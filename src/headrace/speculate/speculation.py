"""`Speculation`: the engine's `Speculator`, made of proposers, a draft model and a policy of γ."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from headrace.cache.manager import BlockMoves
from headrace.engine.schedule.request import Request
from headrace.engine.schedule.speculator import Candidate, common_prefix
from headrace.speculate.base import DRAFT, LONGEST, Gamma, Offer, Proposal, Proposer
from headrace.speculate.draft import DraftModel

__all__ = ["Speculation"]


@dataclass(slots=True)
class _Watched:
    """A proposal whose tokens are compared with those that come, whether they were drafted or not."""

    offer: Offer
    token_ids: list[int]
    known: int
    """The request's tokens when it was made."""


class Speculation:
    """Drafts by the first proposer that has something to say, else by the draft model; γ by a policy.

    A proposal costs next to nothing, and is right or wrong whether or not it is computed. So the policy learns from
    every one, and needs no probes where drafts do not pay.
    """

    def __init__(
        self,
        proposers: Sequence[Proposer],
        gamma: Gamma,
        draft_model: DraftModel | None = None,
    ) -> None:
        self._proposers = proposers
        self._gamma = gamma
        self._draft_model = draft_model
        self._offers: dict[int, Offer] = {}
        """Of the step being planned or in flight, by request."""
        self._proposals: dict[int, Proposal | None] = {}
        """The latest of each request; None where the draft model drafts."""
        self._watched: dict[int, list[_Watched]] = {}

    def wants(self, request: Request) -> bool:
        """See `Speculator`."""
        if request.is_beam:
            return False
        return self._draft_model is not None or any(proposer.wants(request) for proposer in self._proposers)

    def choose(self, candidates: Sequence[Candidate], rows: int, spare: int) -> list[int]:
        """See `Speculator`."""
        found = [(i, offer) for i, c in enumerate(candidates) if (offer := self._offer(c)) is not None]
        counts = [0] * len(candidates)
        offers = [offer for _, offer in found]
        for (i, offer), count in zip(found, self._gamma.choose(offers, rows, spare)):
            counts[i] = count
            request, proposal = candidates[i].request, self._proposals[offer.request_id]
            self._offers[offer.request_id] = offer
            if proposal is not None:  # each step's: of those that wait for tokens, most are right
                watched = self._watched.setdefault(offer.request_id, [])
                watched.append(_Watched(offer, proposal.token_ids, request.num_tokens))
        return counts

    def _offer(self, candidate: Candidate) -> Offer | None:
        request, most = candidate.request, min(candidate.most, LONGEST)
        for proposer in self._proposers:
            found = proposer.propose(request, most)
            if found.token_ids:
                self._proposals[request.request_id] = found
                return Offer(request.request_id, proposer.name, found.match, len(found.token_ids))
        self._proposals[request.request_id] = None
        if self._draft_model is not None and (most := min(most, self._draft_model.room(request))) > 0:
            return Offer(request.request_id, DRAFT, 0, most, self._draft_model.behind(request))
        return None

    def propose(self, candidates: Sequence[Candidate], counts: Sequence[int], moves: BlockMoves) -> list[list[int]]:
        """See `Speculator`."""
        drafts: list[list[int]] = [[] for _ in candidates]
        asked = []
        for i, (candidate, count) in enumerate(zip(candidates, counts)):
            proposal = self._proposals[candidate.request.request_id]
            if proposal is None:
                asked.append((i, candidate.request, count))
            else:
                drafts[i] = proposal.token_ids[:count]
        if self._draft_model is not None:
            self._draft_model.move(moves)
            made = self._draft_model.draft([(request, count) for _, request, count in asked], self._gamma.passed)
            for (i, _, _), tokens in zip(asked, made):
                drafts[i] = tokens
        return drafts

    def began(self, rows: int) -> None:
        """See `Speculator`."""
        self._gamma.began(rows)

    def ended(self, rows: int) -> None:
        """See `Speculator`."""
        self._gamma.ended(rows)

    def learn(self, request: Request, drafts: Sequence[int], accepted: int) -> None:
        """See `Speculator`."""
        for proposer in self._proposers:
            proposer.learn(request)
        offer = self._offers.pop(request.request_id, None)
        if offer is not None and offer.proposer == DRAFT and drafts:
            self._gamma.learn(offer, accepted, accepted < len(drafts) and request.closing is None)
        watched = self._watched.get(request.request_id)
        if watched:
            self._watched[request.request_id] = [item for item in watched if not self._resolved(request, item)]

    def waits(self, request: Request) -> bool:
        """See `Speculator`."""
        return self.wants(request) and self._gamma.waits()

    def _resolved(self, request: Request, watched: _Watched) -> bool:
        """Whether the tokens that came decide what a proposal was worth; γ's policy then learns it."""
        came = request.token_ids[watched.known : watched.known + len(watched.token_ids)]
        right = common_prefix(came, watched.token_ids)
        if right == len(came) < len(watched.token_ids):
            return False
        self._gamma.learn(watched.offer, right, right < len(came))
        return True

    def finish(self, request: Request) -> None:
        """See `Speculator`."""
        number = request.request_id
        for kept in (self._watched, self._offers, self._proposals):
            kept.pop(number, None)
        for proposer in self._proposers:
            proposer.finish(request)
        if self._draft_model is not None:
            self._draft_model.finish(request)
        self._gamma.finish(number)
