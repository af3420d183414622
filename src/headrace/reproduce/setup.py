"""Engines for the papers' files: around one small random model, or without a model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from headrace.bench.models import SHAPES, random_model
from headrace.config import CacheConfig
from headrace.engine.engine import Engine
from headrace.engine.run.null_runner import NullRunner
from headrace.engine.run.runner import Runner
from headrace.engine.schedule.config import SchedulerConfig
from headrace.engine.schedule.scheduler import Scheduler
from headrace.kernels.load import load_ops
from headrace.llm.assemble import assemble
from headrace.llm.options import EngineOptions

__all__ = ["ON", "Bench", "host_engine", "observe"]

ON = 'a random 0.1M-parameter Llama, CPU kernels; host logic alone (no model) where a row says "host"'


class Bench:
    """Makes engines around one random model."""

    def __init__(self, shape: str = "tiny") -> None:
        self.ops = load_ops("cpu")
        self.model = random_model(SHAPES[shape], self.ops)
        self.vocab_size = self.model.config.vocab_size

    def engine(self, **options: Any) -> Engine[Runner]:
        """A fresh engine with an empty cache."""
        return assemble(self.model, self.ops, EngineOptions(**options))


def host_engine(
    num_blocks: int, max_len: int = 4096, block_size: int = 16, prefix_caching: bool = True, **scheduler: Any
) -> Engine[NullRunner]:
    """The real scheduler with a null runner in place of the model."""
    cache = CacheConfig(block_size=block_size, num_blocks=num_blocks, prefix_caching=prefix_caching)
    config = SchedulerConfig(**scheduler)
    return Engine(Scheduler(config, cache, max_len, ()), NullRunner(num_blocks, block_size), config.queue_depth)


def observe(target: Any, method: str, callback: Callable[[Any, Any], object]) -> None:
    """Call `callback(argument, result)` after every call of one object's one-argument method."""
    plain = getattr(target, method)

    def observed(argument: Any) -> Any:
        result = plain(argument)
        callback(argument, result)
        return result

    setattr(target, method, observed)
