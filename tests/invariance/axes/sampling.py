"""How tokens are chosen."""

from invariance.axis import TOKENS, Axis, Setup

PARAMS = {
    "greedy": {"temperature": 0.0},
    "seeded": {"temperature": 1.1, "top_p": 0.95},
    "penalised": {
        "temperature": 0.9,
        "repetition_penalty": 1.2,
        "presence_penalty": 0.3,
        "frequency_penalty": 0.2,
    },
}


def setup(setup: Setup, sampling: str) -> None:
    setup.params |= {**PARAMS[sampling], "max_tokens": TOKENS, "ignore_eos": True}


AXIS = Axis(values=tuple(PARAMS), setup=setup, question=True)
