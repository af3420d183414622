"""Errors of requests: refused, not found, not allowed, queue full, or no engine available."""

from __future__ import annotations

from headrace.errors import RequestError

__all__ = ["NotAllowedError", "NotFoundError", "QueueFullError", "RefusedError", "UnavailableError"]


class QueueFullError(RuntimeError):
    """The queue is full. `retry_after` estimates when a place will be free: whole seconds, from 1."""

    def __init__(self, waiting: int, retry_after: int) -> None:
        super().__init__(f"{waiting} sequences wait already, which is all the queue holds: try again later")
        self.retry_after = retry_after


class RefusedError(RequestError):
    """The server can never serve the request; it names fields as the client does."""


class NotFoundError(RefusedError):
    """The request names a model that is not served here."""


class NotAllowedError(RefusedError):
    """The server was not started with the flag that allows this."""


class UnavailableError(RuntimeError):
    """No engine can serve this: it failed, or the server is stopping."""
