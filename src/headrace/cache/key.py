"""`CacheKey`: what KV depends on besides the tokens before it."""

from __future__ import annotations

from typing import NamedTuple

__all__ = ["CacheKey"]


class CacheKey(NamedTuple):
    """Requests share cached blocks only under equal keys. The caller gives `adapter` and `salt`.

    The engine sets `weights_version`, whatever the caller gives.
    """

    weights_version: int = 0
    adapter: str | None = None
    salt: str | None = None
