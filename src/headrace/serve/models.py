"""`ModelDirectory`: what a model's name in a request leads to."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from headrace.serve.errors import NotFoundError
from headrace.serve.gateway import Gateway
from headrace.serve.protocol.bodies import Body
from headrace.serve.text_service import TextService
from headrace.serve.trials import ConstraintTrials

__all__ = ["ModelDirectory", "ServedModel"]


class ServedModel:
    """One model as the endpoints need it."""

    def __init__(
        self,
        gateway: Gateway,
        text: TextService,
        trials: ConstraintTrials,
        names: Sequence[str],
        *,
        defaults: Mapping[str, Any],
        priorities: bool,
        tool_format: str | None = None,
    ) -> None:
        """`defaults` are sampling parameters; `priorities` is whether the engine schedules by priority.

        `tool_format` names the dialect of its tool calls, where its chat template does not decide.
        """
        self.gateway = gateway
        self.text = text
        self.trials = trials
        self.tool_format = tool_format
        self.names = tuple(names)
        self.defaults = dict(defaults)
        self.priorities = priorities
        self.created = int(time.time())

    @property
    def name(self) -> str:
        """The name that answers carry."""
        return self.names[0]


class ModelDirectory:
    """The served models by each of their names."""

    def __init__(self, *models: ServedModel) -> None:
        """The first one is meant where a request names no model."""
        self.default = models[0]
        self._models = {name: model for model in models for name in model.names}

    def __iter__(self) -> Iterator[str]:
        """Every name that is served."""
        return iter(self._models)

    def find(self, name: str) -> ServedModel:
        """The model of this name; `NotFoundError` if it is not served."""
        if name not in self._models:
            shown = name if len(name) <= 100 else name[:100] + "…"
            served = " or ".join(map(repr, self._models))
            raise NotFoundError(f"model {shown!r} does not exist: {served} is served here", "model", "model_not_found")
        return self._models[name]

    def of(self, body: Body) -> ServedModel:
        """The model that a request is for."""
        return self.find(body["model"]) if "model" in body else self.default
