"""`Parts`: what the endpoints are made over."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

from headrace.serve.errors import NotFoundError
from headrace.serve.gateway import Gateway
from headrace.serve.metrics import ServerMetrics
from headrace.serve.protocol.bodies import Body
from headrace.serve.texts import Texts

__all__ = ["Parts"]


class Parts:
    """One served model: its gateway, its texts, its names and numbers."""

    def __init__(
        self,
        gateway: Gateway,
        texts: Texts,
        metrics: ServerMetrics,
        names: Sequence[str],
        *,
        defaults: Mapping[str, Any],
        priorities: bool,
    ) -> None:
        """`defaults` are sampling parameters; `priorities` is whether the engine schedules by them."""
        self.gateway = gateway
        self.texts = texts
        self.metrics = metrics
        self.names = tuple(names)
        self.defaults = dict(defaults)
        self.priorities = priorities
        self.created = int(time.time())

    @property
    def model_name(self) -> str:
        """The name that answers carry."""
        return self.names[0]

    def check_model(self, body: Body) -> None:
        """`NotFoundError` where a request names another model."""
        name = body.get("model", self.model_name)
        if name not in self.names:
            raise NotFoundError(self.not_served(name), "model")

    def not_served(self, name: str) -> str:
        """What to say of another model's name."""
        shown = name if len(name) <= 100 else name[:100] + "…"
        return f"model {shown!r} is not served here: {' or '.join(map(repr, self.names))} is"
