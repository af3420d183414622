"""Algorithm 1 in the engine: sequences of a pair of models have the target's probabilities, by χ²; mutants do not."""

import itertools
from dataclasses import replace
from typing import Any, NamedTuple

import pytest
import torch

from headrace.bench.models import SHAPES, random_model
from headrace.engine.engine import Engine
from headrace.engine.schedule.request import Request
from headrace.engine.schedule.sampling import SamplingParams
from headrace.kernels.load import load_ops
from headrace.kernels.ops import Ops
from headrace.llm.assemble import assemble
from headrace.llm.options import EngineOptions
from headrace.model.transformer import Transformer
from headrace.reproduce.speculative import PrefixPair, chi_square, direct
from headrace.speculate import rejection, sampling
from headrace.speculate.sampling import DraftSampler

VOCAB, LENGTH, GAMMA = 5, 4, 3
DRAWS = 3000
PROMPT = [3, 1]
RIGHT, WRONG = 1e-4, 1e-6
"""A χ² probability of a right engine is above the one, of a mutant below the other."""
SIZES: dict[str, Any] = {"threads": 1, "num_kv_blocks": 2000, "max_num_batched_tokens": 8192, "max_num_seqs": 1024}


class TinyPair(NamedTuple):
    """Two models, and what they say after every prefix of an output."""

    target: Transformer
    draft: Transformer
    ops: Ops
    known: PrefixPair


def outputs(engine: Engine[Any], requests: list[Request]) -> dict[int, tuple[list[int], list[Any]]]:
    """Tokens and log-probabilities of each request."""
    found: dict[int, tuple[list[int], list[Any]]] = {request.request_id: ([], []) for request in requests}
    for request in requests:
        engine.scheduler.add(request)
    while engine.has_work:
        for update in engine.step():
            tokens, logprobs = found[update.request_id]
            tokens += update.token_ids
            logprobs += update.logprobs
    return found


def after_prefixes(model: Transformer, ops: Ops) -> torch.Tensor:
    """The model's log-probabilities [prefixes, V] after each output of less than `LENGTH` tokens, without drafts."""
    params = SamplingParams(max_tokens=1, logprobs=VOCAB, ignore_eos=True)
    prefixes = [list(prefix) for depth in range(LENGTH) for prefix in itertools.product(range(VOCAB), repeat=depth)]
    engine = assemble(model, ops, EngineOptions(**SIZES))
    found = outputs(engine, [Request(i, PROMPT + prefix, params, seed=0) for i, prefix in enumerate(prefixes)])
    rows = torch.empty(len(prefixes), VOCAB)
    for i, (_, [entry]) in found.items():
        rows[i, entry.top_ids] = torch.tensor(entry.top_logprobs)
    return rows


@pytest.fixture(scope="module")
def pair() -> TinyPair:
    """Of random weights so large that the next token depends on all before; the draft's are a little off."""
    ops = load_ops("cpu", threads=1)
    shape = replace(SHAPES["tiny"], vocab_size=VOCAB, tie_word_embeddings=False)
    models = [random_model(shape, ops, seed=4) for _ in range(2)]
    draw = torch.Generator().manual_seed(7)
    for model, noise in zip(models, (0.0, 0.02)):
        for name, weight in model.named_parameters():
            if "norm" not in name:
                weight.mul_(8.0)
                weight.add_(torch.randn(weight.shape, generator=draw) * noise)
    known = PrefixPair(VOCAB, LENGTH)
    known.logits = (after_prefixes(models[0], ops), after_prefixes(models[1], ops))
    last = known.at(LENGTH - 1)[0].softmax(dim=1).view((VOCAB,) * LENGTH)
    assert all(last.std(dim=place).max() > 0.1 for place in range(LENGTH - 1)), "a token before has no influence"
    return TinyPair(models[0], models[1], ops, known)


def chances(pair: TinyPair, **knobs: float) -> tuple[list[float], float]:
    """χ² probabilities of the tokens of each position, then of whole sequences; the share of drafts accepted."""
    options = EngineOptions(**SIZES, speculate="draft:x", gamma=str(GAMMA), verifier="rejection")
    engine = assemble(pair.target, pair.ops, options, draft=pair.draft)
    params = SamplingParams(max_tokens=LENGTH, ignore_eos=True, **knobs)  # type: ignore[arg-type]
    found = outputs(engine, [Request(i, PROMPT, params, seed=i) for i in range(DRAWS)])
    token_NH = torch.tensor([found[i][0] for i in range(DRAWS)])
    expected = direct(pair.known, **knobs) * DRAWS
    counts = torch.bincount(pair.known.number(token_NH), minlength=VOCAB**LENGTH)
    each = []
    for position in range(LENGTH):
        others = [i for i in range(LENGTH) if i != position]
        seen, wanted = (x.view((VOCAB,) * LENGTH).sum(dim=others) for x in (counts, expected))
        each.append(chi_square(seen, wanted))
    stats = engine.scheduler.stats
    return [*each, chi_square(counts, expected)], stats.accepted_tokens / stats.drafted_tokens


@pytest.mark.parametrize("knobs", [{}, {"top_k": 3}], ids=str)
def test_tokens_have_the_target_s_distribution(pair, knobs):
    found, accepted = chances(pair, **knobs)
    assert min(found) > RIGHT, found
    assert 0.3 < accepted < 0.9, "many drafts are right, and many are replaced"


def one_stream(patch):
    """Draft, acceptance and residual draw from the same noise."""
    for name in ("ACCEPT", "RESIDUAL"):
        patch.setattr(rejection, name, rejection.DRAFT)


def another_place(patch):
    """The distribution of each draft is that of another draft of the step."""
    take = DraftSampler.take

    def turned(self, request_id, position, count):
        q_DV = take(self, request_id, position, count)
        return None if q_DV is None else q_DV.roll(1, dims=0)

    patch.setattr(DraftSampler, "take", turned)


def without_top_k(patch):
    """The distribution that drafts are said to be from is the draft model's before top-k."""
    patch.setattr(sampling, "standardized", lambda logits_RV, params: logits_RV.double().softmax(dim=1))


@pytest.mark.parametrize(("mutant", "knobs"), [(one_stream, {}), (another_place, {}), (without_top_k, {"top_k": 3})])
def test_a_mistake_is_seen(pair, mutant, knobs, monkeypatch):
    mutant(monkeypatch)
    found, _ = chances(pair, **knobs)
    assert min(found) < WRONG, found
