"""`DelegatingOps`: an op set that replaces some operations of another."""

from __future__ import annotations

from typing import Any

from headrace.kernels.base import BaseOps
from headrace.kernels.training import TrainingOps

__all__ = ["DelegatingOps"]


class DelegatingOps(BaseOps):
    """What a subclass does not define is `base`'s, name and device too."""

    def __init__(self, base: TrainingOps) -> None:
        self.base = base

    def __getattr__(self, name: str) -> Any:
        # Called only for what is missing here, which `base` itself is while an object is copied or unpickled.
        if name.startswith("_") or name == "base":
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}", name=name, obj=self)
        return getattr(self.base, name)
