"""The op set with gradients: what trains."""

from headrace.kernels.autograd.entropy import VocabPart
from headrace.kernels.autograd.ops import AutogradOps, add_bias, causal_attention, head_loss, log_probability
from headrace.kernels.autograd.shards import OutputShards, tree

__all__ = [
    "AutogradOps",
    "OutputShards",
    "VocabPart",
    "add_bias",
    "causal_attention",
    "head_loss",
    "log_probability",
    "tree",
]
