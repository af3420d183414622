"""Dynamic loss scaling, which keeps small gradients from vanishing in float16."""

from __future__ import annotations

from typing import Any

from headrace.errors import ConfigError
from headrace.train.config import TrainConfig

__all__ = ["LossScale"]

GROWTH, BACKOFF = 2.0, 0.5


class LossScale:
    """The factor on the loss, a power of two; always 1 where `active` is false.

    It grows after `train.loss_scale_steps` steps in a row with finite gradients, and shrinks after one without.
    """

    def __init__(self, config: TrainConfig, active: bool) -> None:
        self.active = active
        self.value = config.loss_scale if active else 1.0
        self._every = config.loss_scale_steps
        self._good = 0

    def good(self) -> None:
        """Record a step with finite gradients."""
        self._good += 1
        if self.active and self._good == self._every:
            self.value *= GROWTH
            self._good = 0

    def overflow(self) -> None:
        """Record a step without finite gradients. Raises `ConfigError` where the scale cannot be reduced."""
        self._good = 0
        if not self.active or self.value <= 1.0:
            raise ConfigError("the gradients are not finite" + (" at a loss scale of 1" if self.active else ""))
        self.value *= BACKOFF

    def state(self) -> dict[str, Any]:
        """JSON values for a snapshot."""
        return {"value": self.value, "good": self._good}

    def restore(self, state: dict[str, Any]) -> None:
        """Continue from `state`."""
        self.value, self._good = float(state["value"]), int(state["good"])
