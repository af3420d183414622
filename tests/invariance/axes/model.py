"""The model: one trained on tinyworld for a moment, one random with GQA and qk-norm, one random in bf16."""

from invariance.axis import Axis, Setup


def setup(setup: Setup, model: str) -> None:
    setup.model = model


AXIS = Axis(values=("tinyworld", "gqa-qknorm", "bf16"), setup=setup, question=True)
