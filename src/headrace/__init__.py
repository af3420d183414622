"""headrace trains and serves language models with one model definition.

`from headrace import LLM, AsyncLLM, SamplingParams` gives the in-process engine; `headrace --help` lists the commands.
"""

import os
from typing import TYPE_CHECKING, Any

from headrace.errors import CheckpointError, ConfigError, HeadraceError, RequestError

if TYPE_CHECKING:
    from headrace.engine.schedule.constraint import Constraint
    from headrace.engine.schedule.sampling import SamplingParams
    from headrace.llm.async_llm import AsyncLLM
    from headrace.llm.llm import LLM
    from headrace.llm.outputs import CompletionOutput, Logprob, RequestOutput
    from headrace.llm.records import ResumeRecord

__all__ = [
    "LLM",
    "AsyncLLM",
    "CheckpointError",
    "CompletionOutput",
    "ConfigError",
    "Constraint",
    "HeadraceError",
    "Logprob",
    "RequestError",
    "RequestOutput",
    "ResumeRecord",
    "SamplingParams",
    "__version__",
]

__version__ = "0.1.0"

# torch's OpenMP threads spin for milliseconds when they wait, which on a busy machine makes a training step take
# seconds. libgomp reads this variable when it loads, so set it before torch is imported.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")

_HOMES = {
    "LLM": "llm.llm",
    "AsyncLLM": "llm.async_llm",
    "Constraint": "engine.schedule.constraint",
    "SamplingParams": "engine.schedule.sampling",
    "CompletionOutput": "llm.outputs",
    "Logprob": "llm.outputs",
    "RequestOutput": "llm.outputs",
    "ResumeRecord": "llm.records",
}


def __getattr__(name: str) -> Any:
    """Import on first use, so that `headrace --help` does not wait for torch."""
    if name not in _HOMES:
        raise AttributeError(f"module 'headrace' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"headrace.{_HOMES[name]}"), name)
