"""The op set with gradients: what trains."""

from headrace.kernels.autograd.entropy import VocabPart
from headrace.kernels.autograd.ops import AutogradOps, add_bias, causal_attention, head_loss, log_probability

__all__ = [
    "AutogradOps",
    "VocabPart",
    "add_bias",
    "causal_attention",
    "head_loss",
    "log_probability",
]
