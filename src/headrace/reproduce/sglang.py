"""SGLang (Zheng et al., 2023): compressed finite-state decoding, as forced tokens of a grammar."""

from __future__ import annotations

import tempfile
from pathlib import Path

from headrace.bench.measure import interleave, seconds
from headrace.bench.models import random_checkpoint
from headrace.bench.profile import profile_answers, profile_schema, walk
from headrace.engine.schedule.constraint import Constraint
from headrace.engine.schedule.sampling import SamplingParams
from headrace.llm.llm import LLM
from headrace.reproduce.setup import ON
from headrace.reproduce.table import Table

__all__ = ["table"]

STREAMS = 4


def table(quick: bool = False) -> Table:
    """The paper's rows, measured now."""
    out = Table("SGLang: Efficient Execution of Structured Language Model Programs", ON)
    constraint = Constraint.json_schema(profile_schema())
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = random_checkpoint("tiny", Path(folder) / "tiny")
        sides = {jump: LLM(checkpoint, jump_forward=jump) for jump in ("together", "stepwise")}
        llm = sides["together"]
        forced, sampled = 0, 0
        for answer in profile_answers():
            ids = llm.tokenizer.encode(answer, add_special_tokens=False)
            counts = walk(llm.frontend.grammars, constraint, ids)
            forced, sampled = forced + counts[0], sampled + counts[1]
        out.add(
            "Passes of the model for a character profile in JSON (byte-level vocabulary of 512)",
            "CE",
            "singular transitions need none",
            f"{forced + sampled} tokens in {sampled} passes: {(forced + sampled) / sampled:.2f}×",
        )
        out.add("Forced tokens together against one a step: the outputs", "CE", "unchanged", same(sides, constraint))
        out.add("Throughput of the same with the jump", "CR", "1.6×", jump(sides, constraint, 1 if quick else 5))
    out.add(
        "Forced text is retokenised",
        "X",
        "after each jump",
        "not done: forced tokens are the tokenizer's own spelling, without a tail that later text could join; "
        "what was given out stays",
    )
    out.add("RadixAttention, the language, API speculation", "later", "up to 6.4× throughput", "not in headrace yet")
    return out


def same(sides: dict[str, LLM], constraint: Constraint) -> str:
    """Whether both sides give the same tokens and log-probabilities."""
    params = [SamplingParams(constraint=constraint, max_tokens=400, seed=i, logprobs=2) for i in range(STREAMS)]
    found = [[output.outputs for output in side.generate(["Once"] * STREAMS, params)] for side in sides.values()]
    return f"equal by == in {STREAMS} of {STREAMS}, with log-probabilities" if found[0] == found[1] else "NOT equal"


def jump(sides: dict[str, LLM], constraint: Constraint, rounds: int) -> str:
    """Throughput of one stream, forced tokens together against one a step."""
    params = SamplingParams(constraint=constraint, max_tokens=400, seed=0)

    def rate(side: LLM) -> float:
        return 1 / seconds(lambda: side.generate("Once", params))

    return interleave(lambda: rate(sides["together"]), lambda: rate(sides["stepwise"]), rounds).verdict
