"""`ForcedProposer`: the text that a grammar leaves no choice about, where the engine samples it token by token."""

from __future__ import annotations

from headrace.engine.schedule.request import Request
from headrace.speculate.base import Proposal

__all__ = ["ForcedProposer"]


class ForcedProposer:
    """Proposes the forced text of requests with `jump_forward=False`, in the tokenizer's spelling.

    With `jump_forward` the engine makes that text known without sampling it, so no draft is needed. The model may
    spell the text in other tokens: then the draft is rejected, and the next one starts behind what the model chose.
    """

    name = "forced"

    def wants(self, request: Request) -> bool:
        """See `Proposer`."""
        return request.params.masked and not request.params.jump_forward

    def propose(self, request: Request, most: int) -> Proposal:
        """The first `most` forced tokens. `match` is 0: no earlier tokens lead to them."""
        if request.mask is None or request.params.jump_forward:
            return Proposal([])
        return Proposal(request.mask.forced()[:most])

    def learn(self, request: Request) -> None:
        """Nothing: the request's mask has accepted its tokens."""

    def finish(self, request: Request) -> None:
        """Nothing: the mask goes with its request."""
