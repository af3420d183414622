"""`Rejection`: Algorithm 1 (2211.17192 §2.3) keeps or replaces drafts so that tokens are distributed as the target's.

They are not the tokens that the target alone would have drawn with the same seed: only the distribution is the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from headrace.kernels.ops import SampleParams
from headrace.kernels.reference.sample import first_argmax, gumbel, mix, row_keys, sample, uniform
from headrace.kernels.reference.standard import standardized

__all__ = ["ACCEPT", "DRAFT", "RESIDUAL", "Rejection", "acceptance", "draft_params", "residual"]

# A draft was the best of its noise, and a residual token is drawn only after a large uniform number: whoever draws
# twice from one stream draws from what the first draw has left of it, which is biased.
DRAFT = 0x6472616674
ACCEPT = 0x616363657074
RESIDUAL = 0x726573696475616C
"""The streams' constants. The ordinary stream, of `sample` with the parameters as they are, has none."""


@dataclass(frozen=True, slots=True)
class Rejection:
    """Verifies the drafts of a step. A `lenience` below 1 accepts more, and tokens of up to p / lenience (§A.5)."""

    lenience: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.lenience <= 1:
            raise ValueError(f"lenience must be above 0 and at most 1, not {self.lenience}")

    def verify(
        self,
        logits_RV: Tensor,
        params: SampleParams,
        drafts: Sequence[Sequence[int]],
        q: Sequence[Tensor | None],
    ) -> Tensor:
        """The token of each row [R], int64, on the logits' device.

        Group g has γ = len(drafts[g]) drafts and γ + 1 consecutive rows: of the target's logits after edits and
        masks, with `params` whose position is that of the token the row gives. `q[g]` are the probabilities [γ, V]
        that its drafts were drawn from, by `draft_params` and already `standardized`; None is a point mass at each.

        Row i gives draft i where it is accepted, at the first rejected one another token, and what later rows give is
        not to be read: so the first row that differs from its draft is the last of the group. A group's last row, the
        bonus after γ accepted drafts or the token of a group without any, is what `sample` gives with the ordinary
        noise: no other draw at that position has used it. Raises ValueError for shapes and drafts that do not fit.
        """
        _check(logits_RV, params, drafts, q)
        device, vocab_size = logits_RV.device, logits_RV.shape[1]
        token_R = torch.zeros(logits_RV.shape[0], dtype=torch.int64, device=device)
        drafted, last = _rows(drafts)
        token_R[last] = sample(logits_RV[last], params.take(last))
        if not drafted:
            return token_R

        draft_D = torch.tensor([token for group in drafts for token in group], dtype=torch.int64, device=device)
        at_D = torch.tensor(drafted, device=device)
        p_DV = standardized(logits_RV[at_D], params.take(drafted))
        q_DV = _drawn_from(q, draft_D, drafts, vocab_size)
        odds_D = acceptance(p_DV, q_DV, draft_D, self.lenience)
        accepted_D = uniform(_keys(params.take(drafted), ACCEPT).to(device)) < odds_D
        token_R[at_D] = draft_D

        wrong = _first_rejected(accepted_D.tolist(), drafts)
        if wrong:
            rows = [drafted[i] for i in wrong]
            noise_WV = gumbel(_keys(params.take(rows), RESIDUAL).to(device), vocab_size)
            left_WV = residual(p_DV[wrong], q_DV[wrong], self.lenience)
            token_R[rows] = first_argmax(torch.log(left_WV) + noise_WV)
        return token_R


def draft_params(params: SampleParams) -> SampleParams:
    """The parameters with which a draft model draws what `Rejection` verifies: the seed of the draft stream.

    Positions are those of the drafted tokens, as in the rows that verify them.
    """
    return _stream(params, DRAFT)


def acceptance(p_DV: Tensor, q_DV: Tensor, draft_D: Tensor, lenience: float = 1.0) -> Tensor:
    """The probability of keeping each draft [D], fp64: min(1, p(d) / (L·q(d))).

    Where rounding leaves nothing of max(0, p − L·q), p and q are equal but for it: a draft that p allows is then kept,
    so that a rejected draft is never drawn again, and a caller can tell both apart by the token.
    """
    p_D, q_D = (x_DV.double().gather(1, draft_D[:, None])[:, 0] for x_DV in (p_DV, q_DV))
    quotient_D = torch.where(p_D > 0, p_D / (lenience * q_D), 0.0).clamp(max=1.0)
    nothing_left_D = (p_DV.double() <= lenience * q_DV.double()).all(dim=1)
    return torch.where(nothing_left_D & (p_D > 0), 1.0, quotient_D)


def residual(p_WV: Tensor, q_WV: Tensor, lenience: float = 1.0) -> Tensor:
    """The distribution after a rejection [W, V], fp64: norm(max(0, p − L·q)), or p where that is 0 everywhere."""
    p_WV = p_WV.double()
    left_WV = (p_WV - lenience * q_WV.double()).clamp_(min=0.0)
    total_W1 = left_WV.sum(dim=1, keepdim=True)
    return torch.where(total_W1 > 0, left_WV / torch.where(total_W1 > 0, total_W1, 1.0), p_WV)


def _stream(params: SampleParams, constant: int) -> SampleParams:
    """The parameters with another stream's seed, for the same choices and positions."""
    return replace(params, seed_R=mix(params.seed_R.long() ^ constant))


def _keys(params: SampleParams, constant: int) -> Tensor:
    """The keys [R] of a stream's noise."""
    return row_keys(_stream(params, constant).seed_R, params.choice_R, params.position_R)


def _rows(drafts: Sequence[Sequence[int]]) -> tuple[list[int], list[int]]:
    """The rows that verify drafts, and the last row of each group."""
    drafted: list[int] = []
    last: list[int] = []
    row = 0
    for group in drafts:
        drafted.extend(range(row, row + len(group)))
        row += len(group) + 1
        last.append(row - 1)
    return drafted, last


def _drawn_from(
    q: Sequence[Tensor | None], draft_D: Tensor, drafts: Sequence[Sequence[int]], vocab_size: int
) -> Tensor:
    """What all drafts were drawn from, [D, V], fp64: q, or 1 at the draft of a point mass."""
    q_DV = torch.zeros(len(draft_D), vocab_size, dtype=torch.float64, device=draft_D.device)
    start = 0
    for group, given in zip(drafts, q):
        end = start + len(group)
        if given is None:
            q_DV[start:end].scatter_(1, draft_D[start:end, None], 1.0)
        else:
            q_DV[start:end] = given
        start = end
    return q_DV


def _first_rejected(accepted: list[bool], drafts: Sequence[Sequence[int]]) -> list[int]:
    """Of the drafts of all groups, counted through, the first one of each group that is not accepted."""
    found: list[int] = []
    start = 0
    for group in drafts:
        found.extend([i for i in range(start, start + len(group)) if not accepted[i]][:1])
        start += len(group)
    return found


def _check(
    logits_RV: Tensor, params: SampleParams, drafts: Sequence[Sequence[int]], q: Sequence[Tensor | None]
) -> None:
    """Raise ValueError where rows, drafts and distributions do not fit each other."""
    if logits_RV.ndim != 2:
        raise ValueError(f"logits must be [R, V], not {list(logits_RV.shape)}")
    rows, vocab_size = logits_RV.shape
    wanted = sum(len(group) + 1 for group in drafts)
    if rows != wanted:
        raise ValueError(f"{len(drafts)} groups need {wanted} rows of logits, a row more than drafts each, not {rows}")
    for field in fields(SampleParams):
        if getattr(params, field.name).shape != (rows,):
            raise ValueError(f"{field.name} must have {rows} values, as there are rows of logits")
    if len(q) != len(drafts):
        raise ValueError(f"{len(drafts)} groups need {len(drafts)} distributions or None, not {len(q)}")
    for i, (group, given) in enumerate(zip(drafts, q)):
        if not all(0 <= token < vocab_size for token in group):
            raise ValueError(f"a draft of group {i} is not a token of the vocabulary of {vocab_size}: {list(group)}")
        if given is not None and given.shape != (len(group), vocab_size):
            raise ValueError(f"q of group {i} must be {[len(group), vocab_size]}, not {list(given.shape)}")
