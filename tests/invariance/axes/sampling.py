"""How tokens are chosen."""

from headrace.engine.schedule.sampling import SamplingParams
from invariance.axis import TOKENS, Axis, Setup

PARAMS = {
    "greedy": SamplingParams(temperature=0.0, max_tokens=TOKENS, ignore_eos=True),
    "seeded": SamplingParams(temperature=1.1, top_p=0.95, max_tokens=TOKENS, ignore_eos=True),
    "penalised": SamplingParams(
        temperature=0.9,
        repetition_penalty=1.2,
        presence_penalty=0.3,
        frequency_penalty=0.2,
        max_tokens=TOKENS,
        ignore_eos=True,
    ),
}


def setup(setup: Setup, sampling: str) -> None:
    setup.params = PARAMS[sampling]


AXIS = Axis(values=tuple(PARAMS), setup=setup, question=True)
